"""Reads the rows of a file or pipe in windows, in constant memory and without waiting for a slow pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType

from .line_reader import LineReader
from .text_files import Columns, Format, Record, RowReader


class InputError(ValueError):
    """A row that cannot be read. `before` holds the rows of the same window that came before it."""

    def __init__(self, message: str, before: list[Record]) -> None:
        super().__init__(message)
        self.before = before


class RowWindows:
    """Reads windows of rows; a context manager that closes the input.

    Args:
        lines: the open input.
        encoding_hint: added to the error message where bytes cannot be decoded.

    Attributes:
        count: rows that were returned so far.
        digest: checksum of the bytes up to the last of these rows.

    Raises:
        ValueError: columns that do not go with the format.
    """

    def __init__(self, lines: LineReader, format: Format, columns: Columns, encoding_hint: str = "") -> None:
        self._lines, self._encoding_hint = lines, encoding_hint
        self.format = format
        self._rows = RowReader(lines, format, columns)
        self.count = 0
        self.digest = ""

    def __enter__(self) -> RowWindows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    @property
    def name(self) -> str:
        """The input's name in error messages."""
        return self._lines.name

    @property
    def size(self) -> int | None:
        """Bytes of the whole input; None where they are not known."""
        return self._lines.size

    @property
    def consumed(self) -> int:
        """Bytes of the rows that were returned."""
        return self._lines.consumed

    def skip(self, count: int) -> None:
        """Passes over `count` rows. EOFError where there are fewer."""
        for _ in range(count):
            if self._rows.read() is None:
                raise EOFError(f"{self.name} ends after {self.count} lines; {count} were done before")
            self._count()

    def window(self, size: int, patience: float | None = 0.02) -> list[Record]:
        """Returns up to `size` rows, and [] at the end of the input.

        Args:
            patience: seconds to wait for more rows of a pipe or terminal after the first row; None: no limit.

        Raises:
            InputError: a row that cannot be read.
        """
        rows: list[Record] = []
        deadline = None
        try:
            while len(rows) < size and (row := self._rows.read(deadline)) is not None:
                if deadline is None and patience is not None:
                    deadline = time.monotonic() + patience
                rows.append(row)
                self._count()
        except ValueError as error:
            hint = self._encoding_hint if isinstance(error.__cause__, UnicodeDecodeError) else ""
            raise InputError(f"{error}{hint}", rows) from error
        return rows

    def windows(self, size: int, patience: float | None = 0.02) -> Iterator[list[Record]]:
        """Yields the remaining rows in windows of up to `size`.

        Args:
            patience: as for `window`. With None a window ends at every multiple of `size` rows of the input, so reading that
                continues after an interruption gets the same windows as reading without one.

        Raises:
            InputError: a row that cannot be read; the rows before it were yielded.
        """
        while True:
            try:
                rows = self.window(size if patience is not None else size - self.count % size, patience)
            except InputError as error:
                if error.before:
                    yield error.before
                raise
            if not rows:
                return
            yield rows

    def _count(self) -> None:
        self.count += 1
        self.digest = self._lines.checksum()  # taken now: the reader looks ahead at blank lines and at bad ones
