"""Reads the rows of tables, of saved or loaded Hugging Face data sets and of lists, by the names or numbers of their columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from ..text.saved_datasets import one_split, open_saved_dataset
from ..text.text_files import (
    LABEL_COLUMN,
    PAIR_COLUMN,
    TEXT_COLUMNS,
    Columns,
    Record,
    read_values,
    table_format,
)

# A file, the folder of a saved data set, a data set, or a list of dictionaries.
Source = Any
NAMED = Columns()


def name_of(source: Source) -> str:
    """How messages call a source."""
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, tuple):
        return " and ".join(map(str, source))
    rows = f" of {len(source)} rows" if isinstance(source, Sized) else ""
    return f"the {type(source).__name__}{rows}"


def is_data_set(source: Source) -> bool:
    """Whether a source is a data set or a list of rows, in memory or saved by `Dataset.save_to_disk`; False for a file."""
    if isinstance(source, (str, Path)):
        return Path(source).is_dir()
    return True


def rows_of(source: Source, columns: Columns = NAMED) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields the place of every row, for error messages, and its values by name.

    Class numbers of a Hugging Face data set become the names of the classes, in lists too.

    Args:
        columns: if they are numbers, the file has no header, and its values come by number.

    Raises:
        ValueError: a file that cannot be read, see `read_values`; a folder that holds no data set, or several splits; numbers of
            columns that have names. ImportError: a saved data set, without the library `datasets`. TypeError: an object
            without rows.
    """
    number = next((one for one in (columns.text, columns.pair, columns.label) if isinstance(one, int)), None)
    if not is_data_set(source):
        for line, values in read_values(source, NAMED if number is None else columns):
            yield f"{source}, line {line}", values
        return
    name = name_of(source)
    if number is not None:
        raise ValueError(
            f"{name}: column {number} is a number, for tables without a header; a data set's columns have names"
        )
    rows = open_saved_dataset(source) if isinstance(source, (str, Path)) else one_split(source, name)
    names = _class_names(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"{name}, row {number}: expected a dictionary of columns, got {type(row).__name__}")
        yield f"{name}, row {number}", {key: _named(value, names.get(key)) for key, value in row.items()}


def _class_names(rows: Any) -> dict[str, list[str]]:
    """Column -> the names of its classes, where a data set states them."""
    found = {}
    for column, feature in dict(getattr(rows, "features", None) or {}).items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(names := getattr(inner, "names", None), list):
            found[column] = names
    return found


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_named(part, names) for part in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def columns_of(source: Source) -> list[str]:
    """The names of the columns of a table with a header, or of a data set's first row; [] where there are none."""
    if isinstance(source, (str, Path)) and not Path(source).is_dir() and table_format(source) is None:
        return []
    rows = rows_of(source)
    try:
        return [str(name) for name in next(rows, ("", {}))[1]]
    finally:
        rows.close()  # type: ignore[attr-defined]


def columns_for(given: str | int | None, *usual: str) -> tuple[str | int, ...]:
    """The columns to look for: the one that was given, else the usual ones."""
    return usual if given is None else (given,)


def value_of(values: Mapping[Any, Any], names: Sequence[str | int], where: str, what: str) -> Any:
    """The value of the first of these columns that a row has.

    Raises:
        ValueError: it has none of them; the message says `where`.
    """
    for name in names:
        if name in values:
            return values[name]
    raise ValueError(f"{where}: no column {' or '.join(map(repr, names))} for {what}; it has {list(values)}")


def text_value(values: Mapping[Any, Any], names: Sequence[str | int], where: str, what: str) -> str:
    """`value_of` for a text.

    Raises:
        ValueError: no such column, a value that is not a string, or half of a surrogate pair in it.
    """
    value = value_of(values, names, where, what)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {what} must be a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start + 1} of {what} is half a surrogate pair") from error
    return value


def labelled_records(source: Source, columns: Columns) -> tuple[list[Record], list[str]]:
    """The text, second text and label of every row, with its place.

    Raises:
        ValueError: a column that is missing, or a text that is no string.
    """
    records: list[Record] = []
    places: list[str] = []
    texts, labels = columns_for(columns.text, *TEXT_COLUMNS), columns_for(columns.label, LABEL_COLUMN)
    for where, values in rows_of(source, columns):
        if columns.text is None and sum(name in values for name in TEXT_COLUMNS) > 1:
            raise ValueError(f"{where}: which column is the text? It has {list(values)}; name one (text_column)")
        paired = columns.pair is not None or PAIR_COLUMN in values
        second = (
            text_value(values, columns_for(columns.pair, PAIR_COLUMN), where, "the second text") if paired else None
        )
        label = value_of(values, labels, where, "the label")
        records.append(Record(len(records) + 1, text_value(values, texts, where, "the text"), second, label))
        places.append(where)
    return records, places


__all__ = [
    "Source",
    "columns_for",
    "columns_of",
    "is_data_set",
    "labelled_records",
    "name_of",
    "rows_of",
    "text_value",
    "value_of",
]
