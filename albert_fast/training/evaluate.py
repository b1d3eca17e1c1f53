"""A saved classifier on labelled text: the figures that its card states.

Example:

    evaluate("albert_fast/data/sst2-small", "test.tsv")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from .. import ALBERTConfig, ALBERTForSequenceClassification
from ..tokenization import load_tokenizer
from ..weights import config_path, resolve
from .data import LengthBucketSampler, TextDataset, read_examples
from .loop import test
from .metrics import Metric, confidence_interval


@dataclass(frozen=True)
class Evaluation:
    """Examples, mean loss, metrics by name; Wilson's 95 % interval of the accuracy where that was asked for."""

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
    """Runs a checkpoint (folder or hub id) over a TSV, CSV or JSONL file.

    Args:
        metrics: as in `test`.
        max_length: default: what the model has positions for.
        text_column, pair_column, label_column: see `read_examples`.
        backend, precision: see `from_pretrained`.

    Raises:
        ValueError: a file that does not fit the model's labels.
    """
    folder = resolve(checkpoint)
    config = ALBERTConfig.from_json_file(config_path(folder))
    names = None if config.problem_type == "regression" else [config.label(i) for i in range(config.num_labels)]
    examples = read_examples(
        file, text_column=text_column, pair_column=pair_column, label_column=label_column, label_names=names
    )
    tokenizer = load_tokenizer(folder)
    tokenizer.split_special_tokens = True  # as `classify` reads texts
    data = TextDataset(examples.texts, examples.labels, tokenizer, max_length or config.max_position_embeddings)
    sampler = LengthBucketSampler(data.lengths, batch_size, shuffle=False)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = ALBERTForSequenceClassification.from_pretrained(folder, backend=backend, precision=precision, device=place)
    loss, values = test(model, loader, None, place, metrics=metrics, progress=progress)
    interval = confidence_interval(round(values["accuracy"] * len(data)), len(data)) if "accuracy" in values else None
    return Evaluation(len(data), loss, values, interval)


__all__ = ["Evaluation", "evaluate"]
