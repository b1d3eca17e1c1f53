"""`albert-fast evaluate`: metrics of a classifier on labelled text."""

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
    file: Annotated[Path, typer.Argument(metavar="FILE", help=options.TABLE_HELP)],
    model: options.ClassifierModel = None,
    *,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="May be repeated: accuracy, f1, matthews, pearson ...", show_default="accuracy"),
    ] = None,
    columns: options.TableColumns,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    compute: options.Compute,
) -> None:
    """Measure a classifier on labelled text and print the figures as JSON.

    \b
    Examples:
      albert-fast evaluate test.tsv --model my-model
      albert-fast evaluate test.tsv --metric accuracy --metric f1 --precision bf16
    """
    from ..checkpoints.weights import shipped_model
    from ..training import evaluate

    measured = evaluate(
        shipped_model() if model is None else model,
        file,
        metrics=metric or ["accuracy"],
        batch_size=batch_size,
        max_length=max_length,
        progress=sys.stderr.isatty(),
        **columns.as_keywords(),
        **compute.as_keywords(),
    )
    figures: dict[str, Any] = {"examples": measured.examples, "loss": measured.loss, **measured.metrics}
    if measured.interval is not None:
        figures["accuracy_interval_95"] = list(measured.interval)
    sys.stdout.write(json.dumps(figures) + "\n")
