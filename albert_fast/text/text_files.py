"""Reads texts, with their labels and ids, from plain lines, CSV, TSV and JSON lines, also as .gz, and from Parquet.

`read_table("train.csv", Columns(label="label"))` yields a `Record` for each row. Training, evaluation and the command
line use the same rules:

| format | a row | columns |
|---|---|---|
| csv | comma-separated, quoted with "; a quoted text may hold line ends | named in the first row, or numbered from 0 |
| tsv | tab-separated, no quoting | the same |
| jsonl | an object on each line | its keys |
| parquet | a row | its columns; line n of an error is row n |
| text | a line | none: the line is the text |

A row that cannot be read raises a ValueError that names file, line and column, after the rows before it were returned.
"""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from .line_reader import LONGEST_LINE, LineReader, open_lines
from .parquet_files import open_parquet

TEXT_COLUMNS = ("text", "sentence", "review")
PAIR_COLUMN = "text_pair"
LABEL_COLUMN = "label"
KEY_COLUMN = "id"
# For files that are read whole: a document may be long, but a quote that is never closed must not swallow the file.
LONGEST_ROW = 1 << 26
# Message of Python's csv reader -> what is wrong with the file.
_CSV_ERRORS = {
    "unexpected end of data": "a quote that opens in this row is never closed",
    "',' expected after '\"'": "a closing quote is followed by text; a quote within a quoted text is written twice",
}


class Format(str, Enum):
    text = "text"
    csv = "csv"
    tsv = "tsv"
    jsonl = "jsonl"
    parquet = "parquet"


_ENDINGS = {
    ".csv": Format.csv,
    ".tsv": Format.tsv,
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".parquet": Format.parquet,
}


@dataclass(frozen=True)
class Columns:
    """Which columns to read: each by its name, or by its number from 0 in a table without a header.

    Attributes:
        text: default: text, sentence or review.
        pair: the second text; default: text_pair, if there is one.
        label: default: no label is read.
    """

    text: str | int | None = None
    pair: str | int | None = None
    label: str | int | None = None


@dataclass
class Record:
    """One row, or one plain line.

    Attributes:
        line: the number of its first line in the file, from 1.
        label: as in the file: a str; from JSON also a number, a bool or a list of numbers.
        key: the column "id"; from JSON of any type.
    """

    line: int
    text: str
    pair: str | None = None
    label: Any = None
    key: Any = None


def table_format(path: str | Path) -> Format | None:
    """The format that the ending of a name stands for, without .gz; None if it is not a table's."""
    if str(path).lower().endswith(".parquet.gz"):  # Parquet packs its columns itself, and is not read from a stream
        return None
    return _ENDINGS.get(Path(str(path).lower().removesuffix(".gz")).suffix)


def open_table(
    path: str | Path,
    format: Format,
    columns: Columns,
    encoding: str = "utf-8",
    errors: str = "strict",
    longest: int = LONGEST_LINE,
) -> tuple[LineReader, Format]:
    """Opens a file in a format; returns its lines and the format that these have: a Parquet file's rows come as JSON lines.

    Raises:
        OSError: see `open`. ValueError, ImportError: see `open_parquet`.
    """
    if format is not Format.parquet:
        return open_lines(path, encoding, errors, longest), format
    _refuse_numbers(path, columns)
    wanted = [str(name) for name in (columns.text, columns.pair, columns.label) if name is not None]
    texts = () if columns.text is not None else TEXT_COLUMNS
    return open_parquet(path, wanted, texts, (PAIR_COLUMN, KEY_COLUMN), longest), Format.jsonl


def _refuse_numbers(path: str | Path, columns: Columns) -> None:
    given = (columns.text, columns.pair, columns.label)
    if (number := next((name for name in given if isinstance(name, int)), None)) is not None:
        raise ValueError(f"{path}: column {number} is a number; the columns of a Parquet file have names")


def read_table(path: str | Path, columns: Columns) -> Iterator[Record]:
    """Yields every row of a table, without blank lines. ValueError: see the top of this file. OSError: see `open`."""
    lines, format = open_table(path, _format_of(path), columns, longest=LONGEST_ROW)
    try:
        reader = RowReader(lines, format, columns, skip_blank=True)
        while (row := reader.read()) is not None:
            yield row
    finally:
        lines.close()


def read_values(path: str | Path, columns: Columns) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Yields the line and all values by name of every row of a table, JSON values as they are.

    Args:
        columns: names, which a table with a header must have; or numbers, for a table without one: its values come by number.

    Raises:
        ValueError: see the top of this file. OSError: see `open`.
    """
    format = _format_of(path)
    packed = format is Format.parquet
    if packed:
        _refuse_numbers(path, columns)
    lines = open_parquet(path, None, longest=LONGEST_ROW) if packed else open_lines(path, longest=LONGEST_ROW)
    try:
        reader = _ValueReader(lines, Format.jsonl if packed else format, columns, skip_blank=True)
        while (row := reader.read()) is not None:
            yield row.line, row.label
    finally:
        lines.close()


def _format_of(path: str | Path) -> Format:
    format = table_format(path)
    if format is None:
        raise ValueError(
            f"{path}: cannot tell the format from the name; expected .tsv, .csv or .jsonl (also with .gz), or .parquet"
        )
    return format


class RowReader:
    """Reads the rows of an open file, one at a time.

    Args:
        skip_blank: ignore blank lines of a table. If False, a blank line before a row is an error, because later answers
            would not be on the lines of their rows. Blank lines at the end are always ignored.
    """

    def __init__(self, lines: LineReader, format: Format, columns: Columns, *, skip_blank: bool = False) -> None:
        if format is Format.text and columns != Columns():
            raise ValueError(f"{lines.name} is read as lines of text, which have no columns; csv, tsv and jsonl have")
        numbers = [name for name in (columns.text, columns.pair, columns.label) if isinstance(name, int)]
        names = [name for name in (columns.text, columns.pair, columns.label) if isinstance(name, str)]
        if numbers and (format is Format.jsonl or names):
            rest = f", not names such as {names[0]!r}" if names else "; JSON lines have names"
            raise ValueError(f"{lines.name}: column {numbers[0]} is a number, for tables without a header{rest}")
        self._lines, self._format, self._skip_blank = lines, format, skip_blank
        self._columns = columns
        self._headless = bool(numbers)
        if self._headless and columns.text is None:
            raise ValueError(f"{lines.name}: a table without a header needs the number of its text column too")
        self._header: list[str] | None = None
        self._width: int | None = None  # number of fields in the first row; all rows must have as many
        self._text: str | int | None = columns.text  # if it is not given, it is found in the first row
        self._blank: int | None = None  # number of the first blank line since the last row
        self._line = 0  # number of the first line of the current row
        self._pending: str | None = None
        if format is Format.csv:
            # Python's limit of 131,072 characters in a field is global in the process; it is raised, never lowered.
            csv.field_size_limit(max(csv.field_size_limit(), lines.longest))
            self._csv = csv.reader(self._csv_lines(), strict=True)

    def read(self, deadline: float | None = None) -> Record | None:
        """Returns the next row; None at the end, or if none begins before `deadline` (see `LineReader.read`)."""
        if self._format is Format.text:
            return self._plain_line(deadline)
        while (line := self._lines.read(deadline)) is not None:
            self._line = line.number
            if line.dropped:
                self._fail(f"longer than {self._lines.longest} bytes")
            text = line.text.removesuffix("\r")
            if not (text.strip() if self._format is Format.jsonl else text):
                self._blank = self._blank or line.number
                continue
            if self._blank and not self._skip_blank:
                self._line = self._blank
                self._fail("empty; expected " + ('{"text": ...}' if self._format is Format.jsonl else "a row"))
            self._blank = None
            if self._format is Format.jsonl:
                return self._json_row(text)
            fields = self._csv_fields(line.text) if self._format is Format.csv else self._tsv_fields(text)
            first = self._width is None
            if first:
                self._width = len(fields)
                if not self._headless:
                    self._read_header(fields)
                    continue
            return self._table_row(fields, first)
        return None

    def _fail(self, problem: str, column: str | int | None = None) -> NoReturn:
        where = f"{self._lines.name}, line {self._line}" + ("" if column is None else f", column {column!r}")
        raise ValueError(f"{where}: {problem}")

    def _plain_line(self, deadline: float | None) -> Record | None:
        line = self._lines.read(deadline)
        if line is None:
            return None
        self._line = line.number
        if line.dropped:
            where = f"{self._lines.name}, line {line.number}"
            warnings.warn(
                f"{where}: {line.dropped} bytes beyond the first {self._lines.longest} are left out", stacklevel=2
            )
        return Record(line.number, self._checked_text(line.text.removesuffix("\r")))

    def _checked_text(self, value: Any, column: str | int | None = None) -> str:
        if not isinstance(value, str):
            self._fail(f"expected a string, found {_name_of(value)}", column)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            self._fail(f"character {error.start + 1} of the text, {half}, is half a surrogate pair", column)
        return value

    # CSV and TSV

    def _csv_lines(self) -> Iterator[str]:
        """Gives the csv reader the pending line, then the lines in which a quoted text continues."""
        size = 0
        while True:
            text, self._pending = self._pending, None
            if text is not None:
                size = 0
            else:
                line = self._lines.read()
                if line is None:
                    return
                text = line.text
                if line.dropped:
                    size = self._lines.longest
            size += len(text)
            if "\0" in text:
                self._fail("holds a NUL byte")
            if size > self._lines.longest:
                self._fail(
                    f"the row that begins here is longer than {self._lines.longest} bytes; is a quote not closed?"
                )
            yield text + "\n"

    def _csv_fields(self, text: str) -> list[str]:
        self._pending = text
        try:
            return next(self._csv)
        except csv.Error as error:
            problem = _CSV_ERRORS.get(str(error), str(error))
            if str(error).startswith("new-line character"):
                problem = "a carriage return within the row; rows end with a line feed, or with both"
            self._fail(problem)

    def _tsv_fields(self, text: str) -> list[str]:
        if "\0" in text:
            self._fail("holds a NUL byte")
        if "\r" in text:
            self._fail("a carriage return within the row; rows end with a line feed, or with both")
        return text.split("\t")

    def _read_header(self, fields: Sequence[str]) -> None:
        header = [name.strip() for name in fields]
        twice = next((name for name in header if name and header.count(name) > 1), None)
        if twice is not None:
            self._fail(f"the header names it twice: {header}", twice)
        wanted = [name for name in (self._columns.text, self._columns.pair, self._columns.label) if name is not None]
        missing = next((name for name in wanted if name not in header), None)
        if missing is not None:
            self._fail(f"the header has no such column, only {header}", missing)
        self._header = header
        self._find_text(header)

    def _find_text(self, names: Sequence[str]) -> None:
        """Finds the text column by its usual names if none was asked for."""
        if self._text is not None:
            return
        found = [name for name in TEXT_COLUMNS if name in names]
        if len(found) > 1:
            self._fail(f"which column is the text, {' or '.join(map(repr, found))}? Name one (--text-column)")
        if not found and self._format is Format.jsonl:
            self._fail(f'no field "text"; it has {list(names)}; --text-column names another')
        if not found:
            self._fail(
                f"the header has no column {' or '.join(map(repr, TEXT_COLUMNS))}, only {list(names)}; name the text's "
                "(--text-column), or number it from 0 where there is no header"
            )
        self._text = found[0]

    def _table_values(self, fields: list[str]) -> Mapping[Any, str]:
        """The fields of a row by the names of their columns; by their numbers in a table without a header."""
        if len(fields) != self._width:
            others = "the first row" if self._header is None else f"the header {self._header}"
            hint = "a text with a comma needs quotes" if self._format is Format.csv else "a text cannot hold a tab"
            count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            self._fail(f"{count}, but {others} has {self._width}; {hint}")
        if fields == self._header:
            self._fail("the header again")
        return dict(enumerate(fields) if self._header is None else zip(self._header, fields, strict=True))

    def _table_row(self, fields: list[str], first: bool) -> Record:
        values = self._table_values(fields)
        text, pair, label = self._text, self._columns.pair, self._columns.label
        for column in (text, pair, label):
            if isinstance(column, int) and column >= len(fields):
                self._fail(f"the row has {len(fields)} columns, numbered from 0", column)
        if first and label is not None and self._like_a_header(values, text, label):
            self._fail("a header; name the columns instead of numbering them")
        if pair is None and PAIR_COLUMN in values:
            pair = PAIR_COLUMN
        if label is not None and not values[label].strip():
            self._fail("empty; every row needs a label", label)
        key = values.get(KEY_COLUMN)
        return Record(
            self._line,
            self._checked_text(values[text], text),
            None if pair is None else self._checked_text(values[pair], pair),
            None if label is None else self._checked_text(values[label], label).strip(),
            None if key is None else self._checked_text(key, KEY_COLUMN),
        )

    def _like_a_header(self, values: Mapping[Any, str], text: Any, label: Any) -> bool:
        return values[text].strip() in TEXT_COLUMNS and values[label].strip() == LABEL_COLUMN

    # JSON lines

    def _json_values(self, content: str) -> Mapping[Any, Any]:
        try:
            values = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_distinct_keys)
        except (ValueError, RecursionError) as error:
            self._fail(f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}")
        if not isinstance(values, dict):
            self._fail(f'expected {{"text": ...}}, found {_name_of(values)}')
        return values

    def _json_row(self, content: str) -> Record:
        values = self._json_values(content)
        self._find_text(list(values))
        text, pair, label = self._text, self._columns.pair, self._columns.label
        for column in (text, pair, label):
            if column is not None and column not in values:
                self._fail(f'no field "{column}"; it has {list(values)}')
        if pair is None and PAIR_COLUMN in values:
            pair = PAIR_COLUMN
        return Record(
            self._line,
            self._checked_text(values[text], text),
            None if pair is None else self._checked_text(values[pair], pair),
            None if label is None else self._json_label(values[label], label),
            self._json_key(values.get(KEY_COLUMN)),
        )

    def _json_label(self, value: Any, column: str | int) -> Any:
        """Checks that a label is a string, a number, a bool or a list of numbers."""
        if isinstance(value, str):
            if not value.strip():
                self._fail("empty; every row needs a label", column)
            return self._checked_text(value, column).strip()
        parts = value if isinstance(value, list) and value else [value]
        if not all(isinstance(part, int) or (isinstance(part, float) and math.isfinite(part)) for part in parts):
            self._fail(f"expected a string, a finite number or a list of them, found {_name_of(value)}", column)
        return value

    def _json_key(self, value: Any) -> Any:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # as it will be written
        except (ValueError, RecursionError) as error:
            self._fail(f"cannot be given back as JSON: {error}", KEY_COLUMN)
        return value


class _ValueReader(RowReader):
    """Gives all values of a row as the label of its record, whatever the columns are named."""

    def _find_text(self, names: Sequence[str]) -> None:
        """No column has to be there."""

    def _table_row(self, fields: list[str], first: bool) -> Record:
        values = self._table_values(fields)
        text, label = self._columns.text, self._columns.label
        if first and text in values and label in values and self._like_a_header(values, text, label):
            self._fail("a header; name the columns instead of numbering them")
        return Record(self._line, "", label=dict(values))

    def _json_row(self, content: str) -> Record:
        return Record(self._line, "", label=self._json_values(content))


def _name_of(value: Any) -> str:
    """JSON's name for the type of a value."""
    names = {type(None): "null", bool: "a bool", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values
