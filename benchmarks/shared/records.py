"""Reads the rows of a run from its JSON, and formats figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.sides import FAST, FLOAT


@dataclass(frozen=True)
class Record:
    """One row: the id's parts, and the figures stored beside its samples (see harness.py)."""

    op: str
    direction: str
    dtype: str
    shape: str
    side: str
    figures: Mapping[str, Any]

    @classmethod
    def of(cls, extra_info: Mapping[str, Any]) -> Record:
        op, direction, dtype, shape, side = extra_info["id"].split("/")
        return cls(op, direction, dtype, shape, side, extra_info)

    @property
    def group(self) -> tuple[str, str, str, str]:
        return self.op, self.direction, self.dtype, self.shape

    @property
    def milliseconds(self) -> float:
        return float(self.figures["milliseconds"])

    @property
    def label(self) -> str:
        """The side's name in plots: our backends of operators are albert_fast."""
        return self.side if not self.ours or self.side.startswith(FAST) else FAST

    @property
    def precision(self) -> str:
        return str(self.figures.get("precision", FLOAT))  # older runs, all of floats, do not name it

    @property
    def right(self) -> bool:
        """Whether the side's answers are right; the times of wrong ones are not compared."""
        return not self.figures.get("wrong", False)

    @property
    def ours(self) -> bool:
        return bool(self.figures["ours"])


def grouped(extra_infos: Iterable[Mapping[str, Any]]) -> list[list[Record]]:
    """The records of each question together, in the order in which they were asked."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for extra_info in extra_infos:
        record = Record.of(extra_info)
        groups.setdefault(record.group, []).append(record)
    return list(groups.values())


def of_precision(groups: Iterable[Iterable[Record]], precision: str) -> list[list[Record]]:
    """The groups with their sides of one precision alone."""
    chosen = ([record for record in group if record.precision == precision] for group in groups)
    return [group for group in chosen if group]


def digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def time_text(milliseconds: float) -> str:
    return f"{digits(milliseconds)} ms" if milliseconds >= 1 else f"{digits(milliseconds * 1e3)} \N{MICRO SIGN}s"


def ratio_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
