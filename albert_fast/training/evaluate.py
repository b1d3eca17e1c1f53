"""Measures a stored model on labelled text, for the task that it was trained for.

Example:

    evaluate("albert_fast/data/sst2-small", "test.tsv")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints.saving import folder_of
from ..checkpoints.weights import resolve
from ..models.auto import config_of
from ..text.batching import for_plain_text
from ..text.text_files import Columns
from ..text.tokenizer import load_tokenizer
from .checks import check_device, check_length, check_vocabulary
from .metrics import Metric, confidence_interval
from .sources import Source
from .tasks import Measured, task_of


@dataclass(frozen=True)
class Evaluation(Measured):
    """What `evaluate` returns: the figures of `tasks.Measured`, and on what they were measured.

    Attributes:
        examples: how many.
        interval: Wilson's 95 % interval of the accuracy; None where it was not asked for or counts words, not examples.
        task: the name of the task.
    """

    examples: int
    interval: tuple[float, float] | None
    task: str


def evaluate(
    checkpoint: str | Path,
    file: Source,
    *,
    metrics: Sequence[str | Metric] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    text_column: str | int | None = None,
    pair_column: str | int | None = None,
    label_column: str | int | None = None,
    backend: str = "auto",
    precision: str | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures a checkpoint (folder, file of weights or hub id) on a file or data set, as `fit` takes them.

    Args:
        metrics: names, see `docs/training.md`; for classes and numbers also functions, as in `test`. None: the one that
            chooses the best epoch in a training for the task.
        max_length: texts are cut to this many tokens; default: as many as the model has positions.
        text_column, pair_column, label_column: see `read_examples`.
        backend, precision: see `from_pretrained`.

    Raises:
        ValueError: a file or metrics that do not fit the model's labels, a max_length beyond the model's positions, a
            tokenizer of another model. ImportError: a metric's library is missing. These errors, and those of
            `from_pretrained`, come before the first text is computed.
    """
    device = check_device(device)
    path = resolve(checkpoint)
    config = config_of(path)
    task = task_of(config)
    names = [config.label(i) for i in range(config.num_labels)] if task.has_labels else None
    if metrics is None:
        metrics = [task.default_metric(names)]
    task.check_metrics(metrics)
    columns = Columns(text_column, pair_column, label_column)
    examples = task.read_split(file, columns, names, for_metrics=bool(metrics))
    length = config.longest if max_length is None else max_length
    check_length(length, config)
    tokenizer = for_plain_text(load_tokenizer(folder_of(path)))
    check_vocabulary(tokenizer, config, checkpoint)
    where = {"backend": backend, "precision": precision, "device": device}
    model = task.model.from_pretrained(path, **where)
    data = task.data(examples, tokenizer, length, types=model.base_model.takes_types)
    measured = task.measure(
        model, data, examples, metrics=metrics, batch_size=batch_size, device=device, progress=progress
    )
    count, interval = len(examples.texts), None
    if "accuracy" in measured.metrics and task.name != "tag":
        interval = confidence_interval(round(measured.metrics["accuracy"] * count), count)
    return Evaluation(**vars(measured), examples=count, interval=interval, task=task.name)


__all__ = ["Evaluation", "evaluate"]
