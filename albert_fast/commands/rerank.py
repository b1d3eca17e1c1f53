"""`albert-fast rerank`: the lines of a text that answer a query best, by a cross-encoder."""

from __future__ import annotations

import heapq
import re
import sys
from typing import Annotated

import typer

from . import _options as options
from ._errors import reports_errors
from ._lines import InputError, Lines, Record, given_text, json_answer
from ._progress import Progress

# Lines that are scored at a time.
WINDOW = 2048


@reports_errors
@options.expands_groups
def command(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="The question, or whatever the texts are compared with.")
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="Lines of text, or a table; - is standard input.")],
    model: options.Model,
    *,
    top: Annotated[
        int | None, typer.Option("--top", "-n", min=1, help="Show this many of the best.", show_default="all")
    ] = None,
    format: Annotated[
        options.AnswerFormat, typer.Option("--format", "-f", help="Form of the answers.")
    ] = options.AnswerFormat.tsv,
    column: options.TextColumn,
    max_length: options.MaxLength = None,
    batch_tokens: options.BatchTokens = None,
    input: options.Input,
    compute: options.Compute,
) -> None:
    """Score how well each line of FILE answers QUERY, with a cross-encoder, and show the best lines first.

    FILE is read by its ending, as `encode` reads it; a second text of its rows is not read. With --top, memory does not grow
    with FILE. A line that cannot be read ends the work with exit code 1.

    tsv: score TAB line of FILE TAB text. jsonl: {"score": 0.93, "line": 7, "text": "..."}; an "id" of the input is repeated.

    \b
    Examples:
      albert-fast rerank "who wrote it?" passages.txt -m my-cross-encoder --top 5
      albert-fast rerank "who wrote it?" passages.jsonl.gz -m my-cross-encoder --text-column body --format jsonl
    """
    with Lines(file, input, column.as_columns()) as lines:
        from ..tasks.score import TextScorer

        options.warn_of_rounding(model, compute.precision)
        scorer = TextScorer(model, max_length=max_length, **compute.as_keywords())
        scorer.check_ranks()
        question = given_text(query, "QUERY")
        best: list[tuple[float, int, Record]] = []
        with Progress(lines, "rerank", answers_on_stdout=False) as progress:
            number = 0
            while records := _rows(lines):
                scores = scorer.score([(question, record.text) for record in records], batch_tokens=batch_tokens)
                best += [
                    (float(score), -number - i, record)
                    for i, (score, record) in enumerate(zip(scores, records, strict=True))
                ]
                number += len(records)
                if top is not None:
                    best = heapq.nlargest(top, best, key=lambda one: one[:2])
                progress.update()
    for score, _, record in sorted(best, key=lambda one: one[:2], reverse=True):
        sys.stdout.write((_tsv if format is options.AnswerFormat.tsv else _jsonl)(score, record) + "\n")


def _rows(lines: Lines) -> list[Record]:
    try:
        return lines.window(WINDOW, patience=None)
    except InputError as error:  # there is no order of some of the lines
        raise ValueError(str(error)) from error


def _tsv(score: float, record: Record) -> str:
    return "\t".join([f"{score:.6f}", str(record.line), re.sub("[\t\r\n]", " ", record.text)])


def _jsonl(score: float, record: Record) -> str:
    return json_answer(record, score=round(score, 6), line=record.line, text=record.text)
