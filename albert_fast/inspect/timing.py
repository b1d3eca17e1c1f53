"""Times several sides of a comparison in turns, so that a slow moment of the machine slows all of them alike.

One round visits every side in turn, A B C A B C ..., and takes one sample of each: the mean of a block of calls.
Between two blocks lies a pause, because the worker threads of other engines (OpenMP, ONNX Runtime, oneTBB) spin for a
while after their last call and would take the processor from the next side.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_L2_MULTIPLE = 4  # the flushed buffer in units of the L2 cache: enough under any replacement policy
_MOST_CALLS = 200  # of a block on a GPU, where the writes in between take longer than a short call
_SHORT_CALL = 0.1  # seconds; shorter calls are woken by an untimed one after a pause, longer ones wake themselves


class Side(NamedTuple):
    """What is timed: `call(prepare())`, or `call()` where nothing is prepared; the time of `prepare` does not count."""

    call: Callable[..., object]
    prepare: Callable[[], object] | None = None

    def arguments(self) -> tuple[object, ...]:
        return () if self.prepare is None else (self.prepare(),)


def interleaved(
    sides: Mapping[str, Side],
    rounds: int = 7,
    *,
    warmup: int = 2,
    pause: float = 0.25,
    block_seconds: float = 0.05,
    device: torch.device | str = "cpu",
    flushes: int = 1,
    failures: dict[str, Exception] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each side, one number a round; `result[a][i]` and `result[b][i]` are neighbours in time.

    Args:
        sides: name -> what to call. Order is kept within every round.
        rounds: samples of each side.
        warmup: calls of each side beforehand, not counted; the last one decides how many calls fill a block.
        pause: seconds of sleep before every block.
        block_seconds: a block repeats calls until it lasts about this long; a longer call is a block of its own.
        device: where the calls run. On a GPU every call is timed by events, behind a write that empties the L2 cache.
        flushes: such writes before every call. The GPU is busy with them while the call is being launched: what takes longer
            to launch (a gradient's way through Python, say) than they last is timed with the gaps in between.
        failures: where given, a side that raises while it warms up is noted here and left out of the result.

    Raises:
        ValueError: no side, or a count that is not positive.
    """
    if not sides or rounds < 1 or warmup < 1:
        raise ValueError(f"interleaved: needs sides and positive counts, got {len(sides)} sides, {rounds=}, {warmup=}")
    on_gpu = torch.device(device).type == "cuda"
    clock = _cuda_clock(torch.device(device), flushes) if on_gpu else _cpu_clock
    one_call = {}
    for name, side in sides.items():
        try:
            for _ in range(warmup):
                one_call[name] = clock(side, 1)
        except Exception as error:
            if failures is None:
                raise
            failures[name] = error
            one_call.pop(name, None)
    samples: dict[str, list[float]] = {name: [] for name in one_call}
    for _ in range(rounds):
        for name, estimate in one_call.items():
            time.sleep(pause)
            if estimate < _SHORT_CALL:
                clock(sides[name], 1)
            calls = max(1, math.ceil(block_seconds / estimate))
            with _garbage_collection_off():
                samples[name].append(clock(sides[name], min(calls, _MOST_CALLS) if on_gpu else calls))
    return samples


def paired_ratio(seconds: Sequence[float], other_seconds: Sequence[float]) -> float:
    """How many times longer the other side took: the median over rounds of the ratio of two neighbouring samples."""
    return statistics.median(other / own for own, other in zip(seconds, other_seconds, strict=True))


def _cpu_clock(side: Side, calls: int) -> float:
    elapsed = 0.0
    for _ in range(calls):
        arguments = side.arguments()
        start = time.perf_counter()
        side.call(*arguments)
        elapsed += time.perf_counter() - start
    return elapsed / calls


def _cuda_clock(device: torch.device, flushes: int) -> Callable[[Side, int], float]:
    properties: Any = torch.cuda.get_device_properties(device)
    flushed = torch.empty(_L2_MULTIPLE * properties.L2_cache_size, dtype=torch.uint8, device=device)

    def clock(side: Side, calls: int) -> float:
        events = []
        for _ in range(calls):
            arguments = side.arguments()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                flushed.fill_(1)
            start.record()
            side.call(*arguments)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3

    return clock


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
