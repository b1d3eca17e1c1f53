"""Chooses among several tile sizes of a kernel: the first, or with ALBERT_FAST_TUNE=1 the fastest.

Without the variable no clock and no file is read: tile sizes, and so the roundings, are the same on every run. With it,
every candidate is timed once for each key that is new on this chip and this version of Triton, and the winner is stored in
`$XDG_CACHE_HOME/albert_fast/tiles.json` (by default in ~/.cache) as {"chip, Triton": {key: tiles}}.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from ._capture import CAPTURE, capturing

Tiles = dict[str, int]
Launch = Callable[[Tiles], Any]
# Returns the milliseconds that a call takes.
Timer = Callable[[Callable[[], Any]], float]


def choose(
    kernel: str, key: Callable[[], str], candidates: Sequence[Tiles], launch: Launch, timer: Timer | None = None
) -> Tiles:
    """The tiles to launch with: `candidates[0]`, or the fastest candidate if tuning is asked for.

    Args:
        kernel: its name.
        key: returns what else the choice depends on, such as dtype and sizes; called only if tuning is asked for.
        candidates: keywords of the kernel, best guess first; the compile check compiles every one of them.
        launch: starts the kernel with such keywords; it may be called often, and overwrites its outputs each time.
        timer: used instead of `time_on_gpu`.
    """
    if len(candidates) == 1 or not asked_for():
        return candidates[0]
    return _tuner(torch.cuda.get_device_name()).choose(f"{kernel} {key()}", candidates, launch, timer)


def known(kernel: str, key: str) -> Tiles | None:
    """What was chosen for the key, in this process or an earlier one; None if nothing was, or if tuning is not asked for."""
    return _tuner(torch.cuda.get_device_name()).known(f"{kernel} {key}") if asked_for() else None


@functools.cache
def asked_for() -> bool:
    """Whether ALBERT_FAST_TUNE=1 was set when the first kernel started; Triton's interpreter is never timed.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("ALBERT_FAST_TUNE", "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"ALBERT_FAST_TUNE={value!r}: must be 1 to time kernels on this GPU, or 0")
    return value == "1" and not triton.knobs.runtime.interpret


@functools.cache
def _tuner(chip: str) -> Tuner:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Tuner(cache / "albert_fast" / "tiles.json", f"{chip}, Triton {triton.__version__}", time_on_gpu)


def time_on_gpu(call: Callable[[], Any]) -> float:
    """Median milliseconds of `call` between two events, the L2 cache emptied before each."""
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=50, return_mode="median")


def time_in_graph(call: Callable[[], Any]) -> float:
    """Median milliseconds of `call` within a replayed CUDA graph, so that many launches do not wait for the CPU."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, rep=50, return_mode="median")


class Tuner:
    """The winners on one machine, in memory and in a file that other machines and processes share.

    Args:
        path: the file. If it is absent, broken or read-only, winners are kept in memory only.
        machine: the file's key for this machine.
        timer: measures a call.
    """

    def __init__(self, path: Path, machine: str, timer: Timer) -> None:
        self.path, self.machine, self.timer = path, machine, timer
        self._winners = _winners(_read(path), machine)

    def known(self, key: str) -> Tiles | None:
        return self._winners.get(key)

    def choose(self, key: str, candidates: Sequence[Tiles], launch: Launch, timer: Timer | None = None) -> Tiles:
        """The known winner of `key` if it is still a candidate; otherwise the fastest, timed now and remembered."""
        if (winner := self._winner_among(key, candidates)) is not None:
            return winner
        if capturing():  # timing waits for the GPU, which a capture forbids
            return candidates[0]
        with CAPTURE:  # timing waits for the whole device, which would end another thread's capture
            if (winner := self._winner_among(key, candidates)) is None:
                times = [self._time(launch, tiles, timer or self.timer) for tiles in candidates]
                self._winners[key] = winner = candidates[times.index(min(times))]
                self._keep(key, winner)
        return winner

    def _winner_among(self, key: str, candidates: Sequence[Tiles]) -> Tiles | None:
        winner = self._winners.get(key)
        return winner if winner in candidates else None

    def _time(self, launch: Launch, tiles: Tiles, timer: Timer) -> float:
        try:
            return timer(lambda: launch(tiles))
        except OutOfResources:  # this chip has less shared memory than those of the compile check
            return float("inf")

    def _keep(self, key: str, winner: Tiles) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                # Other processes may have added winners since: read, add and replace, one process at a time.
                fcntl.flock(lock, fcntl.LOCK_EX)
                content = _read(self.path)
                content[self.machine] = {**_winners(content, self.machine), key: winner}
                with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                    json.dump(content, file, indent=1, sort_keys=True)
                os.replace(file.name, self.path)
        except OSError as error:
            warnings.warn(f"albert_fast: tuned tile sizes are not kept for later runs: {error}", stacklevel=2)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # absent, unreadable or not JSON: the same as an empty file
        return {}
    return content if isinstance(content, dict) else {}


def _winners(content: dict[str, Any], machine: str) -> dict[str, Tiles]:
    winners = content.get(machine)
    return dict(winners) if isinstance(winners, dict) else {}
