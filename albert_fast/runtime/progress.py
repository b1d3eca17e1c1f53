"""A bar on standard error for work that takes seconds to minutes and that nobody asked to watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Work that is done sooner shows no bar.
DELAY_SECONDS = 2.0


@contextmanager
def progress_of_long_work(label: str, total: int) -> Iterator[Callable[[], object]]:
    """Gives a function to call after each of `total` parts. The bar shows on a terminal only, and only where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(desc=label, total=total, disable=None, delay=DELAY_SECONDS, leave=False) as bar:
        yield bar.update


__all__ = ["progress_of_long_work"]
