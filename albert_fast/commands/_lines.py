"""The texts that a command works on, in windows: in constant memory, and a pipe is not waited for."""

from __future__ import annotations

import codecs
import io
import os
import time
from pathlib import PurePath
from types import TracebackType

from ..text.line_reader import LineReader, open_lines
from ..text.text_files import Columns, Format, Record, RowReader, table_format
from ._errors import UsageError, warn
from ._options import InputFormat

# Endings of data files: a name with spaces in it that ends like this is a file, not a text.
_FILE_ENDINGS = (".txt", ".text", ".tsv", ".csv", ".json", ".ndjson", ".gz", ".md", ".xml", ".parquet", ".xlsx", ".zip")


class InputError(ValueError):
    """A line that cannot be read; `before` holds the rows of the same window that could."""

    def __init__(self, message: str, before: list[Record]) -> None:
        super().__init__(message)
        self.before = before


class Lines:
    """Reads windows of rows from a path, or from standard input for "-".

    format: auto: by the ending of the path, see `albert_fast.text.text_files`; all else is plain lines.
    may_be_text: a path of no file that is words is itself the text.
    """

    def __init__(
        self,
        path: str,
        format: InputFormat = InputFormat.auto,
        encoding: str = "utf-8",
        replace_bad_bytes: bool = False,
        columns: Columns | None = None,
        may_be_text: bool = False,
    ) -> None:
        encoding, columns = _checked_encoding(encoding), columns or Columns()
        given = may_be_text and path != "-" and not os.path.exists(path) and is_text(path)
        if format is not InputFormat.auto:
            self.format = Format(format.value)
        else:
            self.format = (None if given else table_format(path)) or Format.text
        if self.format is Format.text and columns != Columns():
            raise UsageError(
                f"{'standard input' if path == '-' else path} is read as lines of text, which have no columns; "
                "--input-format csv, tsv or jsonl reads a table"
            )
        errors = "replace" if replace_bad_bytes else "strict"
        self._hint = "" if given else "; --encoding names another encoding, --replace-bad-bytes reads on"
        if given:
            if len(path.split()) == 1:  # it may be the mistyped name of a file after all
                warn(f"there is no file {path}; it is read as text")
            self._lines = LineReader(io.BytesIO(os.fsencode(path)), "the text", errors=errors)
        else:
            self._lines = open_lines(path, encoding, errors)
        try:
            self._rows = RowReader(self._lines, self.format, columns)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.count = 0  # rows that were given out
        self.digest = ""  # checksum of the bytes up to the last of them

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    @property
    def name(self) -> str:
        return self._lines.name

    @property
    def size(self) -> int | None:
        """Bytes of the whole input; None where that is not known."""
        return self._lines.size

    @property
    def consumed(self) -> int:
        """Bytes of the rows that were given out."""
        return self._lines.consumed

    def skip(self, count: int) -> None:
        """Passes over `count` rows. EOFError where there are fewer."""
        for _ in range(count):
            if self._rows.read() is None:
                raise EOFError(f"{self.name} ends after {self.count} lines; {count} were done before")
            self._count()

    def window(self, size: int, patience: float | None = 0.02) -> list[Record]:
        """Up to `size` rows; on a pipe or a terminal those that arrive within `patience` seconds of the first (None:
        however long it takes). [] at the end. InputError at a line that is not what it should be.
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
            hint = self._hint if isinstance(error.__cause__, UnicodeDecodeError) else ""
            raise InputError(f"{error}{hint}", rows) from error
        return rows

    def _count(self) -> None:
        self.count += 1
        self.digest = self._lines.checksum()  # taken here: the reader looks further, at blank lines or at a bad one


def given_text(text: str, name: str) -> str:
    """A text that is an argument. ValueError where its bytes are no text; Python keeps them as half surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start + 1} cannot be read; the terminal's encoding is UTF-8"
        ) from None
    return text


def is_text(argument: str) -> bool:
    """Whether an argument that is no existing file is meant as a text: words, not the mistyped name of a file."""
    words = argument.split()
    if not words:
        return False
    ending = PurePath(words[-1]).suffix.lower()
    folder, separator, _ = argument.rpartition(os.sep)
    if len(words) > 1:
        return not ending.startswith(_FILE_ENDINGS) and not (separator and os.path.isdir(folder or os.sep))
    return not separator and "." not in argument.rstrip(".")


def _checked_encoding(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        fits = "a\r\n".encode(name) == b"a\r\n"
    except (LookupError, TypeError):
        raise UsageError(f"--encoding {encoding}: Python knows no text encoding of this name") from None
    if not fits:
        raise UsageError(
            f"--encoding {encoding}: lines are found by their line feed byte, which this encoding does not have"
        )
    return name


__all__ = ["InputError", "Lines", "Record", "given_text"]
