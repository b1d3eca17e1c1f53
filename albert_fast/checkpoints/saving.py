"""Writes checkpoints in Hugging Face's layout so that a kill never leaves half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ..runtime import files
from .weights import tied

# The name that a save's scratch folder is made from; one folder serves both files of a checkpoint.
CHECKPOINT = "checkpoint"
_TRAINER_FILES = ("training_args.bin", "trainer_state.json")


def save_checkpoint(
    model: nn.Module,
    values: Mapping[str, Any],
    directory: str | Path,
    tensors: Mapping[str, Tensor] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config.json and model.safetensors into `directory`. Other files there stay; one process at a time may save.

    A kill at any moment leaves the old checkpoint or the new one, complete: both files are first written to a scratch
    folder and flushed. Renaming the weights is the moment of change. If the configuration was not renamed any more,
    `config_path` finds it, and the next save renames it.

    Args:
        values: the contents of config.json.
        tensors: written in place of the model's own.
        others: written as well: tensors that only other classes of the family have, such as a pooler.

    Raises:
        ValueError: `tensors` have other names or shapes than the model's.
        OSError: the folder cannot be written to, or the disk is full.
    """
    directory, state = Path(directory), model.state_dict(keep_vars=True)
    aliases = {alias for alias, _ in tied(model)}
    given = state if tensors is None else tensors
    for key in sorted((given.keys() ^ state.keys()) - aliases):
        raise ValueError(f"state_dict: {key!r} is {'missing' if key in state else 'not a tensor of the model'}")
    for key, tensor in given.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"state_dict: {key!r} has the shape {tuple(tensor.shape)}, not {tuple(state[key].shape)}")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in given.items() if key not in aliases}
    tensors |= others or {}
    with files.scratch(directory / CHECKPOINT, _finish) as folder:
        # In this order: `config_path` takes a configuration without weights for one whose weights were renamed already.
        weights, config = folder / "model.safetensors", folder / "config.json"
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        files.flush(weights)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files.flush(config)
        shutil.copymode(config, weights)  # safetensors creates files that other users may not read
        files.flush(folder)
        files.flush(directory)
        os.replace(weights, directory / "model.safetensors")
    files.flush(directory)


def folder_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint that was named by its folder or by its file of weights."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def config_path(checkpoint: Path) -> Path:
    """The path of config.json, also where a save was killed just before it renamed that file.

    Args:
        checkpoint: its folder, or its file of weights.
    """
    directory = folder_of(checkpoint)
    for folder in files.scratch_folders(directory / CHECKPOINT):
        if _is_committed(folder):
            return folder / "config.json"
    return directory / "config.json"


def _is_committed(folder: Path) -> bool:
    """Whether the weights of a save's scratch folder were renamed already, and its configuration was not."""
    return (folder / "config.json").exists() and not (folder / "model.safetensors").exists()


def _finish(folder: Path) -> None:
    """Removes a save's scratch folder; renames a configuration whose weights were renamed already."""
    if _is_committed(folder):
        os.replace(folder / "config.json", folder.parent / "config.json")
    (folder / "config.json").unlink(
        missing_ok=True
    )  # before the weights: a configuration alone would count as committed
    shutil.rmtree(folder)


def missing_config(path: Path) -> FileNotFoundError:
    """The error for a checkpoint without config.json; it says what to do with a folder of transformers' Trainer."""
    folder = folder_of(path).resolve()
    message = f"{path}: no config.json in {folder}, where a checkpoint has it"
    if any((folder / name).is_file() for name in _TRAINER_FILES):
        message += (
            "; transformers' Trainer saved the weights alone. "
            'from_pretrained(folder, config="the folder or id of the model that was trained") loads them; '
            "trainer.model.save_pretrained(folder) writes a folder with both"
        )
    return FileNotFoundError(message)
