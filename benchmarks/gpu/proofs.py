"""The parts of the suite that prove: the build, parity with plain torch on the GPU, NVIDIA's sanitizer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from gpu import sanitized
from gpu.parallel_tests import Report, run_tests
from gpu.part import Part
from gpu.processes import end
from gpu.sanitized import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
_MOST_PROCESSES = 14  # each has a CUDA context and compiles Triton kernels
# The kernels' grids, and tests for GPUs that have no backend in their names.
_SELECTION = (
    "triton or cuda or gpu or test_quantized_kernels or test_large_offsets or test_a_replayed_graph_tells_a_bad_id "
    "or test_every_candidate_of_the_tuner or test_a_label_outside_the_vocabulary_is_nan "
    "or test_a_gradient_compiles_with_its_forward"
)
_REAL_SIZE = "tests/test_gpu.py::test_an_operator_on_a_batch_of_real_size"
_LARGE = "tests/test_large_offsets.py"  # in one process, after the others: a test takes up to 12 GiB of the GPU
_NAMED = 10  # at most so many of the tests that were not run
_FIRST_SHAPES = 2  # the largest shapes of every kernel's grid run first
_FALL_BACK = 20  # seconds kept for an install without the extension
_NO_TOOL = (
    "it was not found on the PATH, in the toolkit ($CUDA_HOME or /usr/local/cuda) or in site-packages: "
    "the CUDA toolkit has it, and so has `pip install nvidia-cuda-sanitizer-api`"
)
_CALLS = re.compile(r"\d+ of \d+ calls are right: .*")  # what sanitized.py prints after each


def run(command: Sequence[str], seconds: float, **variables: str) -> tuple[int, str]:
    """Run a command; returns its exit status and its output, which also goes to the log.

    After `seconds` it is ended with all that it started, and TimeoutExpired raised; the log has what it had said.
    """
    print("$", *command, flush=True)
    seconds = max(1.0, seconds)
    with tempfile.TemporaryFile() as said:  # reading a pipe would wait for every descendant that holds it
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            error.output = _log(said)
            raise
        finally:
            end(process)
        return process.returncode, _log(said)


def _log(file: IO[bytes]) -> str:
    """Prints the content of the file and returns it."""
    file.seek(0)
    text = file.read().decode(errors="replace")
    print(text, flush=True)
    return text


# build --------------------------------------------------------------------------------------------------------------------


def build(part: Part) -> None:
    """Install the checkout with everything that can be compiled; then every backend of this device must run."""
    try:
        _install(part, "cpu" if part.device == "cpu" else "auto")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        part.fail("pip install", error)
        _install(part, "off")  # so that the Triton kernels can still be measured
    script = "import json, albert_fast.info as i; print(json.dumps([i.operators(), i.advice()]))"
    status, said = run([sys.executable, "-c", f"import sys; del sys.path[0]; {script}"], part.left())
    run([sys.executable, "-m", "albert_fast.info"], part.left())
    if status:
        raise RuntimeError(f"albert_fast.info fails: {said[-1000:]}")
    operators, advice = json.loads(said.splitlines()[-1])
    part.add("info", operators=operators, advice=advice)
    for row in operators:
        if row["device"] == part.device and not row["runs"]:
            part.fail(f"{row['operator']} on {row['backend']}", str(row["reason"]))


def _install(part: Part, mode: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    started = time.monotonic()
    seconds = part.left() - (0 if mode == "off" else _FALL_BACK)
    status, said = run(command, seconds, ALBERT_FAST_BUILD=mode, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if status:
        raise RuntimeError(f"ALBERT_FAST_BUILD={mode} {' '.join(command)} fails: {said[-1500:]}")
    part.add("built", mode=mode, duration=time.monotonic() - started)


# parity -------------------------------------------------------------------------------------------------------------------


class Counts:
    """Counts the outcomes of tests by file and by kernel, and records them every few seconds: a kill loses little."""

    def __init__(self, part: Part) -> None:
        self.part, self.written = part, 0.0
        self.counts: dict[str, dict[str, int]] = {}
        self.not_run: list[str] = []

    def add(self, report: Report) -> None:
        file, _, test = report.test.partition("::")
        of_file = self.counts.setdefault(file, {})
        of_file[report.outcome] = of_file.get(report.outcome, 0) + 1
        if report.outcome == "failed":
            print(f"{report.test} failed:\n{report.why}", flush=True)
            self.part.fail(report.test, report.why)
        elif report.outcome == "not run":
            self.not_run.append(report.test)
        backend = re.search(r"\[(triton|cuda)-", test)
        if report.outcome == "passed" and backend:
            kind = "backward" if test.startswith("test_backward") else "forward"
            key = f"{Path(file).stem.removeprefix('test_')} {backend[1]} {kind}"
            by_kernel = self.counts.setdefault("by kernel", {})
            by_kernel[key] = by_kernel.get(key, 0) + 1
        if time.monotonic() - self.written > 2:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        self.part.add("tests", key="tests", counts=self.counts)


def parity(part: Part) -> None:
    """Run the operators' parity tests on every GPU kernel and tests/test_gpu*.py, in as many processes as there are cores.

    First every kernel in bfloat16 on a few shapes of its grid and on a real batch, then all other tests.
    """
    from albert_fast.runtime import dispatch

    kernels = {
        op: [backend for backend in devices["cuda"] if backend != "reference"]
        for op, devices in dispatch.TABLE.items()
        if set(devices["cuda"]) - {"reference"}
    }
    files = [
        "tests/test_gpu.py",
        "tests/test_gpu_graphs.py",
        "tests/test_graph_inputs.py",
        "tests/test_quantized_kernels.py",
        *(f"tests/test_{op}.py" for op in kernels),
    ]
    selection, alone = _SELECTION, [_LARGE]
    if part.device == "cpu":
        os.environ |= {"ALBERT_FAST_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1"}
        kernels, files, alone = {"bias_gelu": ["triton"]}, ["tests/test_gpu.py", "tests/test_bias_gelu.py"], []
        selection = "real_size and bias_gelu and bf16 or triton and bf16 and (test_forward or test_backward)"
    processes = max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2))
    seconds = part.left()
    counts = Counts(part)
    try:
        for report in run_tests(
            [*files, "--thorough", "-k", selection], first_tests(kernels), processes, seconds, ROOT
        ):
            counts.add(report)
        for report in run_tests(alone, [], 1, part.left(), ROOT) if alone else ():
            counts.add(report)
    finally:
        counts.write()
    if counts.not_run:
        named = ", ".join([*counts.not_run[:_NAMED], *(["..."] if len(counts.not_run) > _NAMED else [])])
        part.fail("time", f"{len(counts.not_run)} tests were not run in {seconds:.0f} s: {named}")
    for name in missing(kernels, counts.counts.get("by kernel", {})):
        part.fail(name, "no parity test of this kernel has passed")


def first_tests(kernels: Mapping[str, Sequence[str]]) -> list[str]:
    """The parity tests of every kernel in bfloat16, on a batch of real size and on the largest shapes of its grid."""
    from albert_fast.testing import ALL_CASES
    from albert_fast.testing.parity import DTYPES, make_inputs, parity_grid

    found = []
    for op, backends in kernels.items():
        for options in filter(lambda options: ALL_CASES[op].takes(options, DTYPES["bf16"]), ALL_CASES[op].options):
            found.append(f"{_REAL_SIZE}[{'-'.join([op, *(f'{k}={v}' for k, v in options.items())])}-bf16]")
        for backend in backends:
            grid = [row for row in parity_grid(op, backend) if row[4] == DTYPES["bf16"]]
            work = {row[2]: row[1].operations(make_inputs(row[1], row[2], {}, DTYPES["bf16"])) for row in grid}
            shapes = sorted(work, key=lambda shape: work[shape])[-_FIRST_SHAPES:]
            for name, case, shape, *_ in grid:
                directions = ("forward", "backward") if case.gradients else ("forward",)
                found += [f"tests/test_{op}.py::test_{d}[{name}]" for d in directions if shape in shapes]
    return found


def missing(kernels: Mapping[str, Sequence[str]], passed: Mapping[str, int]) -> list[str]:
    """The kernels (operator -> its GPU backends) without a parity test of their forward that has passed."""
    wanted = [f"{op} {backend} forward" for op, backends in kernels.items() for backend in backends]
    return [name for name in wanted if not passed.get(name)]


# sanitizer ----------------------------------------------------------------------------------------------------------------


def sanitizer(part: Part) -> None:
    """Run compute-sanitizer's memcheck, and racecheck on fewer calls, over sanitized.py: CUDA kernels and some of Triton's."""
    if part.device == "cpu":
        part.add("skipped", what="compute-sanitizer", why="it watches kernels on a GPU")
        return
    tool = _sanitizer_tool()
    if tool is None:
        part.fail("compute-sanitizer", _NO_TOOL)
        return
    for check, share in (("memcheck", 0.6), ("racecheck", 1.0)):
        part.attempt(check, partial(_sanitize, part, tool, check, share), needs=5)


def _sanitizer_tool() -> str | None:
    """The path of compute-sanitizer: on the PATH, in a CUDA toolkit, or in a package from pip."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    places = toolkit, *Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def _sanitize(part: Part, tool: str, check: str, share: float) -> None:
    seconds = part.left() * share
    command = [tool, "--tool", check, "--error-exitcode", "99", "--target-processes", "application-only"]
    # By default it gives CUDA 10 s to start and else watches nothing; torch's import alone may take as long.
    command += ["--launch-timeout", f"{seconds:.0f}"]
    # torch asks the driver for features it may lack, and continues: these errors concern no memory.
    command += ["--report-api-errors", "no"] if check == "memcheck" else []
    for op in OPERATORS[check]:
        command += ["--kernel-name", f"kns={op}"]  # torch's and cuBLAS's kernels are left out
    command += [sys.executable, sanitized.__file__, check]
    try:
        # Every tensor gets its own allocation: in torch's pool, memory beyond a tensor's end is allocated too.
        status, said = run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired as error:
        done = _CALLS.findall(error.output)
        far = done[-1] if done else "before its first call was done"
        part.fail(check, f"it was ended after {seconds:.0f} s: {far}")
        return
    found, done = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said), _CALLS.findall(said)
    calls = done[-1] if done else ""
    part.add("sanitizer", check=check, summary=found[-1] if found else "", tests=calls, left=part.left())
    number, _, total = calls.partition(" calls")[0].partition(" of ")
    if status or not calls or number != total or not found or not found[-1].startswith("0 "):
        part.fail(check, f"exit status {status}: {said[-1500:]}")
