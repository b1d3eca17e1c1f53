"""Checks everything that a run needs before it starts, so that no error comes after hours of work."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.encoder_config import EncoderConfig
from ..runtime.devices import choose_device
from .checkpointing import STATE_NAME

FLOAT_BYTES = 4


def check_device(device: str | torch.device | None) -> torch.device:
    """The device of a run: the given one, by default a GPU if there is one.

    Raises:
        BackendUnavailableError, RuntimeError: this torch cannot compute there.
    """
    chosen = choose_device(device)
    torch.empty(1, device=chosen)  # raises for a GPU number that does not exist or a device without a driver
    return chosen


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


def check_disk(folder: Path, model: nn.Module, averaged: bool) -> None:
    """OSError where the disk has no room for the state and the model, twice: the old ones exist until the new are written.

    Args:
        model: it may be on the meta device.
    """
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
    "check_trainable",
    "check_vocabulary",
]
