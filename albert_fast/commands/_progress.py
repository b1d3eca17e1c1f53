"""A progress bar on standard error. It shows only on a terminal that does not show the answers as well."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ._lines import Lines

Item = TypeVar("Item")


def counted(items: Iterable[Item], label: str, unit: str) -> Iterator[Item]:
    """Yields the items and shows how many were taken; for commands that answer on standard output."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=label, file=sys.stderr, disable=_hidden(answers_on_stdout=True), unit=unit))


def _hidden(answers_on_stdout: bool) -> bool | None:
    """tqdm's `disable`: True hides the bar, None shows it only on a terminal."""
    return True if answers_on_stdout and sys.stdout.isatty() else None


class Progress:
    """Shows how many bytes of a file are done, and texts per second; where the size is not known, texts alone."""

    def __init__(self, lines: Lines, label: str, answers_on_stdout: bool) -> None:
        from tqdm import tqdm

        self._lines = lines
        unit: dict[str, Any] = {"unit": " texts"} if lines.size is None else {"unit": "B", "unit_scale": True}
        self._before, self._start = lines.count, time.monotonic()
        self._bar = tqdm(
            total=lines.size,
            desc=label,
            file=sys.stderr,
            disable=_hidden(answers_on_stdout),
            initial=self._done(),
            **unit,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self) -> None:
        self._bar.update(self._done() - self._bar.n)
        if self._lines.size is not None:
            rate = (self._lines.count - self._before) / max(time.monotonic() - self._start, 1e-3)
            self._bar.set_postfix_str(f"{self._lines.count} texts, {rate:.{0 if rate >= 10 else 1}f} texts/s")

    def _done(self) -> int:
        if self._lines.size is None:
            return self._lines.count
        return min(self._lines.consumed, self._lines.size)
