"""Measures a saved classifier on labelled text.

Example:

    evaluate("albert_fast/data/sst2-small", "test.tsv")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..checkpoints.saving import folder_of
from ..checkpoints.weights import resolve
from ..models.auto import AutoModelForSequenceClassification, config_of
from ..text.batching import for_plain_text
from ..text.tokenizer import load_tokenizer
from .checks import check_device, check_length, check_vocabulary, read_split
from .data import LengthBucketSampler, TextDataset
from .loop import test
from .metrics import Metric, check_metrics, confidence_interval


@dataclass(frozen=True)
class Evaluation:
    """The figures of a classifier.

    Attributes:
        loss: the mean over the examples.
        metrics: by name.
        interval: Wilson's 95 % interval of the accuracy; None where accuracy was not asked for.
    """

    examples: int
    loss: float
    metrics: dict[str, float]
    interval: tuple[float, float] | None


def evaluate(
    checkpoint: str | Path,
    file: str | Path,
    *,
    metrics: Sequence[str | Metric] = ("accuracy",),
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
    """Measures a checkpoint (folder, file of weights or hub id) on a TSV, CSV or JSONL file.

    Args:
        metrics: as in `test`.
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
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{checkpoint}: gives several labels for a text; evaluate measures one class or number for a text"
        )
    numbers = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    check_metrics(metrics, numbers=numbers)
    names = None if numbers else [config.label(i) for i in range(config.num_labels)]
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    examples = read_split(file, names, columns, for_metrics=bool(metrics))
    length = config.longest if max_length is None else max_length
    check_length(length, config)
    tokenizer = for_plain_text(load_tokenizer(folder_of(path)))
    check_vocabulary(tokenizer, config, checkpoint)
    where = {"backend": backend, "precision": precision, "device": device}
    model = AutoModelForSequenceClassification.from_pretrained(path, **where)
    types = model.base_model.takes_types
    data = TextDataset(examples.texts, examples.labels, tokenizer, length, token_types=types)
    sampler = LengthBucketSampler(data.lengths, batch_size, shuffle=False)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate)
    loss, values = test(model, loader, None, device, metrics=metrics, progress=progress)
    interval = confidence_interval(round(values["accuracy"] * len(data)), len(data)) if "accuracy" in values else None
    return Evaluation(len(data), loss, values, interval)


__all__ = ["Evaluation", "evaluate"]
