"""Compares models on the same input: how far apart their outputs are, and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """One side of a comparison.

    Attributes:
        seconds: median of a call. speedup: how many times faster than the first side.
        error: largest difference from the float32 reference. relative_error: the same, divided by its largest output.
    """

    side: str
    seconds: float
    speedup: float
    error: float
    relative_error: float


def compare(
    sides: Mapping[str, Callable[[], torch.Tensor]], expected: torch.Tensor, rounds: int, device: torch.device
) -> list[Row]:
    """Times the sides in turns and compares their outputs with `expected`, which has the same shape."""
    import torch

    from ..inspect.timing import Side, interleaved, paired_ratio

    with torch.inference_mode():
        outputs = {name: side().float() for name, side in sides.items()}
        seconds = interleaved({name: Side(side) for name, side in sides.items()}, rounds, device=device)
    first = next(iter(sides))
    scale = expected.abs().max().item() or 1.0
    rows = []
    for name, output in outputs.items():
        error = (output - expected).abs().max().item()
        speedup = paired_ratio(seconds[name], seconds[first])
        rows.append(Row(name, median(seconds[name]), speedup, error, error / scale))
    return rows


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A text table; the first column is aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
