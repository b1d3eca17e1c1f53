"""Runs pytest in several processes and reports each test as it ends, and at last the tests that were not run.

`run_tests` starts this file, which starts `pytest -n`; the hooks below are that pytest's plugin, in its main process and in
its workers. A test that breaks its process's CUDA context, kills its process or hangs fails alone: its worker ends, and
pytest-xdist starts another one for the tests that remain.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as gpu.<name>

import pytest

from gpu.processes import end

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

_LONGEST = 90.0  # seconds of one test; a kernel that hangs ignores signals
_BROKEN = 76  # exit status of a worker whose CUDA context is broken
_OPTIONS = ("-q", "--tb=no", "-rN", "-p", "no:cacheprovider", "--continue-on-collection-errors")
# Not loadgroup: there, pytest-xdist 3.8 runs a test that ended its worker again and again. One test at a time, so that those
# of --first start first. No limit on replaced workers: one broken kernel must not hide the others.
_PARALLEL = ("--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "1000", "-p", "gpu.parallel_tests")


@dataclass(frozen=True)
class Report:
    """The outcome of a test: "passed", "failed", "skipped" or "not run", and the reason."""

    test: str
    outcome: str
    why: str = ""


def run_tests(
    arguments: Sequence[str],
    first: Sequence[str],
    processes: int,
    seconds: float,
    folder: Path,
    longest: float = _LONGEST,
) -> Iterator[Report]:
    """Run what pytest collects for `arguments` in `folder`, for at most `seconds`.

    Args:
        first: ids of the tests that run before all others, in this order; an id that is not collected fails.
        longest: seconds that one test may take.
    """
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        records, order = Path(scratch, "records"), Path(scratch, "first")
        records.touch()
        order.write_text(json.dumps(list(first)))
        command = [sys.executable, __file__, "-n", str(processes), *_PARALLEL, *_OPTIONS, *arguments]
        command += ["--records", str(records), "--first", str(order), "--longest", str(longest)]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield from _reports(process, records, deadline)
        finally:
            end(process)


def _reports(process: subprocess.Popen[bytes], records: Path, deadline: float) -> Iterator[Report]:
    """The reports in `records` while the process writes them; then the tests that were collected and have none."""
    waiting: dict[str, None] | None = None
    with records.open() as file:
        running = True
        while running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.25)
            # Asked before the file is read: what the process wrote before its end is read below.
            running = process.poll() is None and time.monotonic() < deadline
            for kind, *said in map(json.loads, _whole_lines(file)):
                if kind == "collected":
                    waiting = dict.fromkeys(said[0])
                else:
                    report = Report(*said)
                    (waiting or {}).pop(report.test, None)
                    yield report
    if waiting is None:
        how = "in its time" if process.returncode is None else f"and ended with status {process.returncode}"
        yield Report("pytest", "failed", f"pytest did not collect the tests {how}")
    yield from (Report(test, "not run") for test in waiting or ())


def _whole_lines(file: Any) -> Iterator[str]:
    """New lines of a file that another process appends to; the last one may still be half written."""
    start = file.tell()
    while (line := file.readline()).endswith("\n"):
        start = file.tell()
        yield line
    file.seek(start)


# The plugin of pytest ----------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="file of JSON lines: what was collected, and each test's outcome")
    parser.addoption("--first", type=Path, help="JSON file of the ids of tests that run before all others")
    parser.addoption("--longest", type=float, default=_LONGEST, help="seconds after which a test's worker is ended")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Move the tests of --first to the front."""
    rank = {test: number for number, test in enumerate(json.loads(config.getoption("first").read_text()))}
    items.sort(key=lambda item: rank.get(item.nodeid, len(rank)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End this worker where a test takes too long."""
    faulthandler.dump_traceback_later(item.config.getoption("longest"), exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
    """End this worker where a test broke its CUDA context: every later test would fail here."""
    torch = sys.modules.get("torch")
    if call.excinfo is None or torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        traceback.print_exception(call.excinfo.value, file=sys.__stderr__)
        print(f"and the GPU: {error}", file=sys.__stderr__, flush=True)
        os._exit(_BROKEN)  # a regular end would take down the broken context, which may hang or abort


class _Recorder:
    """In pytest's main process: writes what the workers collect and report."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("records")
        self.first: list[str] = json.loads(config.getoption("first").read_text())
        self.collected = False

    def pytest_xdist_node_collection_finished(self, node: WorkerController, ids: Sequence[str]) -> None:
        if self.collected:  # by another worker; pytest-xdist checks that all collect the same
            return
        self.collected = True
        self._write("collected", list(ids))
        for test in sorted(set(self.first) - set(ids), key=self.first.index):
            self._write("report", test, "failed", "there is no such test")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("report", f"collecting {report.nodeid}", "failed", report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            why = report.longreprtext if report.failed else ""
            self._write("report", report.nodeid, report.outcome, why)

    def _write(self, *record: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:]))
