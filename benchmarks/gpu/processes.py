"""Ends a process and everything that it started, with /proc alone: a GPU's machine may have no psutil."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


def end(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """Kill `process`, which must lead a group, and its descendants; return when all are gone, or after `seconds`.

    A killed process keeps a GPU's memory until it is gone, so the next measurement must wait for it. Children that lead
    groups of their own are found while their parents still run.
    """
    groups, deadline = {process.pid}, time.monotonic() + seconds
    while True:
        alive = _alive()
        groups |= {alive[pid][1] for pid in _descendants(process.pid, alive)}
        left = groups & {group for _, group in alive.values()}
        if not left or time.monotonic() > deadline:
            break
        for group in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        time.sleep(0.01)
    process.wait()


def _alive() -> dict[int, tuple[int, int]]:
    """Running processes: id -> the ids of its parent and of its group."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if state not in "ZX":
                found[int(stat.parent.name)] = int(parent), int(group)
    return found


def _descendants(pid: int, alive: dict[int, tuple[int, int]]) -> list[int]:
    """The children of `pid`, their children, and so on."""
    found = [pid]
    for one in found:
        found += [child for child, (parent, _) in alive.items() if parent == one]
    return found[1:]
