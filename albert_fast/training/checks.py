"""Checks everything that a run needs before it starts, so that no error comes after hours of work."""

from __future__ import annotations

import math
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.auto import AutoModelForSequenceClassification
from ..models.encoder_config import EncoderConfig
from ..runtime.devices import choose_device
from .checkpointing import STATE_NAME
from .data import Examples, read_examples

FLOAT_BYTES = 4
FEW_CLASSES = 10  # up to this many are listed by name


def check_device(device: str | torch.device | None) -> torch.device:
    """The device of a run: the given one, by default a GPU if there is one.

    Raises:
        BackendUnavailableError, RuntimeError: this torch cannot compute there.
    """
    chosen = choose_device(device)
    torch.empty(1, device=chosen)  # raises for a GPU number that does not exist or a device without a driver
    return chosen


def check_train_labels(examples: Examples, file: str | Path, given_names: Sequence[str] | None) -> None:
    """Refuses labels that teach nothing; warns where a given class has no example.

    Raises:
        ValueError: all labels are equal, or nearly all are different words.
    """
    counts = _counts(examples)
    words = given_names is None and examples.label_names is not None and not holds_probabilities(examples)
    if words and len(counts) > max(FEW_CLASSES, len(examples.labels) // 2):
        raise ValueError(
            f"{file}: {len(counts)} different labels for {len(examples.labels)} examples; is the label column right?"
        )
    if len(counts) == 1:
        raise ValueError(
            f"{file}: all {len(examples.labels)} examples have the label {next(iter(counts))!r}: "
            "there is nothing to learn; is the label column right?"
        )
    if given_names is not None and not holds_probabilities(examples):
        absent = [name for name in given_names if name not in counts]
        if absent:
            warnings.warn(f"{file}: no example has the label {', '.join(map(repr, absent))}", stacklevel=3)


def read_split(
    file: str | Path, label_names: list[str] | None, columns: dict[str, Any], *, for_metrics: bool
) -> Examples:
    """Reads the examples to measure a model on.

    Args:
        label_names: the classes; None: the labels are numbers to predict.
        for_metrics: metrics will be computed, not only a loss.

    Raises:
        ValueError: a label of another kind or outside `label_names`; with `for_metrics`, labels that are probabilities.
    """
    examples = read_examples(file, label_names=label_names, **columns)
    if for_metrics and holds_probabilities(examples):
        raise ValueError(f"{file}: labels are probabilities; metrics need one label an example (a loss does not)")
    if label_names is None and examples.label_names is not None:
        try:
            names = [float(name) for name in examples.label_names]
        except ValueError:
            found = ", ".join(map(repr, examples.label_names[:3]))
            raise ValueError(f"{file}: labels are words ({found}), and the model predicts numbers") from None
        examples.labels, examples.label_names = [names[int(i)] for i in examples.labels], None  # type: ignore[arg-type]
    return examples


def holds_probabilities(examples: Examples) -> bool:
    return isinstance(examples.labels[0], list)


def _counts(examples: Examples) -> Counter[Any]:
    """Counts the examples of each label."""
    names = examples.label_names
    if holds_probabilities(examples):
        return Counter(tuple(row) for row in examples.labels)  # type: ignore[arg-type]
    return Counter(label if names is None else names[int(label)] for label in examples.labels)  # type: ignore[arg-type]


def describe_examples(examples: Examples) -> str:
    """One line about the number of examples and their labels."""
    counts = _counts(examples)
    total = f"{len(examples.texts)} examples"
    if examples.label_names is None:
        line = f"{total}, labels are numbers to predict, {min(counts):g} to {max(counts):g}"
        if all(float(value).is_integer() for value in counts) and len(counts) <= FEW_CLASSES:
            names = ",".join(f"{value:g}" for value in sorted(counts))
            line += f" (to make classes of them: label_names, --label-names {names})"
        return line
    if holds_probabilities(examples):
        return f"{total}, labels are probabilities of {len(examples.label_names)} classes"
    if len(counts) <= FEW_CLASSES:
        listed = ", ".join(f"{name} ({counts[name]})" for name in examples.label_names)
        return f"{total}, {len(examples.label_names)} classes: {listed}"
    return f"{total}, {len(examples.label_names)} classes, the rarest with {min(counts.values())} examples"


def check_vocabulary(tokenizer: Any, config: EncoderConfig, folder: str | Path) -> None:
    """ValueError where a checkpoint's tokenizer has ids that its model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has ids up to {largest}, its model takes ids below vocab_size {config.vocab_size}: "
            "they do not belong together"
        )


def check_trainable(config: EncoderConfig, folder: str | Path) -> None:
    """ValueError where a checkpoint's weights are rounded integers, which have no gradient."""
    if "quantization_config" in config.extra:
        raise ValueError(f"{folder}: holds rounded weights, which cannot be trained: start from the float checkpoint")


def check_length(max_length: int, config: EncoderConfig, position_shift: int = 0) -> None:
    """ValueError where a text may become longer than the model has positions."""
    needed = max_length + position_shift
    if needed > config.longest:
        raise ValueError(
            f"max_length {max_length} and position_shift {position_shift} need {needed} positions, "
            f"the model has {config.longest}"
        )


def check_disk(folder: Path, config: EncoderConfig, averaged: bool) -> None:
    """OSError where the disk has no room for the state and the model, twice: the old ones exist until the new are written."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    size = FLOAT_BYTES * sum(parameter.numel() for parameter in model.parameters())
    state = size * (4 if averaged else 3)  # the weights, two moments of AdamW, the average
    held = sum(path.stat().st_size for path in (folder / STATE_NAME, folder / "model.safetensors") if path.exists())
    needed, free = max(0, 2 * (state + size) - held), shutil.disk_usage(folder).free
    if free < needed:
        mib = [math.ceil(value / 2**20) for value in (needed, free)]
        raise OSError(f"{folder}: checkpoints of this run need {mib[0]} MiB, and the disk has {mib[1]} MiB left")


__all__ = [
    "check_device",
    "check_disk",
    "check_length",
    "check_train_labels",
    "check_trainable",
    "check_vocabulary",
    "describe_examples",
    "holds_probabilities",
    "read_split",
]
