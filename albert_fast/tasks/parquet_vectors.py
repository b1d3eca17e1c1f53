"""The Parquet form of a file of vectors: columns id and label, where the input has them, and embedding.

A Parquet file ends with its table of contents, so that unfinished work cannot be one. Until all rows are there each window
is a line of JSON, with the ids and labels, and the bytes of its vectors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from ..text.parquet_files import require_pyarrow

if TYPE_CHECKING:
    import numpy as np

    from ..text.text_files import Record

_BESIDE = ("id", "label")
# Up to here a float64 holds every integer.
_EXACT = 2**53


class ParquetForm:
    """A .parquet file with a column embedding of lists of `width` numbers.

    ids and labels are columns of integers where all of them are and fit 64 bits, of floats where all are numbers that a
    float64 holds exactly, else of text; other JSON values are written as JSON.

    Raises:
        ImportError: pyarrow is not installed.
    """

    converts = True

    def __init__(self, width: int, dtype: str) -> None:
        import numpy as np

        self._arrow = require_pyarrow()
        self.width, self.dtype = width, np.dtype(dtype)

    def head(self, rows: int) -> bytes:
        return b""

    def body(self, vectors: np.ndarray, records: list[Record]) -> bytes:
        note = {"rows": len(records), "id": [one.key for one in records], "label": [one.label for one in records]}
        return json.dumps(note).encode() + b"\n" + vectors.astype(self.dtype, copy=False).tobytes()

    def convert(self, rows: BinaryIO, out: BinaryIO) -> None:
        """Writes the Parquet file from the windows in `rows`, one at a time: a group of rows for each."""
        arrow = self._arrow
        numbers = {name: _number_type(note[name] for note, _ in self._windows(rows)) for name in _BESIDE}
        known = {"integer": arrow.int64(), "float": arrow.float64(), "text": arrow.string()}
        fields = [(name, known[kind]) for name, kind in numbers.items() if kind is not None]
        element = arrow.from_numpy_dtype(self.dtype)
        schema = arrow.schema([*fields, ("embedding", arrow.list_(element, self.width))])
        with arrow.parquet.ParquetWriter(out, schema) as writer:
            for note, vectors in self._windows(rows):
                flat = arrow.array(vectors.reshape(-1), element)
                columns = [arrow.array([_cell(value, kind) for value in note[name]], kind) for name, kind in fields]
                columns.append(arrow.FixedSizeListArray.from_arrays(flat, self.width))
                writer.write_table(arrow.Table.from_arrays(columns, schema=schema))

    def _windows(self, rows: BinaryIO) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        import numpy as np

        rows.seek(0)
        while line := rows.readline():
            note = json.loads(line)
            content = rows.read(note["rows"] * self.width * self.dtype.itemsize)
            yield note, np.frombuffer(content, self.dtype).reshape(note["rows"], self.width)


def _number_type(windows: Iterator[list[Any]]) -> str | None:
    """ "integer", "float" or "text", whichever holds all values; None where there are none."""
    kinds: set[type] = set()
    least = most = 0
    for values in windows:
        kinds.update(map(type, values))
        integers = [value for value in values if type(value) is int]
        least, most = min([least, *integers]), max([most, *integers])
    kinds.discard(type(None))
    if not kinds:
        return None
    if kinds == {int}:
        return "integer" if least >= -(2**63) and most < 2**63 else "text"
    return "float" if kinds <= {int, float} and least >= -_EXACT and most <= _EXACT else "text"


def _cell(value: Any, kind: Any) -> Any:
    if value is None or str(kind) != "string" or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
