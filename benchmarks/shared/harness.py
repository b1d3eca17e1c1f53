"""From a question ("which side is fastest at this operator and shape?") to rows of pytest-benchmark.

A `Group` is one question; its sides are the ways to compute the answer. All selected sides of a group are measured together
when the first of its rows runs, interleaved where a call is the question; each row then plays its own samples back to
pytest-benchmark through `ReplayClock`, and so has its usual statistics, table and JSON without having been timed alone.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from albert_fast.inspect.timing import Side, interleaved, paired_ratio
from shared import sides

# Largest relative error (Frobenius norm, worst output) with which a row still counts as having computed the same thing.
# torch's own bfloat16 gradients of a LayerNorm's vectors err by 0.034: it sums rows in bfloat16.
MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
# int16 is meant to be near-lossless. The error of int8 is a result to report; at 0.9 something else was computed.
MAX_RELATIVE_ERROR_OF_PRECISION = {
    sides.BF16: MAX_RELATIVE_ERROR[torch.bfloat16],
    sides.INT16: 5e-2,
    sides.INT8: 0.9,
    sides.FP8: 0.9,
}
WRONG = "wrong"  # figure of a row whose answers are wrong


@dataclass(frozen=True)
class Options:
    """The command line: see `pytest_addoption` in conftest.py."""

    quick: bool
    long: bool
    rounds: int
    threads: int
    device: torch.device
    peer_pythons: tuple[str, ...] = ()

    @property
    def pause(self) -> float:
        """Seconds between blocks, in which other engines' threads come to rest; none on a GPU and in a quick run."""
        return 0.25 if self.device.type == "cpu" and not self.quick else 0.0


class Group(Protocol):
    """One question: the same inputs for every side, the same answer expected from each."""

    key: str  # "<op>/<fwd, bwd or load>/<dtype>/<shape>"

    def sides(self) -> Sequence[str]:
        """The names of all sides."""

    def why_not(self, side: str) -> str | None:
        """Why `side` cannot take part here; None where it can."""

    def measure(self, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
        """Samples and figures of the sides `names`; one that fails leaves its exception and the others go on."""


class CallGroup(Group, Protocol):
    """A question about the time of one call."""

    dtype: torch.dtype
    device: torch.device
    warmup: int
    pause: bool  # whether engines with thread pools of their own take part
    flushes: int  # writes that empty a GPU's L2 cache before each call; see `interleaved`

    @property
    def operations(self) -> float:
        """Floating-point operations of one call."""

    @property
    def bytes_moved(self) -> float | None:
        """Bytes that one call must move at least; None where memory does not limit it."""

    def ours(self, side: str) -> str:
        """The side of ours that `side` is compared with."""

    def allowed(self, side: str) -> float:
        """The largest relative error with which `side` still counts as having computed the same thing."""

    def build(self, side: str) -> Side:
        """What to time; `call` returns what `expected` is compared with."""

    def expected(self) -> tuple[Tensor, ...]:
        """The float32 answer."""

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        """A side's answer, brought to the layout of `expected`."""

    def close(self) -> None:
        """Let go of inputs and engines that no other group uses."""

    def measure(self, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
        """All sides interleaved, outputs compared with `expected`."""
        return _measure_calls(self, names, options)


class Row(str):
    """A benchmark id, `<group key>/<side>`, with its group and side."""

    group: Group
    side: str

    def __new__(cls, group: Group, side: str) -> Row:
        row = super().__new__(cls, f"{group.key}/{side}")
        row.group, row.side = group, side
        return row


class ReplayClock:
    """A timer for pytest-benchmark on which each round lasts exactly as long as the sample that was loaded for it."""

    __name__ = "interleaved"  # the timer's name in the JSON

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


def _measure_calls(group: CallGroup, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
    failures: dict[str, Exception] = {}
    outputs: dict[str, Any] = {}
    built: dict[str, Side] = {}
    for name in names:
        try:
            built[name] = _keeping(outputs, name, group.build(name))
        except Exception as error:  # an engine's failure fails its own row only
            failures[name] = error
    samples: dict[str, list[float]] = {}
    if built:
        pause = options.pause if group.pause else 0.0
        samples = interleaved(
            built,
            options.rounds,
            warmup=group.warmup,
            pause=pause,
            device=group.device,
            flushes=group.flushes,
            failures=failures,
        )
    results: dict[str, Result | Exception] = dict(failures)
    expected = group.expected() if samples else ()
    answers = {name: partial(lambda side: group.comparable(outputs.pop(side)), name) for name in samples}
    for name, found in judged(samples, answers, expected, group.allowed, group.ours).items():
        if isinstance(found, Exception):
            results[name] = found
        else:
            figures = _figures(group, name, samples) | found | {"threads": options.threads}
            results[name] = Result(samples[name], figures)
    group.close()
    gc.collect()
    return results


def allowed_error(side: str, dtype: torch.dtype) -> float:
    """The largest relative error of a side whose floats are `dtype`."""
    return MAX_RELATIVE_ERROR_OF_PRECISION.get(sides.precision(side), MAX_RELATIVE_ERROR[dtype])


def judged(
    samples: Mapping[str, list[float]],
    answers: Mapping[str, Callable[[], Sequence[Tensor]]],
    expected: Sequence[Tensor],
    allowed: Callable[[str], float],
    ours: Callable[[str], str],
) -> dict[str, dict[str, Any] | Exception]:
    """The errors of each side's answer, and its time against the other sides whose answers are right.

    Args:
        samples: seconds of each side. answers: side -> a function that returns its answer. expected: the float32 answer.
        allowed: side -> the largest relative error. ours: side -> our side that it is compared with.

    Returns:
        Figures of each side, or the error that its row fails with.
    """
    found: dict[str, dict[str, Any] | Exception] = {}
    right: dict[str, list[float]] = {}
    for name, seconds in samples.items():
        try:
            errors = checked_errors(answers[name](), expected, name, allowed(name))
        except (AssertionError, ValueError) as error:
            found[name] = error
            continue
        found[name] = errors
        if not errors.get(WRONG):
            right[name] = seconds
    for name, errors_of in found.items():
        if isinstance(errors_of, dict):
            rivals = right if name in right else {name: samples[name]}
            errors_of |= comparison(name, rivals, ours(name))
    return found


def checked_errors(actual: Sequence[Tensor], expected: Sequence[Tensor], side: str, allowed: float) -> dict[str, Any]:
    """`compare`, for a side that may err by `allowed`.

    The integers of other engines may err by more: some saturate on CPUs without the instructions that they are made for.
    Their rows are marked as WRONG, keep their errors and take part in no comparison of times.

    Raises:
        AssertionError: one of our sides, or one that computes with floats, errs by more.
        ValueError: another number of outputs, or other shapes.
    """
    errors = compare(actual, expected)
    if errors["relative_error"] <= allowed:
        return errors
    if sides.engine(side) != sides.FAST and sides.precision(side) not in (sides.FLOAT, sides.BF16):
        return errors | {WRONG: True}
    raise AssertionError(f"{side} computes something else: {errors}")


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute error and largest relative one (norm of the difference over norm of `expected`) of any output.

    Both are infinite where an answer has NaN.

    Raises:
        ValueError: another number of outputs, or other shapes.
    """
    shapes = [tuple(t.shape) for t in actual], [tuple(t.shape) for t in expected]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs of shapes {shapes[0]} instead of {shapes[1]}")
    largest = relative = 0.0
    for a, e in zip(actual, expected, strict=True):
        difference = a.double() - e.double()
        if difference.isnan().any():
            return {"max_abs_error": math.inf, "relative_error": math.inf}
        largest = max(largest, difference.abs().max().item())
        relative = max(relative, (difference.norm() / e.double().norm().clamp_min(1e-30)).item())
    return {"max_abs_error": largest, "relative_error": relative}


def _keeping(outputs: dict[str, Any], name: str, side: Side) -> Side:
    """`side`, keeping its last output in `outputs`: the calls that are timed are the ones compared."""

    def call(*arguments: object) -> None:
        outputs[name] = side.call(*arguments)

    return Side(call, side.prepare)


def _figures(group: CallGroup, name: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    median = statistics.median(samples[name])
    figures: dict[str, Any] = {"id": f"{group.key}/{name}", "milliseconds": median * 1e3}
    figures["operations"] = group.operations
    figures["gflops"] = group.operations / median / 1e9
    if group.bytes_moved is not None:
        figures["gbytes_per_second"] = group.bytes_moved / median / 1e9
    return figures


def comparison(name: str, samples: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    """A row's time against our side of its precision, and against the fastest of its rivals."""
    figures: dict[str, Any] = {"ours": name == ours, "precision": sides.precision(name)}
    if ours in samples:
        figures["times_ours"] = paired_ratio(samples[ours], samples[name])
    if name == ours != sides.FAST and sides.FAST in samples:
        figures["ratio_to_own_float"] = paired_ratio(samples[name], samples[sides.FAST])
    rivals = sides.rivals(name, list(samples))
    if rivals:
        best = min(rivals, key=lambda rival: statistics.median(samples[rival]))
        figures["best_other"] = best
        figures["ratio_to_best_other"] = paired_ratio(samples[name], samples[best])
    return figures
