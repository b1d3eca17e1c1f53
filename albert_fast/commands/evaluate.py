"""`albert-fast evaluate`: metrics of a model on labelled text, its predictions, and a picture of its confusions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as options
from ._errors import reports_errors


@reports_errors
@options.expands_groups
def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=options.EXAMPLES_HELP)],
    model: options.ClassifierModel = None,
    *,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="May be repeated: accuracy, f1, matthews, pearson, bleu ...", show_default="that of train"
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Write what was expected and predicted, an object for each example."),
    ] = None,
    confusion_matrix: Annotated[
        Path | None,
        typer.Option(
            "--confusion-matrix", help="Draw which class, or tag, was taken for which, as .png, .svg or .pdf."
        ),
    ] = None,
    columns: options.TableColumns,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    compute: options.Compute,
) -> None:
    """Measure a model on labelled text, for the task that it was trained for, and print the figures as JSON.

    \b
    Examples:
      albert-fast evaluate test.tsv --model my-model
      albert-fast evaluate test.tsv --metric accuracy --metric f1 --precision bf16
      albert-fast evaluate test.tsv -m my-model --predictions out.jsonl --confusion-matrix matrix.png
      albert-fast evaluate dev.json -m my-answerer --metric exact_match --metric f1
    """
    from ..checkpoints.weights import resolve, shipped_model
    from ..models.auto import config_of
    from ..runtime.files import replacing
    from ..training import evaluate
    from ..training.plots import check_can_draw, draw_confusion_matrix
    from ..training.tasks import task_of

    checkpoint = shipped_model() if model is None else model
    if confusion_matrix is not None:
        check_can_draw(confusion_matrix, task_of(config_of(resolve(checkpoint))).name)

    measured = evaluate(
        checkpoint,
        file,
        metrics=metric,
        batch_size=batch_size,
        max_length=max_length,
        progress=True,
        **columns.as_keywords(),
        **compute.as_keywords(),
    )
    figures: dict[str, Any] = {"examples": measured.examples, "loss": measured.loss, **measured.metrics}
    if measured.interval is not None:
        figures["accuracy_interval_95"] = list(measured.interval)
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()  # the figures are out even if a file cannot be written
    if predictions is not None:
        with replacing(predictions) as file_of_predictions:
            for expected, predicted in zip(measured.expected, measured.predicted, strict=True):
                row = json.dumps({"expected": expected, "predicted": predicted}, ensure_ascii=False)
                file_of_predictions.write(f"{row}\n".encode())
    if confusion_matrix is not None:
        draw_confusion_matrix(measured, confusion_matrix)
