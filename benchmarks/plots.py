"""Plots of a run: a panel a question, a bar a side, labelled where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from records import Record, of_precision, time_text
from sides import PRECISIONS

_OURS, _OTHERS, _TEXT = "#d1495b", "#9aa5b1", "#333333"
_BAR_INCHES, _PANEL_INCHES = 0.24, 3.3
_GAP = 0.7  # between the bars of two precisions, in bars


def plot_model(groups: Sequence[Sequence[Record]], path: Path) -> None:
    """A panel a batch; a bar a side, those of one precision together."""
    columns = min(4, len(groups))
    cells: list[Sequence[Record] | None] = [*groups, *[None] * (-len(groups) % columns)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    _plot(rows, lambda record: record.shape, "ALBERT", path)


def plot_operators(groups: Sequence[Sequence[Record]], path: Path) -> None:
    """A line an operator, a column a direction and dtype; each panel shows the largest shape."""
    largest: dict[tuple[str, str, str], Sequence[Record]] = {}
    for group in groups:
        key = group[0].group[:3]
        size = group[0].figures["operations"]
        if key not in largest or size >= largest[key][0].figures["operations"]:
            largest[key] = group
    kinds = list(dict.fromkeys(key[1:] for key in largest))
    rows = [[largest.get((op, *kind)) for kind in kinds] for op in dict.fromkeys(key[0] for key in largest)]
    _plot(rows, lambda record: f"{record.op}\n{record.direction} {record.dtype} {record.shape}", "Operators", path)


def _plot(rows: Sequence[Sequence[Sequence[Record] | None]], title_of: Any, heading: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [max(_height(group) for group in row if group is not None) for row in rows]
    columns = max(map(len, rows))
    size = (columns * _PANEL_INCHES, sum(_BAR_INCHES * height + 0.6 for height in heights) + 0.45)
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=size, squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, group in zip(axes.flat, (group for row in rows for group in row), strict=True):
        axis.axis("off")
        if group is not None:
            _panel(axis, group, title_of(group[0]))
    heading += ": shorter is faster; the factor is a side's time over ours in its precision"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, color=_TEXT)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _height(group: Sequence[Record]) -> float:
    """In bars."""
    return len(group) + _GAP * (len({record.precision for record in group}) - 1)


def _panel(axis: Any, group: Sequence[Record], title: str) -> None:
    """Horizontal bars, labelled where they stand: side, time and how many times ours."""
    longest = max(record.milliseconds for record in group)
    parts = [part for precision in PRECISIONS for part in of_precision([group], precision)]
    bars = [(part_number, record) for part_number, part in enumerate(parts) for record in part]
    for bar, (part_number, record) in enumerate(bars):
        place = bar + _GAP * part_number
        length = record.milliseconds
        axis.barh(place, length, height=0.8, color=_OURS if record.ours else _OTHERS)
        factor = None if record.ours else record.figures.get("times_ours")
        text = time_text(record.milliseconds) + ("" if factor is None else f"  {factor:.2f}x")
        axis.text(-0.03 * longest, place, record.label, ha="right", va="center", fontsize=8, color=_TEXT)
        axis.text(length + 0.03 * longest, place, text, ha="left", va="center", fontsize=8, color=_TEXT)
    axis.set_xlim(-0.75 * longest, 1.9 * longest)
    axis.set_ylim(_height(group) - 0.4, -0.6)
    axis.set_title(title, fontsize=9, fontweight="bold", color=_TEXT)
