"""`albert-fast choose`: for each row of a table, the choice that continues or answers a text best."""

from __future__ import annotations

import itertools
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from . import _options as options
from ._errors import reports_errors
from ._lines import Record, json_answer, parts
from ._progress import counted

if TYPE_CHECKING:
    from ..training.tasks.choose import ChoiceRow

# Batches whose texts are sorted by length together.
WINDOW = 16


@reports_errors
@options.expands_groups
def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A table (.tsv, .csv, .jsonl, .parquet).")],
    model: options.Model,
    *,
    format: Annotated[
        options.AnswerFormat, typer.Option("--format", "-f", help="Form of the answers.")
    ] = options.AnswerFormat.tsv,
    text_column: Annotated[
        str | None, typer.Option("--text-column", help="First text.", show_default="text, question, sent1 ...")
    ] = None,
    choices_column: Annotated[
        str | None,
        typer.Option(
            "--choices-column", help="A list, or what stands before 0, 1 ...", show_default="choices, choice, ending"
        ),
    ] = None,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    compute: options.Compute,
) -> None:
    """Choose the text that continues or answers a first one best: one answer for each row, in order.

    A row has a text and its choices: the columns choice0, choice1 ..., or ending0, ending1 ..., or in JSON lines and Parquet a list
    in the column choices. It needs no label.

    tsv: number of the choice from 0 TAB probability TAB the choice. jsonl: {"choice": 1, "score": 0.93, "text": "...",
    "scores": [0.07, 0.93]}; an "id" of the input is repeated. A row that cannot be read ends the work with exit code 1.

    \b
    Examples:
      albert-fast choose questions.csv -m my-chooser
      albert-fast choose questions.jsonl -m my-chooser --text-column question --format jsonl
    """
    from ..tasks.choose import TextChooser
    from ..text.text_files import Columns
    from ..training.tasks.choose import choice_rows

    options.warn_of_rounding(model, compute.precision)
    rows = choice_rows(file, Columns(text_column, choices_column))
    first = list(itertools.islice(rows, 1))  # errors of the file come before the model is loaded
    chooser = TextChooser(model, max_length=max_length, batch_size=batch_size, **compute.as_keywords())
    for part in parts(counted(itertools.chain(first, rows), "choose", " rows"), batch_size * WINDOW):
        for row, scores in zip(part, chooser([(row.first, row.choices) for row in part]), strict=True):
            sys.stdout.write(_line(row, scores, format) + "\n")
        sys.stdout.flush()


def _line(row: ChoiceRow, scores: list[float], format: options.AnswerFormat) -> str:
    best = scores.index(max(scores))
    if format is options.AnswerFormat.tsv:
        return f"{best}\t{scores[best]:.6f}\t" + re.sub("[\t\r\n]", " ", row.choices[best])
    rounded = [round(score, 6) for score in scores]
    record = Record(0, row.first, key=row.values.get("id"))
    return json_answer(record, choice=best, score=rounded[best], text=row.choices[best], scores=rounded)
