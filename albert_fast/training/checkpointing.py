"""Locks the output folder of a run and keeps the run's state on the disk.

A crash leaves the old files or the new ones, complete. Reading them runs no code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.weights import WEIGHTS_NAMES
from ..runtime.files import remove_left, replacing
from ..runtime.locking import LockedError, locked

STATE_NAME = "training_state.pt"
LOG_NAME = "log.jsonl"
LOCK_NAME = ".train.lock"
# Settings that may change when a run is resumed: how long it goes on, and how often it saves and measures.
CHANGEABLE = ("epochs", "checkpoint_steps", "steps", "save_steps", "evaluate_steps", "log_steps", "evaluation_tokens")


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Locks the output folder of a run while the block runs; creates it if necessary.

    What killed runs left there is removed. A folder that was created here and got no file is removed at the end.

    Raises:
        LockedError: another run writes to the folder.
        FileExistsError: the folder holds a run and `resume` is off, or a model that no run wrote.
        OSError: the folder cannot be created or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; the output needs a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(folder / LOCK_NAME))
            except LockedError as error:
                raise LockedError(f"{folder}: another run is writing there ({error}); choose another folder") from None
            _check_contents(folder, resume)
            _sweep(folder)
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _check_contents(folder: Path, resume: bool) -> None:
    if resume and (folder / STATE_NAME).exists():
        return
    found = [name for name in (STATE_NAME, *WEIGHTS_NAMES, "config.json") if (folder / name).exists()]
    if found and resume:
        raise FileExistsError(f"{folder} holds {found[0]} but no {STATE_NAME} to continue from; choose another folder")
    if found:
        raise FileExistsError(
            f"{folder} holds a model or an unfinished run ({found[0]}); "
            "resume it (--resume, resume=True) or choose another folder"
        )


def other_files(folder: Path) -> list[str]:
    """The names of everything in a run's folder but the lock, the log and the state."""
    own = (LOCK_NAME, LOG_NAME, STATE_NAME)
    return sorted(path.name for path in folder.iterdir() if path.name not in own)


def _sweep(folder: Path) -> None:
    """Removes what killed runs left half-written; the lock is held, so no running process needs it."""
    for name in (STATE_NAME, LOG_NAME):
        remove_left(folder / name)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes `training_state.pt`. A crash or a kill at any moment leaves the old file or the new one, complete."""
    with replacing(folder / STATE_NAME) as file:
        torch.save(state, file)


def load_state(folder: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Reads the saved state; None where there is none.

    Raises:
        ValueError: a damaged file, or the state of a run with other settings, except those of CHANGEABLE; the message
            names the file and the settings.
    """
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state["settings"])
    except Exception as error:  # a damaged pickle can make the reader raise anything
        raise ValueError(f"{path}: cannot be read: {error}") from error
    current = json.loads(json.dumps(settings))
    changed = sorted(key for key in {*saved, *current} - {*CHANGEABLE} if saved.get(key) != current.get(key))
    if changed:
        listed = "; ".join(_difference(key, saved.get(key), current.get(key)) for key in changed)
        raise ValueError(f"{path}: belongs to a run with other settings: {listed}")
    if state["device"] != device.type:
        raise ValueError(f"{path}: belongs to a run on {state['device']}, now {device.type}: its random numbers differ")
    return dict(state)


def _difference(key: str, before: Any, now: Any) -> str:
    """Says what changed in a setting; in a nested one, such as the model's config, only the fields that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        fields = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return "; ".join(_difference(f"{key}.{name}", before.get(name), now.get(name)) for name in fields)
    return f"{key} was {before!r}, now {now!r}"


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random numbers: the CPU's and, if the run is on a GPU, that GPU's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def write_log(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes `log.jsonl`, one object on each line."""
    with replacing(folder / LOG_NAME) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


__all__ = [
    "LOG_NAME",
    "STATE_NAME",
    "claimed",
    "load_state",
    "random_state",
    "save_state",
    "set_random_state",
    "write_log",
]
