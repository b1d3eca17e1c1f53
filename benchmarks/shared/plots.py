"""Plots of one run: a panel for each question, a bar for each side.

A bar's length and its label are the same figure: the side's time over that of `albert_fast`, neighbouring samples paired
(`times_ours` of the row). Only the sides of `albert_fast` show milliseconds. The footer says what the run was measured on.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.records import Record, of_precision, ratio_text, time_text
from shared.sides import FLOAT, PRECISIONS

_OURS, _OTHERS, _TEXT = "#d1495b", "#9aa5b1", "#333333"
_BAR_INCHES, _PANEL_INCHES = 0.24, 3.3
_GAP = 0.7  # between the bars of two precisions, in bars


def plot_model(groups: Sequence[Sequence[Record]], path: Path, machine: str, heading: str = "ALBERT") -> None:
    """A panel for each batch; a bar for each side whose answers are right, those of one precision together."""
    groups = [right for group in groups if (right := [record for record in group if record.right])]
    columns = min(4, len(groups))
    cells: list[Sequence[Record] | None] = [*groups, *[None] * (-len(groups) % columns)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    _plot(rows, lambda record: record.shape, heading, path, machine)


def plot_operators(groups: Sequence[Sequence[Record]], path: Path, machine: str) -> None:
    """A row for each operator, a column for each direction and dtype; each panel shows the largest shape."""
    largest: dict[tuple[str, str, str], Sequence[Record]] = {}
    for group in groups:
        key = group[0].group[:3]
        size = group[0].figures["operations"]
        if key not in largest or size >= largest[key][0].figures["operations"]:
            largest[key] = group
    kinds = list(dict.fromkeys(key[1:] for key in largest))
    rows = [[largest.get((op, *kind)) for kind in kinds] for op in dict.fromkeys(key[0] for key in largest)]
    _plot(
        rows,
        lambda record: f"{record.op}\n{record.direction} {record.dtype} {record.shape}",
        "Operators",
        path,
        machine,
    )


def _plot(
    rows: Sequence[Sequence[Sequence[Record] | None]], title_of: Any, heading: str, path: Path, machine: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [max(_height(group) for group in row if group is not None) for row in rows]
    columns = max(map(len, rows))
    width = columns * _PANEL_INCHES
    heading = textwrap.fill(
        f"{heading}: shorter is faster; 2.00x takes twice the time of albert_fast in its precision", round(10 * width)
    )
    footer = textwrap.fill(machine, round(15 * width))
    lines = heading.count("\n") + 0.7 * footer.count("\n")
    size = (width, sum(_BAR_INCHES * height + 0.6 for height in heights) + 0.75 + 0.2 * lines)
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=size, squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, group in zip(axes.flat, (group for row in rows for group in row), strict=True):
        axis.axis("off")
        if group is not None:
            _panel(axis, group, title_of(group[0]))
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, color=_TEXT)
    figure.supxlabel(footer, x=0.01, ha="left", fontsize=8, color=_TEXT)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _height(group: Sequence[Record]) -> float:
    """A panel's height in bars."""
    return len(group) + _GAP * (len({record.precision for record in group}) - 1)


def _panel(axis: Any, group: Sequence[Record], title: str) -> None:
    """Horizontal bars in units of our float time: side, and how many times ours in its precision, or our time."""
    parts = [part for precision in PRECISIONS for part in of_precision([group], precision)]
    lengths = [[_length(record, part, group) for record in part] for part in parts]
    longest = max(length for part in lengths for length in part)
    place = 0.0
    for part, part_lengths in zip(parts, lengths, strict=True):
        for record, length in zip(part, part_lengths, strict=True):
            axis.barh(place, length, height=0.8, color=_OURS if record.ours else _OTHERS)
            factor = None if record.ours else record.figures.get("times_ours")
            text = time_text(record.milliseconds) if factor is None else f"{ratio_text(factor)}x"
            axis.text(-0.03 * longest, place, record.label, ha="right", va="center", fontsize=8, color=_TEXT)
            axis.text(length + 0.03 * longest, place, text, ha="left", va="center", fontsize=8, color=_TEXT)
            place += 1
        place += _GAP
    axis.set_xlim(-0.9 * longest, 1.6 * longest)
    axis.set_ylim(_height(group) - 0.4, -0.6)
    axis.set_title(title, fontsize=9, fontweight="bold", color=_TEXT)


def _length(record: Record, part: Sequence[Record], group: Sequence[Record]) -> float:
    """The side's time over ours in floats, by the paired ratios of the rows where the run has them."""
    ours = next((other for other in part if other.ours), None)
    floats = next((other for other in group if other.ours and other.precision == FLOAT), None)
    if ours is None or floats is None:  # without ours to compare with: the medians themselves
        return record.milliseconds
    own = ours.figures.get("ratio_to_own_float") or floats.milliseconds / ours.milliseconds
    return float(record.figures.get("times_ours") or record.milliseconds / ours.milliseconds) / own
