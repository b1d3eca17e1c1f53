"""Reads Parquet files as JSON lines, batch by batch, so that rows, errors and checksums are those of a .jsonl file.

It needs pyarrow: pip install 'albert-fast[parquet]'.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from .line_reader import LONGEST_LINE, LineReader

# Rows that are decoded at a time.
_ROWS = 1024


def require_pyarrow() -> Any:
    """Imports pyarrow with its Parquet module; the ImportError says which extra installs it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'albert-fast[parquet]'") from error
    return pyarrow


def open_parquet(
    path: str | Path,
    wanted: Sequence[str] | None,
    texts: Sequence[str] = (),
    beside: Sequence[str] = (),
    longest: int = LONGEST_LINE,
) -> LineReader:
    """Opens a Parquet file whose rows come as lines, {"column": value, ...}. Line n is row n.

    Args:
        wanted: columns that must be there; None: all columns are read.
        texts: columns of which at least one must be there, unless it is empty.
        beside: columns that are read where they are there. No other column is decoded.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: no Parquet file, or no such column; lists those that it has. OSError: see `open`.
    """
    if str(path) == "-":
        raise ValueError("a Parquet file is not read from standard input: its table of contents is at its end")
    arrow = require_pyarrow()
    with open(path, "rb"):
        pass  # Python's own error for a missing file or folder
    try:
        file = arrow.parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except arrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    if wanted is None:
        wanted = names
    missing = next((repr(name) for name in wanted if name not in names), None)
    if missing is None and texts and not set(texts).intersection(names):
        missing = " or ".join(map(repr, texts))
    if missing is not None:
        raise ValueError(f"{path}: has no column {missing}, only {names}; --text-column names the text's")
    chosen = [name for name in names if name in (*wanted, *texts, *beside)]
    stream = cast(BinaryIO, _JsonLines(arrow, file, chosen, str(path)))
    return LineReader(stream, str(path), longest=longest)


class _JsonLines(io.BufferedIOBase):
    """A byte stream of JSON lines from the rows of a Parquet file."""

    def __init__(self, arrow: Any, file: Any, columns: list[str], name: str) -> None:
        super().__init__()
        self._file, self._name, self._errors = file, name, arrow.ArrowException
        self._batches: Iterator[Any] = file.iter_batches(_ROWS, columns=columns)

    def read1(self, size: int = -1, /) -> bytes:
        """The lines of the next rows, which may be more than `size` bytes; b"" at the end."""
        try:
            batch = next((batch for batch in self._batches if batch.num_rows), None)
            rows = [] if batch is None else batch.to_pylist()
        except (self._errors, OSError) as error:
            raise ValueError(f"{self._name}: damaged: {error}") from error
        return "".join(json.dumps(row, ensure_ascii=True, default=self._plain) + "\n" for row in rows).encode()

    def _plain(self, value: Any) -> str:
        """A value that JSON does not have, such as a date, as text."""
        if isinstance(value, bytes):
            raise ValueError(f"{self._name}: a column holds bytes; text needs the type string")
        return str(value)

    def close(self) -> None:
        self._file.close()
        super().close()
