"""Opens the input of a command: a file, standard input, or a text that is itself the argument."""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, TypeVar

from ..text.line_reader import LineReader
from ..text.text_files import Columns, Format, Record, open_table, table_format
from ..text.windows import InputError, RowWindows
from ._errors import UsageError, warn
from ._options import Input, InputFormat

# Endings of data files: an argument with spaces that ends like this is the name of a file, not a text.
_FILE_ENDINGS = (".txt", ".text", ".tsv", ".csv", ".json", ".ndjson", ".gz", ".md", ".xml", ".parquet", ".xlsx", ".zip")

Item = TypeVar("Item")


class Lines(RowWindows):
    """Windows of rows from a path, or from standard input for "-".

    Args:
        input: format, encoding, and what happens to bytes that are no text. Format auto: by the ending of the path, see
            `albert_fast.text.text_files`; any other ending means plain lines.
        may_be_text: if the path is no file but words, these are the text.
    """

    def __init__(
        self,
        path: str,
        input: Input | None = None,
        columns: Columns | None = None,
        may_be_text: bool = False,
    ) -> None:
        input, columns = input or Input(), columns or Columns()
        encoding = _checked_encoding(input.encoding)
        is_given = may_be_text and path != "-" and not os.path.exists(path) and is_text(path)
        if input.input_format is not InputFormat.auto:
            format = Format(input.input_format.value)
        else:
            format = (None if is_given else table_format(path)) or Format.text
        if format is Format.text and columns != Columns():
            raise UsageError(
                f"{'standard input' if path == '-' else path} is read as lines of text, which have no columns; "
                "--input-format csv, tsv, jsonl or parquet reads a table"
            )
        errors = "replace" if input.replace_bad_bytes else "strict"
        hint = "" if is_given else "; --encoding names another encoding, --replace-bad-bytes reads on"
        if is_given:
            if len(path.split()) == 1:  # it may be a mistyped file name
                warn(f"there is no file {path}; it is read as text")
            lines = LineReader(io.BytesIO(os.fsencode(path)), "the text", errors=errors)
        else:
            lines, format = open_table(path, format, columns, encoding, errors)
        try:
            super().__init__(lines, format, columns, hint)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def __enter__(self) -> Lines:
        return self


def parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of up to `size` items. Where an item cannot be read, those before it come first, then its ValueError."""
    part: list[Item] = []
    try:
        for item in items:
            part.append(item)
            if len(part) == size:
                yield part
                part = []
    except ValueError:
        if part:
            yield part
        raise
    if part:
        yield part


def json_answer(record: Record, **content: Any) -> str:
    """The line of a JSON answer to a row; it begins with the row's id, if it has one."""
    key = {} if record.key is None else {"id": record.key}
    return json.dumps(key | content, ensure_ascii=False)


def given_text(text: str, name: str) -> str:
    """Checks a text that is an argument. ValueError where its bytes are no text: Python keeps such bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start + 1} cannot be read; the terminal's encoding is UTF-8"
        ) from None
    return text


def is_text(argument: str) -> bool:
    """Whether an argument that is no existing file is meant as a text, and is not a mistyped file name."""
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


__all__ = ["InputError", "Lines", "Record", "given_text", "json_answer", "parts"]
