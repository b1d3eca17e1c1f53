"""Reads sentences from CoNLL files: a word and its tag, or a word alone, on each line; an empty line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .line_reader import open_lines

ENDINGS = (".conll", ".conllu", ".bio", ".iob", ".iob2")


@dataclass
class Sentence:
    """A sentence of a CoNLL file.

    Attributes:
        line: the number of its first line, from 1.
        words: one for each line. tags: the same; none in a file of words alone.
    """

    line: int
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def is_conll(path: str | Path) -> bool:
    """Whether the ending of a name is that of a CoNLL file."""
    return str(path).lower().removesuffix(".gz").endswith(ENDINGS)


def read_conll(
    path: str | Path, word_column: int | None = None, tag_column: int | None = None, *, needs_tags: bool = True
) -> Iterator[Sentence]:
    """Yields the sentences of a file, also .gz. Columns are separated by tabs or, in a line without one, by spaces.

    Lines that begin with -DOCSTART-, and lines of a comment ("# " and no tab, in a file with tabs), are left out.

    Args:
        word_column, tag_column: numbers from 0; default: the first and the last column.
        needs_tags: False: a file whose first line is a word alone has no tags.

    Raises:
        ValueError: a line without these columns, or with more than its word in a file of words alone; bytes that are not UTF-8; the
            message names file and line. OSError: see `open`.
    """
    lines = open_lines(path)
    sentence, has_tabs = Sentence(0), False
    alone: bool | None = False if needs_tags else None  # None: the first line tells
    try:
        while (line := lines.read()) is not None:
            text = line.text.strip()
            if not text:
                if sentence.words:
                    yield sentence
                sentence = Sentence(0)
                continue
            if text.startswith("-DOCSTART-") or (
                text.startswith("# ") and "\t" not in text and (has_tabs or "=" in text)
            ):
                continue
            has_tabs = has_tabs or "\t" in text
            columns = text.split("\t") if "\t" in text else text.split()
            alone = len(columns) == 1 if alone is None else alone
            if alone:
                if len(columns) > 1:
                    raise ValueError(
                        f"{lines.name}, line {line.number}: {len(columns)} columns, but the first line is a word alone"
                    )
                sentence.line = sentence.line or line.number
                sentence.words.append(text)
                continue
            word, tag = (0 if word_column is None else word_column), (-1 if tag_column is None else tag_column)
            needed = max(2, word + 1, tag + 1)
            if len(columns) < needed:
                raise ValueError(
                    f"{lines.name}, line {line.number}: {len(columns)} column{'s' * (len(columns) != 1)}, expected a word "
                    f"and a tag{f' in {needed} columns' if needed > 2 else ''}"
                )
            sentence.line = sentence.line or line.number
            sentence.words.append(columns[word].strip())
            sentence.tags.append(columns[tag].strip())
            if not sentence.words[-1] or not sentence.tags[-1]:
                raise ValueError(f"{lines.name}, line {line.number}: the word or the tag is empty")
        if sentence.words:
            yield sentence
    finally:
        lines.close()
