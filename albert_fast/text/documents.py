"""Streams documents from text files, tables and saved Hugging Face data sets, and cuts them into sentences.

| source | a document |
|---|---|
| .csv, .tsv, .jsonl, .parquet, also .csv.gz and so on | the text column of a row |
| a folder that `datasets.Dataset.save_to_disk` wrote | the text column of a row |
| any other file, also .gz | the lines up to a blank line, or a line |
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .line_reader import open_lines
from .saved_datasets import one_split, open_saved_dataset
from .text_files import LONGEST_ROW, TEXT_COLUMNS, Columns, read_table, table_format

CUTS = ("blank_lines", "lines")
# A longer document is cut here, so that a file without a blank line needs no memory for all of it.
LONGEST_DOCUMENT = 1 << 24
# Marks after which a space follows, then those of scripts without one: fullwidth . ! ?, halfwidth ., danda, Arabic ?.
_SENTENCE_END = re.compile(
    "[.!?\u2026]+[\"'\u201d\u2019)\\]]*\\s+"
    '|[\u3002\uff01\uff1f\uff61\u0964\u0965\u061f]+["\u201d\u2019\u300d\u300f\uff09]*\\s*|\\n+'
)


def read_documents(path: str | Path, cut: str = "blank_lines", text_column: str | None = None) -> Iterator[str]:
    """Yields the documents of a file or a saved data set, without blank ones; see the table above.

    Args:
        cut: "blank_lines" or "lines": what ends a document in a file of plain text.
        text_column: of a table or data set; default: text, sentence or review.

    Raises:
        ValueError: bytes that are not text, with file and line; a table that cannot be read; another `cut`.
        OSError: the file cannot be read. ImportError: a library that the format needs is missing.
    """
    if cut not in CUTS:
        raise ValueError(f"cut must be one of {', '.join(CUTS)}, got {cut!r}")
    if Path(path).is_dir():
        documents: Iterable[str] = dataset_texts(open_saved_dataset(path), text_column, str(path))
    elif table_format(path) is not None:
        documents = (row.text for row in read_table(path, Columns(text=text_column)))
    else:
        documents = _plain_documents(path, cut)
    for document in documents:
        if document.strip():
            yield document


def dataset_texts(rows: Iterable[Any], text_column: str | None, name: str) -> Iterator[str]:
    """Yields the texts of rows that are strings or dicts, such as those of a `datasets.Dataset`.

    Raises:
        ValueError: several splits, a row without that column, or a value that is not a string; the message names the row.
        TypeError: one string.
    """
    if isinstance(rows, str):
        raise TypeError(f"{name} must be a list of texts, got one string")
    rows = one_split(rows, name)
    select = getattr(rows, "select_columns", None)
    if select is not None and text_column is not None and text_column in (getattr(rows, "column_names", None) or ()):
        rows = select([text_column])  # reads nothing of the other columns
    for number, row in enumerate(rows):
        if isinstance(row, str):
            yield row
            continue
        where = f"{name}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a string or a dict, got {type(row).__name__}")
        found = [column for column in TEXT_COLUMNS if column in row] if text_column is None else [text_column]
        if len(found) != 1 or found[0] not in row:
            raise ValueError(f"{where}: name the text column; the row has {', '.join(map(repr, row))}")
        if not isinstance(row[found[0]], str):
            raise ValueError(f"{where}, column {found[0]!r}: expected a string, got {type(row[found[0]]).__name__}")
        yield row[found[0]]


def _plain_documents(path: str | Path, cut: str) -> Iterator[str]:
    lines = open_lines(path, longest=LONGEST_ROW)
    held: list[str] = []
    size = 0
    try:
        while (line := lines.read()) is not None:
            text = line.text.removesuffix("\r")
            problem = f"longer than {LONGEST_ROW} bytes" if line.dropped else "holds a NUL byte" if "\0" in text else ""
            if problem:
                raise ValueError(f"{path}, line {line.number}: {problem}; is this a file of text?")
            if text.strip():
                held.append(text)
                size += len(text)
            if held and (cut == "lines" or not text.strip() or size >= LONGEST_DOCUMENT):
                yield "\n".join(held)
                held, size = [], 0
        if held:
            yield "\n".join(held)
    finally:
        lines.close()


def split_sentences(document: str) -> list[str]:
    """Cuts a document at line ends and after the marks that end a sentence in most scripts; without blank pieces."""
    ends = [match.end() for match in _SENTENCE_END.finditer(document)]
    pieces = [document[begin:end].strip() for begin, end in itertools.pairwise([0, *ends, len(document)])]
    return [piece for piece in pieces if piece]


__all__ = ["CUTS", "dataset_texts", "read_documents", "split_sentences"]
