"""Tests in several processes of pytest, each of which is given its next ones when it is done: no plugin beside pytest.

`Shards` deals them; `python gpu_shards.py DESCRIPTOR ARGUMENT ...` is one of the processes that it starts. A test that
breaks the CUDA context or ends its process fails alone, and another process takes what that one had left. All processes of
a machine share Triton's cache on disk, so that a kernel is compiled once, or by those that met it at the same time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from processes import end

HERE = Path(__file__).resolve().parent
_OPTIONS = ("-p", "no:cacheprovider", "--continue-on-collection-errors")
_LEAVE = 5.0  # seconds in which a process ends by itself, after its last test or after its connection is gone
_BROKEN = 76  # exit status of a process whose CUDA context is gone


@dataclass(frozen=True)
class Report:
    """What became of a test: "passed", "failed", "skipped" or "not run", and why."""

    test: str
    outcome: str
    why: str = ""


@dataclass
class _Process:
    """One that runs tests, those that it has yet to finish, and since when it has been at the first of them."""

    process: subprocess.Popen[bytes]
    connection: Connection
    collected: bool = False
    tests: deque[str] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)


@dataclass
class Shards:
    """What pytest collects for `arguments` in `folder`, dealt to several processes.

    Args:
        first: the ids of tests that are dealt before all others, in this order; one that is not collected fails.
        processes: how many at once. seconds: for everything; what has not ended by then is not run. longest: of one test.
    """

    arguments: Sequence[str]
    first: Sequence[str]
    processes: int
    seconds: float
    folder: Path
    longest: float = 90.0  # a kernel that hangs heeds no signal
    _running: list[_Process] = field(default_factory=list, init=False)
    _leaving: list[_Process] = field(default_factory=list, init=False)
    _ahead: deque[list[str]] | None = field(default=None, init=False)  # None until a process has told what there is

    def reports(self) -> Iterator[Report]:
        """Every test's report as it comes."""
        deadline = time.monotonic() + self.seconds
        try:
            self._running = [self._start() for _ in range(self.processes)]
            while self._running and time.monotonic() < deadline:
                ready = wait([one.connection for one in self._running], timeout=0.25)
                for one in list(self._running):
                    if one.connection in ready:
                        yield from self._heard(one)
                    elif self._is_stuck(one):
                        yield from self._ended(one, f"it was ended after {self.longest:.0f} s")
            if self._ahead is None and self._running:
                yield Report("pytest", "failed", f"no process had collected the tests within {self.seconds:.0f} s")
            begun = [test for one in self._running for test in one.tests]
            for test in [*begun, *(test for unit in self._ahead or () for test in unit)]:
                yield Report(test, "not run")
            leave_by = time.monotonic() + _LEAVE
            for one in self._leaving:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(max(0.0, leave_by - time.monotonic()))
        finally:
            # At once, for to take down a CUDA context takes a while.
            with ThreadPoolExecutor() as pool:
                list(pool.map(end, [one.process for one in (*self._running, *self._leaving)]))

    def _start(self) -> _Process:
        ours, theirs = Pipe()
        command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno()), *_OPTIONS, *self.arguments]
        process = subprocess.Popen(
            command, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        return _Process(process, ours)

    def _heard(self, one: _Process) -> Iterator[Report]:
        """What a process says, or that it has ended."""
        try:
            kind, *said = one.connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(_LEAVE)  # else it is killed, and that would pass for the reason
            yield from self._ended(one, "")
            return
        if kind == "report":
            yield Report(*said)
        elif kind == "broken":
            yield from self._ended(one, said[0])
        else:
            if kind == "collected":
                one.collected = True
                if self._ahead is None:
                    yield from self._plan(*said)
            else:
                one.tests.popleft()
            one.since = time.monotonic()
            if not one.tests:
                self._deal(one)

    def _plan(self, tests: Sequence[tuple[str, str]], errors: Mapping[str, str]) -> Iterator[Report]:
        """The order of the tests, from (id, group) of each: those of one group run in one process, one after another."""
        yield from (Report(name, "failed", why) for name, why in errors.items())
        groups = dict(tests)
        yield from (Report(test, "failed", "there is no such test") for test in self.first if test not in groups)
        ordered = dict.fromkeys([*(test for test in self.first if test in groups), *groups])
        units: dict[str, list[str]] = {}
        for test in ordered:
            units.setdefault(groups[test] or test, []).append(test)
        self._ahead = deque(units.values())

    def _is_stuck(self, one: _Process) -> bool:
        """Whether it has been at a test, or at collecting them, for too long, and has not said otherwise meanwhile."""
        busy = bool(one.tests) or not one.collected
        return busy and time.monotonic() - one.since > self.longest and not one.connection.poll()

    def _deal(self, one: _Process) -> None:
        unit = self._ahead.popleft() if self._ahead else []
        one.tests.extend(unit)
        try:
            one.connection.send(unit)
        except OSError:  # it has ended meanwhile, which is heard next
            return
        if not unit:
            self._running.remove(one)
            self._leaving.append(one)

    def _ended(self, one: _Process, why: str) -> Iterator[Report]:
        """The test that a process was at has failed with it; another one takes the others."""
        end(one.process)
        self._running.remove(one)
        status = one.process.returncode
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if one.tests:
            yield Report(one.tests.popleft(), "failed", why or f"its process ended: {how}")
        elif not one.collected:
            yield Report("pytest", "failed", f"a process ended before it had collected tests: {why or how}")
            return
        if one.tests and self._ahead is not None:
            self._ahead.appendleft(list(one.tests))
        if self._ahead:
            self._running.append(self._start())


class Dealt:
    """A plugin of pytest: runs the tests that come through `connection`, and tells how they went."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.errors: dict[str, str] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.errors[f"collecting {report.nodeid}"] = report.longreprtext

    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid: item for item in session.items}
        marks = {name: item.get_closest_marker("xdist_group") for name, item in items.items()}
        groups = [(name, mark.args[0] if mark else "") for name, mark in marks.items()]
        self.connection.send(("collected", groups, self.errors))
        while unit := self.connection.recv():
            for name, following in zip(unit, [*unit[1:], None], strict=True):
                items[name].ihook.pytest_runtest_protocol(item=items[name], nextitem=items.get(following))
                self.connection.send(("done",))
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.connection.send(
                ("report", report.nodeid, report.outcome, report.longreprtext if report.failed else "")
            )

    def pytest_runtest_makereport(self, call: Any) -> None:
        """A kernel that breaks its process's CUDA context would fail every later test: another process takes those."""
        torch = sys.modules.get("torch")
        if call.excinfo is None or torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            why = "".join(traceback.format_exception(call.excinfo.value))
            self.connection.send(("broken", f"{why}and the GPU: {error}"))
            os._exit(_BROKEN)  # to take down a broken context may hang, or abort


class WithoutHypothesis:
    """A plugin of pytest: where hypothesis is absent, tests that draw from it are skipped, and the rest of their files run."""

    def pytest_configure(self) -> None:
        if importlib.util.find_spec("hypothesis") is None:
            import pytest

            absent = MagicMock()
            absent.given.return_value = pytest.mark.skip(reason="hypothesis is not installed")
            absent.settings.return_value = lambda test: test
            sys.modules["hypothesis"] = absent


def main() -> int:
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]  # tests see nothing of the benchmarks
    import pytest

    return int(pytest.main(sys.argv[2:], plugins=[Dealt(connection), WithoutHypothesis()]))


if __name__ == "__main__":
    sys.exit(main())
