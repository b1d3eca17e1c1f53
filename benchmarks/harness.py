"""From a question ("which side is fastest at this operator and shape?") to rows of pytest-benchmark.

A `Group` is one question; its sides answer it. All selected sides of a group are measured together, interleaved, when
the first of its rows runs; each row then plays its own samples back to pytest-benchmark through `ReplayClock`, and so
has its usual statistics, table and JSON without ever having been timed alone.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from albert_fast.testing.timing import Side, interleaved, paired_ratio

# Largest relative error (Frobenius norm, worst output) with which a row still counts as having computed the same thing.
# torch's own bfloat16 gradients of a LayerNorm's vectors come to 0.034: it adds up rows in bfloat16.
MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Options:
    """The command line: see `pytest_addoption` in conftest.py."""

    quick: bool
    long: bool
    rounds: int
    threads: int
    device: torch.device

    @property
    def pause(self) -> float:
        """Seconds between blocks; a GPU has no threads of other engines to wait for."""
        return 0.25 if self.device.type == "cpu" else 0.0


class Group(Protocol):
    """One question: the same inputs for every side, the same answer expected from each."""

    key: str  # "<op>/<fwd, bwd or full>/<dtype>/<shape>"
    dtype: torch.dtype
    warmup: int
    pause: bool  # whether engines with thread pools of their own take part
    operations: float  # floating-point operations of one call
    bytes_moved: float | None  # least traffic with memory of one call, where that is what limits it

    def sides(self) -> Sequence[str]:
        """Ours first."""

    def why_not(self, side: str) -> str | None:
        """Why `side` cannot take part here; None where it can."""

    def build(self, side: str) -> Side:
        """What to time; `call` returns what `expected` is compared with."""

    def expected(self) -> tuple[Tensor, ...]:
        """The float32 answer."""

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        """A side's answer, brought to the layout of `expected`."""

    def close(self) -> None:
        """Let go of inputs and engines that no other group uses."""


class Row(str):
    """A benchmark id, `<group key>/<side>`, that knows its group."""

    group: Group
    side: str

    def __new__(cls, group: Group, side: str) -> Row:
        row = super().__new__(cls, f"{group.key}/{side}")
        row.group, row.side = group, side
        return row


class ReplayClock:
    """A timer for pytest-benchmark on which each round lasts exactly as long as the sample that was loaded for it."""

    __name__ = "interleaved"  # as which the JSON names the timer

    def __init__(self) -> None:
        self._now = 0.0
        self._steps: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        self._now = 0.0
        self._steps = iter([step for sample in seconds for step in (0.0, sample)])

    def __call__(self) -> float:
        self._now += next(self._steps, 0.0)
        return self._now


@dataclass(frozen=True)
class Result:
    """One side's samples (seconds per call) and what its row says beside them."""

    seconds: list[float]
    extra_info: dict[str, Any]


def measure(group: Group, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
    """Measure the sides `names` of `group` interleaved; a side that fails leaves its exception and the others go on."""
    failures: dict[str, Exception] = {}
    outputs: dict[str, Any] = {}
    sides: dict[str, Side] = {}
    for name in names:
        try:
            sides[name] = _keeping(outputs, name, group.build(name))
        except Exception as error:  # whatever another engine raises belongs to its own row
            failures[name] = error
    samples: dict[str, list[float]] = {}
    if sides:
        pause = options.pause if group.pause else 0.0
        samples = interleaved(
            sides, options.rounds, warmup=group.warmup, pause=pause, device=options.device, failures=failures
        )
    results: dict[str, Result | Exception] = dict(failures)
    expected = group.expected() if samples else ()
    for name, seconds in samples.items():
        errors = compare(group.comparable(outputs.pop(name)), expected)
        if not errors["relative_error"] <= MAX_RELATIVE_ERROR[group.dtype]:
            results[name] = AssertionError(f"{group.key}/{name} computes something else: {errors}")
        else:
            results[name] = Result(seconds, _figures(group, name, samples) | errors | {"threads": options.threads})
    group.close()
    gc.collect()
    return results


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute error and largest relative one (norm of the difference over norm of `expected`) of any output.

    Raises:
        ValueError: another number of outputs, or other shapes.
    """
    shapes = [tuple(t.shape) for t in actual], [tuple(t.shape) for t in expected]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs of shapes {shapes[0]} instead of {shapes[1]}")
    largest = relative = 0.0
    for a, e in zip(actual, expected, strict=True):
        difference = a.double() - e.double()
        largest = max(largest, difference.abs().max().item())
        relative = max(relative, (difference.norm() / e.double().norm().clamp_min(1e-30)).item())
    return {"max_abs_error": largest, "relative_error": relative}


def _keeping(outputs: dict[str, Any], name: str, side: Side) -> Side:
    """`side`, with its last output kept for the comparison: the very calls that are timed are the ones compared."""

    def call(*arguments: object) -> None:
        outputs[name] = side.call(*arguments)

    return Side(call, side.prepare)


def _figures(group: Group, name: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    median = statistics.median(samples[name])
    ours = group.sides()[0]
    figures: dict[str, Any] = {"id": f"{group.key}/{name}", "ours": name == ours}
    figures["milliseconds"] = median * 1e3
    figures["operations"] = group.operations
    figures["gflops"] = group.operations / median / 1e9
    if group.bytes_moved is not None:
        figures["gbytes_per_second"] = group.bytes_moved / median / 1e9
    if ours in samples:
        figures["times_ours"] = paired_ratio(samples[ours], samples[name])
    others = {other: statistics.median(seconds) for other, seconds in samples.items() if other != name}
    if others:
        best = min(others, key=others.__getitem__)
        figures["best_other"] = best
        figures["ratio_to_best_other"] = paired_ratio(samples[name], samples[best])
    return figures
