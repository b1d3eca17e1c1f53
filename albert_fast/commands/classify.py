"""`albert-fast classify`: a label and its score for each line of text."""

from __future__ import annotations

import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..text.text_files import Columns
from . import _options as options
from ._errors import reports_errors
from ._lines import InputError, Lines, Record
from ._progress import Progress

if TYPE_CHECKING:
    import torch

# Batches whose texts are sorted by length together. A pipe gives less at a time, and is answered at once.
WINDOW = 16


class Format(str, Enum):
    tsv = "tsv"
    jsonl = "jsonl"


@reports_errors
def command(
    file: Annotated[str, typer.Argument(metavar="FILE|TEXT", help=options.INPUT_HELP)],
    model: options.ClassifierModel = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="Form of the answers.")] = Format.tsv,
    all_scores: Annotated[bool, typer.Option("--all-scores", help="Add the score of every label.")] = False,
    with_text: Annotated[bool, typer.Option("--with-text", help="Add the text that was classified.")] = False,
    text_column: options.TextColumn = None,
    pair_column: options.PairColumn = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Add the label that the table has, to compare.")
    ] = None,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    input_format: options.InputFormatOption = options.InputFormat.auto,
    encoding: options.Encoding = "utf-8",
    replace_bad_bytes: options.ReplaceBadBytes = False,
    backend: options.Backend = "auto",
    precision: options.PrecisionOption = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Label each line of a text, or each row of a table: one answer a line, in order, for empty lines too.

    FILE is read by its ending: .csv, .tsv and .jsonl (also as .gz) are tables, as `train` takes them, with the text in
    the column text, sentence or review and a second text in text_pair; all else is a text a line. Where there is no such
    file and the argument is words, they are the text.

    tsv: label TAB score; --all-scores adds label=score for every label, --with-text the text, --label-column
    expected=label. jsonl: {"label": "positive", "score": 0.93}; the options add "scores", "text" and "expected"; an "id"
    of the input comes back.

    A line that cannot be read ends the work with exit code 1; the lines before it are answered.

    The score is the label's probability; for a regression model it is the value itself. On a pipe the answers come as
    the lines do.

    \b
    Examples:
      echo "A quiet, generous film." | albert-fast classify -
      albert-fast classify reviews.txt --format jsonl > answers.jsonl
      albert-fast classify reviews.txt | paste - reviews.txt | sort | less
      albert-fast classify "What a joy."
      albert-fast classify reviews.csv.gz --text-column body --label-column stars
      albert-fast classify pairs.tsv -m my-pair-model --text-column question --pair-column answer --all-scores
    """
    columns = Columns(options.column(text_column), options.column(pair_column), options.column(label_column))
    with Lines(file, input_format, encoding, replace_bad_bytes, columns, may_be_text=True) as lines:
        classifier = Classifier(model, max_length, batch_size, backend, precision, device, threads)
        with Progress(lines, "classify", answers_on_stdout=True) as progress:
            bad_line: InputError | None = None
            while bad_line is None:
                try:
                    records = lines.window(batch_size * WINDOW)
                except InputError as error:
                    records, bad_line = error.before, error
                if not records and bad_line is None:
                    break
                answers = classifier([(record.text, record.pair) for record in records])
                for record, answer in zip(records, answers, strict=True):
                    write = _tsv if format is Format.tsv else _jsonl
                    sys.stdout.write(write(answer, record, all_scores, with_text) + "\n")
                sys.stdout.flush()
                progress.update()
            if bad_line is not None:
                raise bad_line


def _tsv(answer: dict[str, float], record: Record, all_scores: bool, with_text: bool) -> str:
    label = best(answer)
    columns = [label, f"{answer[label]:.6f}"]
    if all_scores:
        columns += [f"{name}={score:.6f}" for name, score in answer.items()]
    if record.label is not None:
        columns.append(f"expected={record.label}")
    if with_text:
        columns += [part for part in (record.text, record.pair) if part is not None]
    return "\t".join(re.sub("[\t\r\n]", " ", column) for column in columns)


def _jsonl(answer: dict[str, float], record: Record, all_scores: bool, with_text: bool) -> str:
    label = best(answer)
    content: dict[str, Any] = {} if record.key is None else {"id": record.key}
    content |= {"label": label, "score": round(answer[label], 6)}
    if all_scores:
        content["scores"] = {name: round(score, 6) for name, score in answer.items()}
    if record.label is not None:
        content["expected"] = record.label
    if with_text:
        content["text"] = record.text
        if record.pair is not None:
            content["text_pair"] = record.pair
    return json.dumps(content, ensure_ascii=False)


def best(answer: dict[str, float]) -> str:
    """The label of the highest score."""
    return max(answer, key=answer.__getitem__)


class Classifier:
    """Texts, or (text, second text or None), to a score for every label, in the order of the labels."""

    def __init__(
        self, model: str | None, max_length: int | None = None, batch_size: int = 32, backend: str = "auto",
        precision: options.Precision | None = None, device: str | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        from ..checkpoints.weights import resolve

        options.set_threads(threads)
        self.folder: Path = options.shipped_model() if model is None else resolve(model)
        self.batch_size, self.device = batch_size, options.place(device)
        self.tokenizer = options.text_tokenizer(self.folder)
        self.model = options.load("ALBERTForSequenceClassification", self.folder, backend, precision, self.device)
        self.limit = options.token_limit(self.tokenizer, self.model.config, max_length)
        self.labels = [self.model.config.label(index) for index in range(self.model.config.num_labels)]

    def __call__(self, texts: list[tuple[str, str | None]]) -> list[dict[str, float]]:
        import torch

        answers: list[dict[str, float]] = [{} for _ in texts]
        rows = options.tokenize(self.tokenizer, texts, self.limit)
        with torch.inference_mode():
            for chosen, batch in options.batches_by_length(self.tokenizer, rows, self.batch_size, self.device):
                for index, scores in zip(chosen, self._scores(self.model(**batch).logits).tolist(), strict=True):
                    answers[index] = dict(zip(self.labels, scores, strict=True))
        return answers

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (B, labels) -> probabilities, or the values of a regression."""
        problem, logits = self.model.config.problem_type, logits.float()
        if problem == "regression" or (problem is None and len(self.labels) == 1):
            return logits
        return logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
