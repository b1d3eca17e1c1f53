"""Reads pairs of texts from two files of which line n of one belongs to line n of the other, such as translations."""

from __future__ import annotations

from pathlib import Path

from .line_reader import open_lines
from .text_files import LONGEST_ROW, Columns, Format, RowReader


def read_aligned(first: str | Path, second: str | Path) -> list[tuple[str, str]]:
    """The pairs of lines of two files, which may end in .gz. Pairs without a word on either side are left out.

    Raises:
        ValueError: the files have different numbers of lines, or no pair; a line that cannot be read: names file and line.
            OSError: see `open`.
    """
    firsts, seconds = _lines(first), _lines(second)
    if len(firsts) != len(seconds):
        raise ValueError(
            f"{first} has {len(firsts)} lines and {second} {len(seconds)}: line n of one must belong to line n of the other"
        )
    pairs = [pair for pair in zip(firsts, seconds, strict=True) if pair[0].strip() and pair[1].strip()]
    if not pairs:
        raise ValueError(f"{first} and {second}: no pair of lines with words on both sides")
    return pairs


def _lines(path: str | Path) -> list[str]:
    lines = open_lines(path, longest=LONGEST_ROW)
    try:
        reader = RowReader(lines, Format.text, Columns())
        texts = []
        while (row := reader.read()) is not None:
            texts.append(row.text)
        return texts
    finally:
        lines.close()
