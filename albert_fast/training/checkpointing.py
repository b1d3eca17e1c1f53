"""The state of an unfinished run on disk: written aside and renamed, read back without running code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import replacing

STATE_NAME = "training_state.pt"
LOG_NAME = "log.jsonl"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes `training_state.pt`; a crash or a kill at any moment leaves the old file or the new one, whole."""
    with replacing(folder / STATE_NAME) as file:
        torch.save(state, file)


def load_state(folder: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The saved state, or None where there is none.

    Raises:
        ValueError: a damaged file, or one of a run with other settings; the message names the file and the settings.
    """
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state["settings"])
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    current = json.loads(json.dumps(settings))
    changed = sorted(key for key in {*saved, *current} if saved.get(key) != current.get(key))
    if changed:
        listed = "; ".join(f"{key} was {saved.get(key)!r}, now {current.get(key)!r}" for key in changed)
        raise ValueError(f"{path}: belongs to a run with other settings: {listed}")
    if state["device"] != device.type:
        raise ValueError(f"{path}: belongs to a run on {state['device']}, now {device.type}: its random numbers differ")
    return dict(state)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random numbers: the CPU's and, where the run is on a GPU, that GPU's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def write_log(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes `log.jsonl`, an object a line."""
    with replacing(folder / LOG_NAME) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


__all__ = ["LOG_NAME", "STATE_NAME", "load_state", "random_state", "save_state", "set_random_state", "write_log"]
