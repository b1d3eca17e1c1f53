"""`albert-fast answer`: the answer to each question, a span of its context."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..text.squad_files import is_squad, read_squad
from . import _options as options
from ._errors import UsageError, reports_errors
from ._lines import Lines, Record, json_answer, parts
from ._progress import Progress, counted

if TYPE_CHECKING:
    from ..tasks.answer import Answer

# Batches whose texts are sorted by length together. A pipe gives fewer at a time and is answered at once.
WINDOW = 4
# Questions of SQuAD's JSON that are answered at a time.
QUESTIONS = 256


class Format(str, Enum):
    tsv = "tsv"
    jsonl = "jsonl"
    squad = "squad"


@reports_errors
@options.expands_groups
def command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|CONTEXT",
            help="SQuAD's JSON, a table with question and context, or with --question lines of contexts.",
        ),
    ],
    model: options.Model,
    *,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Ask this of every line, or row, of FILE.")
    ] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="Form of the answers.")] = Format.tsv,
    question_column: Annotated[str | None, typer.Option(help="Name, or number.", show_default="question")] = None,
    context_column: Annotated[str | None, typer.Option(help="Name, or number.", show_default="context")] = None,
    may_be_absent: Annotated[
        bool | None,
        typer.Option(
            "--may-be-absent/--always-answer",
            help="Whether a context may have no answer.",
            show_default="as MODEL was trained",
        ),
    ] = None,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    input: options.Input,
    compute: options.Compute,
) -> None:
    """Answer each question with a span of its context: one answer for each row, in order.

    tsv: answer TAB score, the answer empty where the context has none. jsonl: {"answer": "Bern", "score": 0.97, "start": 14,
    "end": 18}, in characters of the context; an "id" of the input is repeated. squad: one JSON object, id: answer, as SQuAD's
    evaluation script takes it.

    A context that is longer than the model takes is computed in windows that overlap.

    \b
    Examples:
      albert-fast answer "Anna lives in Bern." --question "Where does Anna live?" -m my-answerer
      albert-fast answer dev.json -m my-answerer --format squad > predictions.json
      albert-fast answer questions.csv -m my-answerer --context-column review --format jsonl
    """
    if is_squad(file):
        if question is not None:
            raise UsageError("--question is for lines of contexts; SQuAD's JSON has its own questions")
        asked = [Record(place, one.question, one.context, key=one.key) for place, one in enumerate(read_squad(file), 1)]
        answerer = _answerer(model, may_be_absent, max_length, batch_size, compute)
        every = parts(counted(asked, "answer", " questions"), QUESTIONS)
        _write(((part, answerer(_pairs(part, None))) for part in every), format)
        return
    if question is None:
        columns = options.TableColumns(question_column or "question", context_column or "context").as_columns()
    elif question_column is not None:
        raise UsageError("--question takes the place of --question-column; give one of them")
    else:
        columns = options.TableColumns(context_column).as_columns()
    try:
        opened = Lines(file, input, columns, may_be_text=question is not None)
    except UsageError as error:
        raise UsageError(f"{error}, and --question asks one question of every line") from None
    with opened as lines:
        answerer = _answerer(model, may_be_absent, max_length, batch_size, compute)
        with Progress(lines, "answer", answers_on_stdout=True) as progress:

            def parts_of_file() -> Iterable[tuple[list[Record], list[Answer]]]:
                for part in lines.windows(batch_size * WINDOW):
                    yield part, answerer(_pairs(part, question))
                    progress.update()

            _write(parts_of_file(), format)


def _answerer(
    model: str, may_be_absent: bool | None, max_length: int | None, batch_size: int, compute: options.Compute
) -> Any:
    from ..tasks.answer import QuestionAnswerer

    options.warn_of_rounding(model, compute.precision)
    return QuestionAnswerer(
        model,
        may_be_absent=may_be_absent,
        max_length=max_length,
        batch_size=batch_size,
        **compute.as_keywords(),
    )


def _pairs(records: list[Record], question: str | None) -> list[tuple[str, str]]:
    if question is not None:
        return [(question, record.text) for record in records]
    return [(record.text, record.pair or "") for record in records]


def _write(answered: Iterable[tuple[list[Record], list[Answer]]], format: Format) -> None:
    whole: dict[str, str] = {}
    for records, answers in answered:
        for record, answer in zip(records, answers, strict=True):
            if format is Format.squad:
                whole[str(record.line if record.key is None else record.key)] = answer.text
            elif format is Format.tsv:
                sys.stdout.write(re.sub(r"[\t\r\n]", " ", answer.text) + f"\t{answer.score:.6f}\n")
            else:
                score = round(answer.score, 6)
                line = json_answer(record, answer=answer.text, score=score, start=answer.start, end=answer.end)
                sys.stdout.write(line + "\n")
        sys.stdout.flush()
    if format is Format.squad:
        sys.stdout.write(json.dumps(whole, ensure_ascii=False) + "\n")
