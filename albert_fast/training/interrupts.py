"""Handles Ctrl-C while a model trains: the current step is finished first, so that the saved state is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """While the block runs, the first Ctrl-C only sets `asked`; the second one interrupts at once.

    Outside the main thread, and where the program has its own handler, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._installed = False

    def __enter__(self) -> Interrupts:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._installed = False

    def check(self, where: str) -> None:
        """Raises KeyboardInterrupt with the text `where` if Ctrl-C was pressed."""
        if self.asked:
            raise KeyboardInterrupt(where)

    @staticmethod
    @contextmanager
    def located(where: str) -> Iterator[None]:
        """Gives `where` as text to a KeyboardInterrupt that has none, such as one while the dev set is measured."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(str(interrupt) or where) from None

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


__all__ = ["Interrupts"]
