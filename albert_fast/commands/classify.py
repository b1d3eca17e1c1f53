"""`albert-fast classify`: a label and its score for each line of text."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from . import _options as options
from ._errors import reports_errors
from ._lines import Lines, Record, json_answer
from ._progress import Progress

# Batches whose texts are sorted by length together. A pipe gives fewer at a time and is answered at once.
WINDOW = 16


@dataclass(frozen=True)
class Columns(options.TableColumns):
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Add the label that the table has, to compare.")
    ] = None


@dataclass(frozen=True)
class Answers:
    """The form of the answers."""

    format: Annotated[options.AnswerFormat, typer.Option("--format", "-f", help="Form of the answers.")] = (
        options.AnswerFormat.tsv
    )
    all_scores: Annotated[bool, typer.Option("--all-scores", help="Add the score of every label.")] = False
    with_text: Annotated[bool, typer.Option("--with-text", help="Add the text that was classified.")] = False

    def line(self, answer: dict[str, float], record: Record) -> str:
        return _tsv(answer, record, self) if self.format is options.AnswerFormat.tsv else _jsonl(answer, record, self)


@reports_errors
@options.expands_groups
def command(
    file: Annotated[str, typer.Argument(metavar="FILE|TEXT", help=options.INPUT_HELP)],
    model: options.ClassifierModel = None,
    *,
    answers: Answers,
    columns: Columns,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    input: options.Input,
    compute: options.Compute,
) -> None:
    """Label each line of a text, or each row of a table: one answer for each line, in order, for empty lines too.

    FILE is read by its ending: .csv, .tsv, .jsonl (also as .gz) and .parquet are tables, as `train` takes them, with the text in
    the column text, sentence or review and a second text in text_pair. Any other file is read as lines of text. If no file
    has that name and the argument looks like text, the argument itself is classified.

    tsv: label TAB score; --all-scores adds label=score for every label, --with-text the text, --label-column
    expected=label. jsonl: {"label": "positive", "score": 0.93}; the options add "scores", "text" and "expected"; an "id"
    of the input is repeated.

    The score is the label's probability; for a regression model it is the value itself. A line that cannot be read ends
    the work with exit code 1, after the lines before it are answered. On a pipe each line is answered as it comes.

    \b
    Examples:
      echo "A quiet, generous film." | albert-fast classify -
      albert-fast classify reviews.txt --format jsonl > answers.jsonl
      albert-fast classify reviews.txt | paste - reviews.txt | sort | less
      albert-fast classify "What a joy."
      albert-fast classify reviews.csv.gz --text-column body --label-column stars
      albert-fast classify pairs.tsv -m my-pair-model --text-column question --pair-column answer --all-scores
    """
    with Lines(file, input, columns.as_columns(), may_be_text=True) as lines:
        from ..tasks.classify import TextClassifier

        if model is not None:
            options.warn_of_rounding(model, compute.precision)
        classifier = TextClassifier(model, max_length=max_length, batch_size=batch_size, **compute.as_keywords())
        with Progress(lines, "classify", answers_on_stdout=True) as progress:
            for records in lines.windows(batch_size * WINDOW):
                found = classifier([(record.text, record.pair) for record in records])
                for record, answer in zip(records, found, strict=True):
                    sys.stdout.write(answers.line(answer, record) + "\n")
                sys.stdout.flush()
                progress.update()


def _best(answer: dict[str, float]) -> tuple[str, float]:
    from ..tasks.classify import best_label

    label = best_label(answer)
    return label, answer[label]


def _tsv(answer: dict[str, float], record: Record, form: Answers) -> str:
    label, score = _best(answer)
    columns = [label, f"{score:.6f}"]
    if form.all_scores:
        columns += [f"{name}={value:.6f}" for name, value in answer.items()]
    if record.label is not None:
        columns.append(f"expected={record.label}")
    if form.with_text:
        columns += [part for part in (record.text, record.pair) if part is not None]
    return "\t".join(re.sub("[\t\r\n]", " ", column) for column in columns)


def _jsonl(answer: dict[str, float], record: Record, form: Answers) -> str:
    label, score = _best(answer)
    content: dict[str, Any] = {"label": label, "score": round(score, 6)}
    if form.all_scores:
        content["scores"] = {name: round(value, 6) for name, value in answer.items()}
    if record.label is not None:
        content["expected"] = record.label
    if form.with_text:
        content["text"] = record.text
        if record.pair is not None:
            content["text_pair"] = record.pair
    return json_answer(record, **content)
