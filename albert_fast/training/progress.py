"""Shows how far a pass over a data set is, with loss, texts per second and time left: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import cache
from typing import Any

# Seconds between two lines where there is no terminal.
LINE_SECONDS = 30.0
Show = Callable[[float, int], None]


@contextmanager
def epoch_progress(data: Iterable[Any], label: str, shown: bool | str) -> Iterator[tuple[Iterable[Any], Show]]:
    """Yields the batches of `data`, and a function to call after each with the sum of the losses and their number, 0 without any.

    Args:
        label: what is done, such as "train".
        shown: False: nothing is shown; a str takes the place of the label, such as "epoch 2 of 5".
    """
    if not shown:
        yield data, lambda total, count: None
        return
    meter = _Meter(len(data) if isinstance(data, Sized) else None, shown if isinstance(shown, str) else label)
    bar_class = tqdm_or_none() if sys.stderr.isatty() else None
    if bar_class is None:
        yield meter.counted(data), meter.line_now_and_then
        return
    with bar_class(
        meter.counted(data), total=meter.steps, desc=meter.label, unit="batch", leave=False, dynamic_ncols=True
    ) as bar:
        yield bar, lambda total, count: bar.set_postfix_str(meter.figures(total, count), refresh=False)


class _Meter:
    """Counts steps and texts. steps: of the whole pass; None where it is not known."""

    def __init__(self, steps: int | None, label: str) -> None:
        self.steps, self.label = steps, label
        self.step, self.texts, self.begin = 0, 0, time.monotonic()
        self.said = self.begin

    def counted(self, data: Iterable[Any]) -> Iterator[Any]:
        for batch in data:
            self.step += 1
            self.texts += _rows(batch)
            yield batch

    def figures(self, total: float, count: int) -> str:
        """The mean loss so far, where there is one, and texts per second."""
        rate = self.texts / max(time.monotonic() - self.begin, 1e-6)
        loss = f"loss {total / count:.4f}, " if count else ""
        return f"{loss}{rate:.{0 if rate >= 10 else 1}f} texts/s"

    def line_now_and_then(self, total: float, count: int) -> None:
        now = time.monotonic()
        if now - self.said < LINE_SECONDS:
            return
        self.said = now
        line = f"{self.label}: step {self.step}"
        if self.steps is not None:
            line += f" of {self.steps}"
        line += f", {self.figures(total, count)}"
        if self.steps is not None:
            left = (now - self.begin) / self.step * (self.steps - self.step)
            line += f", {int(left // 60)}:{int(left % 60):02d} left"
        print(line, file=sys.stderr, flush=True)


def _rows(batch: Any) -> int:
    """The number of texts of a batch, a dict of tensors whose first dimension is theirs; 1 for anything else."""
    first = next(iter(batch.values()), None) if isinstance(batch, dict) else None
    return len(first) if isinstance(first, Sized) else 1


@cache
def tqdm_or_none() -> Any:
    """The class of tqdm's bars; None, with one warning, where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        warnings.warn("no progress bar: tqdm is not installed (pip install 'albert-fast[train]')", stacklevel=6)
        return None
    return tqdm


__all__ = ["Show", "epoch_progress", "tqdm_or_none"]
