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
def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".tsv, .csv or .jsonl, also as .gz: text and label.")],
    model: options.ClassifierModel = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="May be repeated: accuracy, f1, matthews, pearson ...", show_default="accuracy"),
    ] = None,
    text_column: options.TextColumn = None,
    pair_column: options.PairColumn = None,
    label_column: options.LabelColumn = None,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    backend: options.Backend = "auto",
    precision: options.PrecisionOption = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Measure a classifier on labelled text and print the figures as JSON.

    \b
    Examples:
      albert-fast evaluate test.tsv --model my-model
      albert-fast evaluate test.tsv --metric accuracy --metric f1 --precision bf16
    """
    from ..training import evaluate

    options.set_threads(threads)
    folder = options.shipped_model() if model is None else model
    measured = evaluate(
        folder, file, metrics=metric or ["accuracy"], batch_size=batch_size, max_length=max_length,
        text_column=options.column(text_column), pair_column=options.column(pair_column),
        label_column=options.column(label_column), backend=backend,
        precision=None if precision is None else precision.value, device=device,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    figures: dict[str, Any] = {"examples": measured.examples, "loss": measured.loss, **measured.metrics}
    if measured.interval is not None:
        figures["accuracy_interval_95"] = list(measured.interval)
    sys.stdout.write(json.dumps(figures) + "\n")
