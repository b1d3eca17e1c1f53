"""Tests of the suite without a GPU: its measuring parts on small shapes, and parts that go wrong.

torch.compile is switched off, since it takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import engines, lengths, sides

from albert_fast import ALBERTModel
from albert_fast.execution.graphs import MAX_PLACES, MAX_TOKENS, GraphCache
from albert_fast.testing import ALL_CASES
from albert_fast.testing.gpu import fake_graphs
from gpu import measures, proofs, sanitized, suite
from gpu.parallel_tests import Report
from gpu.part import LOST, Part
from gpu.report import markdown, targets

MEASURED = ("parity", "machine", "model", "operators", "training", "tiles")
RECORD = (
    "import json, sys, time, os, signal; open(sys.argv[1], 'a').write(json.dumps({'kind': 'note', 'n': 1}) + '\\n'); "
)


def run(tmp_path: Path, code: str, limit: float) -> tuple[suite.Outcome, list[int]]:
    """The outcome of a part that records once and then runs `code`; how many records each publication had."""
    records, published = tmp_path / "records.jsonl", []
    command = [sys.executable, "-c", RECORD + code, str(records)]

    def publish(outcome: suite.Outcome) -> None:
        published.append(len(outcome.records))
        (tmp_path / "published").write_text(json.dumps(outcome.records))

    outcome = suite.run_part("part", lambda _: command, limit, tmp_path / "log", records, publish)
    return outcome, published


@pytest.mark.parametrize(
    ("code", "limit", "status", "why"),
    [
        ("print('fine')", 60, "passed", ""),
        ("print('the reason'); sys.exit(3)", 60, "failed", "exit status 3; the reason"),
        ("raise ValueError('no such thing')", 60, "failed", "exit status 1; ValueError: no such thing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 60, "killed", "by SIGKILL"),
        ("time.sleep(100)", 5, "timed out", "it was ended after its limit of 5 s"),
    ],
    ids=["passes", "fails", "raises", "killed", "hangs"],
)
def test_how_a_part_ends(tmp_path, code, limit, status, why):
    outcome, published = run(tmp_path, code, limit)
    assert (outcome.status, outcome.why) == (status, why)
    assert outcome.records == [{"kind": "note", "n": 1}]
    assert published[-1] == 1
    assert outcome.seconds < 90


@pytest.mark.parametrize("end", ["os._exit(LOST)", "os.kill(os.getpid(), signal.SIGSEGV)"], ids=["lost", "killed"])
def test_another_process_continues_where_one_has_lost_the_gpu(tmp_path, end):
    code = f"""if True:
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from gpu.part import LOST, Part
        part = Part("cuda", True, 50.0, __import__("pathlib").Path(sys.argv[1]))
        part.attempt("first", lambda: part.add("row", id="first"))
        part.attempt("second", lambda: {end})
        part.attempt("third", lambda: part.add("row", id="third"))
        sys.exit(part.failed)"""
    outcome, _ = run(tmp_path, f"\n{code}", 60)
    assert [r["id"] for r in outcome.records if r["kind"] == "row"] == ["first", "third"]
    assert [r["what"] for r in outcome.records if r["kind"] == "failure"] == ["second"]
    assert outcome.status == "failed"


def test_a_broken_context_ends_the_process(tmp_path, monkeypatch):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")

    def leave(status):
        raise SystemExit(status)

    part = Part("cuda", True, 50.0, tmp_path / "records")
    part.check_gpu("before")
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit) as raised:
        part.attempt("attention", lambda: None)
    assert raised.value.code == LOST
    assert json.loads((tmp_path / "records").read_text().splitlines()[-1])["what"] == "the GPU after attention"


@pytest.mark.parametrize("session", [False, True], ids=["its group", "a group of their own"])
def test_a_part_that_hangs_takes_its_children_along(tmp_path, session):
    child = f"import subprocess; p = subprocess.Popen(['sleep', '100'], start_new_session={session}); "
    run(tmp_path, f"{child}open('{tmp_path / 'child'}', 'w').write(str(p.pid)); time.sleep(100)", 8)
    pid = int((tmp_path / "child").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_command_that_takes_too_long_ends_with_its_children_and_its_output_is_kept(tmp_path, capsys):
    command = ["bash", "-c", f"echo so far; sleep 100 & echo $! > {tmp_path / 'child'}; wait"]
    with pytest.raises(subprocess.TimeoutExpired, match="timed out") as raised:
        proofs.run(command, 4)
    assert raised.value.output == "so far\n"
    assert "so far" in capsys.readouterr().out
    stat = Path(f"/proc/{int((tmp_path / 'child').read_text())}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert proofs.run(["sh", "-c", "echo $WHAT; exit 3"], 9, WHAT="said") == (3, "said\n")


def test_records_are_published_while_the_part_runs_and_a_key_is_replaced(tmp_path):
    # The part continues once its records were published.
    code = f"""if True:
        for n in 2, 3:
            open(sys.argv[1], "a").write(json.dumps(dict(kind="tests", key="t", n=n)) + chr(10))
            while f'"n": {{n}}' not in open({str(tmp_path / "published")!r}).read():
                time.sleep(0.01)
        open(sys.argv[1], "a").write('{{"half a li')"""
    outcome, published = run(tmp_path, f"\n{code}", 60)
    assert outcome.status == "passed"
    assert outcome.records == [{"kind": "note", "n": 1}, {"kind": "tests", "key": "t", "n": 3}]
    assert published[-1] == 2


def test_what_fails_within_a_part_leaves_the_rest(tmp_path):
    part = Part("cpu", True, 50.0, tmp_path / "records")
    done: list[str] = []
    part.attempt("first", lambda: 1 // 0)
    part.attempt("second", lambda: done.append("second"))
    part.attempt("third", lambda: done.append("third"), needs=100)
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert done == ["second"]
    assert part.failed
    told = [(r["kind"], r["what"]) for r in records if r["kind"] != "begun"]
    assert told == [("failure", "first"), ("skipped", "third")]
    part = Part("cpu", True, 50.0, tmp_path / "others")
    part.fail("hf-sdpa", RuntimeError("out of memory"), "peer failure")
    assert not part.failed


def test_a_kernel_without_a_passed_test_is_missed():
    kernels = {"attention": ["triton"], "embedding_projection": ["cuda"]}
    assert proofs.missing(kernels, {"attention triton forward": 3}) == ["embedding_projection cuda forward"]


def test_counts_of_files_and_kernels_and_what_was_not_run(tmp_path):
    counts = proofs.Counts(Part("cuda", True, 50.0, tmp_path / "records"))
    for test, outcome in (
        ("test_forward[triton-f32-1x1]", "passed"),
        ("test_forward[cuda-f32-1x1]", "failed"),
        ("test_backward[triton-f32-1x1]", "passed"),
        ("test_other", "not run"),
    ):
        counts.add(Report(f"tests/test_attention.py::{test}", outcome, "why"))
    assert counts.not_run == ["tests/test_attention.py::test_other"]
    assert counts.counts == {
        "tests/test_attention.py": {"passed": 2, "failed": 1, "not run": 1},
        "by kernel": {"attention triton forward": 1, "attention triton backward": 1},
    }
    tests = {"kind": "tests", "counts": counts.counts}
    part = {"part": "parity", "status": "", "seconds": 0.0, "limit": 0.0, "why": "", "records": [tests]}
    suite = {"name": "", "rehearsal": False, "command": [], "began": "", "seconds": 0.0, "not_run": [], "parts": [part]}
    assert "| tests/test_attention.py | 2 | 1 | 0 | 1 |" in markdown(suite)


@pytest.mark.parametrize(
    ("errors", "calls", "failed"),
    [(0, 24, False), (2, 24, True), (0, 23, True)],
    ids=["clean", "errors", "not all calls"],
)
def test_the_sanitizer_s_summary_decides(tmp_path, monkeypatch, errors, calls, failed):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!/bin/sh\necho '{calls} of 24 calls are right: the last'\necho '========= ERROR SUMMARY: {errors} errors'\n"
        f'echo "$@" >> {tmp_path}/asked\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    part = Part("cuda", False, 60.0, tmp_path / "records")
    proofs.sanitizer(part)
    assert part.failed == failed
    memory, races = (tmp_path / "asked").read_text().splitlines()
    assert "--tool memcheck" in memory
    assert "--kernel-name kns=embedding_projection --kernel-name kns=attention" in memory
    assert "--tool racecheck" in races
    assert "kns=attention" not in races


def test_without_the_sanitizer_a_gpu_fails_and_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs.shutil, "which", lambda _name, path: None)
    for device in ("cuda", "cpu"):
        part = Part(device, False, 60.0, tmp_path / device)
        proofs.sanitizer(part)
        assert part.failed == (device == "cuda")
    assert "pip install nvidia-cuda-sanitizer-api" in json.loads((tmp_path / "cuda").read_text())["error"]


@pytest.mark.parametrize(
    ("said", "far"), [("", "before its first call"), ("1 of 9 calls are right: x\n", "1 of 9 calls")]
)
def test_a_sanitizer_that_takes_too_long_tells_which_and_how_far(tmp_path, monkeypatch, said, far):
    def run(command, seconds, **variables):
        raise subprocess.TimeoutExpired(command, seconds, said)

    monkeypatch.setattr(proofs, "run", run)
    monkeypatch.setattr(proofs, "_sanitizer_tool", lambda: "compute-sanitizer")
    proofs.sanitizer(Part("cuda", False, 60.0, tmp_path / "records"))
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    failures = [r for r in records if r["kind"] == "failure"]
    assert [r["what"] for r in failures] == ["memcheck", "racecheck"]
    assert all(re.match(rf"it was ended after \d+ s: {far}", r["error"]) for r in failures)


def test_what_the_sanitizer_watches_runs_and_is_compiled_by_the_parity_tests_before(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for op, (shape, options) in sanitized.TRITON.items():
        assert shape in ALL_CASES[op].shapes
        assert options in ALL_CASES[op].options
    for check, ops in sanitized.OPERATORS.items():
        calls = list(sanitized.cases(check, multiprocessors=1))
        assert list(dict.fromkeys(call[0] for call in calls)) == list(ops)
        assert [call[0] for call in calls if call[3] == "f32"].count("embedding_projection") >= 2
    command = [sys.executable, sanitized.__file__, "racecheck", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = len(list(sanitized.cases("racecheck", 1)))
    assert proofs._CALLS.findall(done.stdout)[-1].startswith(f"{number} of {number} calls are right")


def test_the_filter_matches_every_cuda_kernel():
    sources = "".join(path.read_text() for path in (proofs.ROOT / "csrc" / "cuda").glob("*.cu*"))
    kernels = re.findall(r"__global__.*?(\w+_kernel)\(", sources, re.DOTALL)
    assert len(kernels) == sources.count("__global__")
    assert all(any(op in kernel for op in sanitized.CUDA) for kernel in kernels), kernels


@pytest.mark.parametrize("compiles", [True, False])
def test_a_build_that_fails_leaves_an_install_without_the_extension(tmp_path, monkeypatch, compiles):
    kernels = [{"operator": "attention", "device": "cuda", "backend": "triton", "runs": True, "reason": None}]
    kernels.append({**kernels[0], "backend": "cuda", "runs": compiles, "reason": None if compiles else "no CUDA"})

    def run(command, seconds, **variables):
        works = compiles or variables.get("ALBERT_FAST_BUILD") != "auto"
        return (0, json.dumps([kernels, []])) if works else (1, "nvcc fatal")

    monkeypatch.setattr(proofs, "run", run)
    part = Part("cuda", False, 60.0, tmp_path / "records")
    proofs.build(part)
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert [r["mode"] for r in records if r["kind"] == "built"] == ["auto" if compiles else "off"]
    failures = [(r["what"], r["error"]) for r in records if r["kind"] == "failure"]
    assert part.failed == bool(failures) == (not compiles)
    if failures:
        assert "nvcc fatal" in failures[0][1]
        assert failures[1] == ("attention on cuda", "no CUDA")


def row(identity: str, ours: bool, milliseconds: float, **more: Any) -> dict[str, Any]:
    return {"kind": "row", "id": identity, "ours": ours, "milliseconds": milliseconds, **more}


def test_targets_are_met_or_not():
    records = [
        {"kind": "ceiling", "what": "copy", "per_second": 3e12},
        {"kind": "ceiling", "what": "bf16 product", "per_second": 8e14},
        row("model/fwd/bfloat16/base-64x512/albert_fast", True, 10.0, gflops=6e5),
        row("model/fwd/bfloat16/base-64x512/hf-sdpa", False, 25.0),
        row("model/fwd/bfloat16/base-64x512/hf-compile", False, 12.0),
        row("model/fwd/bfloat16/base-imdb-32/albert_fast", True, 3.0, gflops=5.9e5),
        row("model/fwd/bfloat16/base-mixed-32/albert_fast", True, 4.2, gflops=5.8e5),
        row("model/fwd/bfloat16/base-mixed-32/albert_fast-graphs", False, 4.0, gflops=5e5),
        row("model/fwd/bfloat16/base-imdb-32/hf-sdpa", False, 9.0, gflops=2e5),
        row("model/fwd/bfloat16/base-1x128/albert_fast", True, 0.2, gflops=1.0),
        row("bias_gelu/fwd/bfloat16/32768x3072/triton", True, 0.1, gbytes_per_second=2500.0),
        row("attention/bwd/bfloat16/64x512/triton", True, 1.0),
        row("attention/bwd/bfloat16/64x512/sdpa-flash", False, 1.5),
        row("attention/bwd/bfloat16/64x512/sdpa-cudnn", False, 1.2),
        row("training/step/bfloat16/base-32x512/albert_fast", True, 50.0, peak_mib=1000.0),
        row("training/step/bfloat16/base-32x512/hf-sdpa", False, 90.0, peak_mib=4000.0),
    ]
    found = {(what, target): (best, ratio, met) for what, _, best, ratio, target, met in targets(records)}
    assert found["model base-64x512", "0.65"] == ("800 TFLOP/s (product)", "0.75", True)
    assert found["model base-64x512", "2.00 x"] == ("25.000 ms (hf-sdpa)", "2.50", True)
    assert found["model base-64x512", "1.30 x"] == ("12.000 ms (hf-compile)", "1.20", False)
    assert found["model base-imdb-32", "1.05 x at most"][1:] == ("1.02", True)
    assert found["model base-mixed-32-graphs", "1.05 x at most"] == ("3.333 ms (at 64x512's rate)", "1.20", False)
    assert [what for what, _ in found if "imdb" in what or "mixed" in what] == [
        "model base-imdb-32",
        "model base-mixed-32",
        "model base-mixed-32-graphs",
    ]
    assert found["model base-1x128", "100 us at most"][2] is False
    assert found["bias_gelu fwd bfloat16", "0.90"] == ("3,000 GB/s (copy)", "0.83", False)
    assert found["attention bwd bfloat16 64x512", "1.00 x"] == ("1.200 ms (sdpa-cudnn)", "1.20", True)
    assert found["training step base-32x512", "2.00 x"] == ("90.000 ms (hf-sdpa)", "1.80", False)
    assert found["memory of a training step base-32x512", "0.33 at most"][1:] == ("0.25", True)


def test_tuned_tiles_are_shown_with_the_default_ones():
    name, tiles = "attention/fwd/bfloat16/64x512/triton", {"BLOCK_M": 128, "num_warps": 8}
    chosen = {"NVIDIA H100, Triton 3.6.0": {"attention_fwd 64 bf16": tiles}}
    records = [
        row(name, True, 1.0),
        {"kind": "tuned", "id": name, "milliseconds": 0.8},
        {"kind": "tiles", "chosen": chosen},
    ]
    parts = [{"part": "tiles", "records": records, "status": "passed", "seconds": 1.0, "limit": 2.0, "why": ""}]
    header = {"name": "here", "rehearsal": False, "command": [], "began": "", "seconds": 1.0, "not_run": []}
    lines = markdown({**header, "parts": parts}).splitlines()
    assert f"| {name} | 1.00 | 0.800 |" in lines
    assert "| attention_fwd 64 bf16 | BLOCK_M 128, num_warps 8 |" in lines


class Event:
    """A CUDA event of a GPU that is busy until the program waits for it."""

    late = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.late

    def elapsed_time(self, _other: Event) -> float:
        return 6.4


def test_a_call_is_timed_until_it_returns_until_its_answer_and_on_the_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.05))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _cycles: None, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    returned, answered = measures._one_at_a_time(lambda: time.sleep(0.01))
    assert 0.01 <= returned < answered
    assert answered >= 0.06
    calls: list[None] = []
    assert measures._device_seconds(lambda: calls.append(None)) == pytest.approx(6.4e-3 / len(calls))
    monkeypatch.setattr(Event, "late", True)
    assert measures._device_seconds(lambda: None) is None, "the GPU had nothing to do for a while"
    latency = {"kind": "latency", "batch": "1x128", "what": "mask", "returned": 5e-5, "answered": 2e-4, "device": None}
    part = {"part": "model", "status": "", "seconds": 0.0, "limit": 0.0, "why": "", "records": [latency]}
    suite = {"name": "", "rehearsal": False, "command": [], "began": "", "seconds": 0.0, "not_run": [], "parts": [part]}
    assert "| 1x128 mask | 50.0 | 200 |  |" in markdown(suite)


def test_a_side_of_graphs_that_replays_none_fails_instead_of_getting_a_row(monkeypatch):
    model, asked = ALBERTModel(fake_graphs.CONFIG).eval(), []
    model.execution.warmup()
    ids = torch.randint(61, (2, 7))
    bind = engines.replayed(model, lambda *batch: lambda: asked.append(model(*batch)))
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="no CUDA graph: graphs are captured on cuda, not on cpu"),
    ):
        bind(ids, torch.ones_like(ids))
    monkeypatch.setattr(GraphCache, "forecast", lambda *_: "a replay of the CUDA graph for 14 tokens")
    with torch.inference_mode():
        bind(ids, torch.ones_like(ids))()
    assert len(asked) == 5


def test_ours_with_and_without_graphs_are_not_compared():
    names = ["albert_fast", "albert_fast-graphs", "albert_fast-int8", "hf-sdpa"]
    assert sides.rivals("albert_fast", names) == sides.rivals("albert_fast-graphs", names) == ["hf-sdpa"]
    assert sides.rivals("hf-sdpa", names) == ["albert_fast", "albert_fast-graphs"]
    assert sides.ours("albert_fast-graphs") == "albert_fast"


def test_the_batch_for_graphs_is_not_too_large_for_them():
    batch = json.loads(lengths.COMMITTED.read_text())["batches"]["mixed-32"]
    assert sum(batch) <= MAX_TOKENS
    assert engines._SMALL < len(batch) * max(batch) <= MAX_PLACES


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict[str, Any]:
    """The JSON of the measuring parts and the sanitizer, as the command line runs them."""
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, suite.__file__, "--device", "cpu", "--quick", "--out", str(out), "--name", "here"]
    command += ["--only", *MEASURED, "sanitizer", "--minutes", "20"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "here.log").read_text()[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["here.json", "here.log", "here.md"]
    assert (out / "here.md").read_text() in done.stdout
    content: dict[str, Any] = json.loads((out / "here.json").read_text())
    assert (out / "here.md").read_text() == markdown(content)
    return content


@pytest.mark.thorough
def test_every_measuring_part_runs_without_a_gpu(rehearsal):
    assert {part["part"]: part["status"] for part in rehearsal["parts"]} == dict.fromkeys(
        (*MEASURED, "sanitizer"), "passed"
    )
    assert rehearsal["not_run"] == []
    assert "rehearsal" in markdown(rehearsal)


@pytest.mark.thorough
def test_every_side_gives_a_row(rehearsal):
    records = [record for part in rehearsal["parts"] for record in part["records"]]
    assert [r for r in records if r["kind"] in ("failure", "peer failure")] == []
    skipped = {r["what"] for r in records if r["kind"] == "skipped"}
    assert skipped - {"compute-sanitizer"} == {"model in fp8"}, "no CPU multiplies float8 numbers"
    rows = [record["id"] for record in records if record["kind"] == "row"]
    assert len(rows) == len(set(rows)), "what is measured again replaces its row"
    measured = {row.rpartition("/")[2] for row in rows}
    assert measured == {
        "albert_fast",
        "albert_fast-graphs",
        "albert_fast-int8",
        "cpp",
        "eager",
        "compile",
        "hf-eager",
        "hf-sdpa",
        "hf-compile",
        "hf-compile-default",
        "torch-nested",
        "sdpa-flash",
        "sdpa-padded-flash",
        "sdpa-nested",
        "operators",
    }
    assert [r["what"] for r in records if r["kind"] == "ceiling"] == ["copy", "bf16 product", "fp32 product"]
