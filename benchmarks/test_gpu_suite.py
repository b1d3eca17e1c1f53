"""gpu_suite.py without a GPU: its measuring parts on small shapes, and what it makes of parts that go wrong.

`pytest benchmarks/test_gpu_suite.py`; torch.compile is switched off, for it takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_measures
import gpu_proofs
import gpu_suite
import pytest
import torch
from gpu_part import LOST, Part
from gpu_report import markdown, targets

MEASURED = ("machine", "model", "operators", "training", "tiles")
RECORD = (
    "import json, sys, time, os, signal; open(sys.argv[1], 'a').write(json.dumps({'kind': 'note', 'n': 1}) + '\\n'); "
)


def run(tmp_path: Path, code: str, limit: float) -> tuple[gpu_suite.Outcome, list[int]]:
    """The outcome of a part that records once and then runs `code`; how many records each publication had."""
    records, published = tmp_path / "records.jsonl", []
    command = [sys.executable, "-c", RECORD + code, str(records)]

    def publish(outcome: gpu_suite.Outcome) -> None:
        published.append(len(outcome.records))
        (tmp_path / "published").write_text(json.dumps(outcome.records))

    outcome = gpu_suite.run_part("part", lambda _: command, limit, tmp_path / "log", records, publish)
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
def test_another_process_goes_on_where_one_has_lost_the_gpu(tmp_path, end):
    code = f"""if True:
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from gpu_part import LOST, Part
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


def test_a_test_that_breaks_the_context_takes_no_other_along(tmp_path):
    pytest.importorskip("xdist")
    shutil.copy(gpu_proofs.ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import torch\nbroken = []\n"
        "def synchronize():\n    if broken: raise RuntimeError('an illegal memory access was encountered')\n"
        "torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize\n"
        "def test_before(): pass\n"
        "def test_breaks():\n    broken.append(1)\n    raise ValueError('the reason')\n"
        "def test_fails(): raise ValueError('something else')\n"
        "def test_after(): assert not broken\n"
    )
    command = [*gpu_proofs.PYTEST, "-q", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "2 failed, 2 passed" in done.stdout, done.stdout
    assert re.search(r"crashed while running '.*test_breaks", done.stdout)
    assert "ValueError: the reason" in done.stdout + done.stderr


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
        gpu_proofs.run(command, 4)
    assert raised.value.output == "so far\n"
    assert "so far" in capsys.readouterr().out
    stat = Path(f"/proc/{int((tmp_path / 'child').read_text())}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert gpu_proofs.run(["sh", "-c", "echo $WHAT; exit 3"], 9, WHAT="said") == (3, "said\n")


def test_records_are_published_while_the_part_runs_and_a_key_is_replaced(tmp_path):
    # The part goes on once what it wrote was published.
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
    assert gpu_proofs.missing(kernels, {"attention triton forward": 3}) == ["embedding_projection cuda forward"]


@pytest.mark.parametrize(("errors", "failed"), [(0, False), (2, True)])
def test_the_sanitizer_s_summary_decides(tmp_path, monkeypatch, errors, failed):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '3 passed in 1 s'\necho '========= ERROR SUMMARY: {errors} errors'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    part = Part("cuda", False, 60.0, tmp_path / "records")
    gpu_proofs.sanitizer(part)
    assert part.failed == failed


@pytest.mark.parametrize("compiles", [True, False])
def test_a_build_that_fails_leaves_an_install_without_the_extension(tmp_path, monkeypatch, compiles):
    kernels = [{"operator": "attention", "device": "cuda", "backend": "triton", "runs": True, "reason": None}]
    kernels.append({**kernels[0], "backend": "cuda", "runs": compiles, "reason": None if compiles else "no CUDA"})

    def run(command, seconds, **variables):
        works = compiles or variables.get("ALBERT_FAST_BUILD") != "auto"
        return (0, json.dumps([kernels, []])) if works else (1, "nvcc fatal")

    monkeypatch.setattr(gpu_proofs, "run", run)
    part = Part("cuda", False, 60.0, tmp_path / "records")
    gpu_proofs.build(part)
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
    assert found["model base-1x128", "100 us at most"][2] is False
    assert found["bias_gelu fwd bfloat16", "0.90"] == ("3,000 GB/s (copy)", "0.83", False)
    assert found["attention bwd bfloat16 64x512", "1.00 x"] == ("1.200 ms (sdpa-cudnn)", "1.20", True)
    assert found["training step base-32x512", "2.00 x"] == ("90.000 ms (hf-sdpa)", "1.80", False)
    assert found["memory of a training step base-32x512", "0.33 at most"][1:] == ("0.25", True)


def test_tuned_tiles_stand_beside_the_default_ones():
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
    """One of CUDA's, of a GPU that is busy until it is waited for."""

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
    returned, answered = gpu_measures._one_at_a_time(lambda: time.sleep(0.01))
    assert 0.01 <= returned < answered
    assert answered >= 0.06
    calls: list[None] = []
    assert gpu_measures._device_seconds(lambda: calls.append(None)) == pytest.approx(6.4e-3 / len(calls))
    monkeypatch.setattr(Event, "late", True)
    assert gpu_measures._device_seconds(lambda: None) is None, "the GPU had nothing to do for a while"
    latency = {"kind": "latency", "batch": "1x128", "what": "mask", "returned": 5e-5, "answered": 2e-4, "device": None}
    part = {"part": "model", "status": "", "seconds": 0.0, "limit": 0.0, "why": "", "records": [latency]}
    suite = {"name": "", "rehearsal": False, "command": [], "began": "", "seconds": 0.0, "not_run": [], "parts": [part]}
    assert "| 1x128 mask | 50.0 | 200 |  |" in markdown(suite)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict[str, Any]:
    """The JSON of the measuring parts and the sanitizer, as the command line runs them."""
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, gpu_suite.__file__, "--device", "cpu", "--quick", "--out", str(out), "--name", "here"]
    command += ["--only", *MEASURED, "sanitizer", "--minutes", "20"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "here.log").read_text()[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["here.json", "here.log", "here.md"]
    assert (out / "here.md").read_text() in done.stdout
    content: dict[str, Any] = json.loads((out / "here.json").read_text())
    assert (out / "here.md").read_text() == markdown(content)
    return content


def test_every_measuring_part_runs_without_a_gpu(rehearsal):
    assert {part["part"]: part["status"] for part in rehearsal["parts"]} == dict.fromkeys(
        (*MEASURED, "sanitizer"), "passed"
    )
    assert rehearsal["not_run"] == []
    assert "rehearsal" in markdown(rehearsal)


def test_every_side_gives_a_row(rehearsal):
    records = [record for part in rehearsal["parts"] for record in part["records"]]
    assert [r for r in records if r["kind"] in ("failure", "peer failure")] == []
    skipped = {r["what"] for r in records if r["kind"] == "skipped"}
    assert skipped - {"compute-sanitizer"} == {"model in fp8"}, "no CPU multiplies float8 numbers"
    rows = [record["id"] for record in records if record["kind"] == "row"]
    assert len(rows) == len(set(rows)), "what is measured again replaces its row"
    sides = {row.rpartition("/")[2] for row in rows}
    assert sides == {
        "albert_fast", "cpp", "eager", "compile", "hf-eager", "hf-sdpa", "hf-compile", "hf-compile-default", "torch-nested",
        "sdpa-flash", "sdpa-padded-flash", "sdpa-nested", "operators",
    }  # fmt: skip
    assert [r["what"] for r in records if r["kind"] == "ceiling"] == ["copy", "bf16 product", "fp32 product"]
