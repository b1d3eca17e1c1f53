"""Reading JSON that somebody else wrote, and writing files whole or not at all: beside the old one, flushed, then renamed.

A file is written in a scratch folder beside it. A process that is killed leaves that folder, and the next one that writes
the same file removes it; the folders of living processes are locked, and stay.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .locking import try_lock

# More than an object of any checkpoint needs: 100,000 class names or tensors take 10 MB.
LARGEST_JSON = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of UTF-8, with or without a byte order mark.

    Raises:
        ValueError: anything else, among it a key with two values; the message names the file.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path}: {size} bytes are too many for a JSON file of a checkpoint, at most {LARGEST_JSON}")
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path}: not valid JSON: the file is empty")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}: not valid JSON: it is UTF-16, save it as UTF-8")
    try:
        values = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_contradiction)
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; ValueError for a key that has two values."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and repr(values[key]) != repr(value):
            raise ValueError(f"it states {key!r} twice, with different values")
        values[key] = value
    return values


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An open binary file that takes the name `path` when it is complete and on the disk; an error leaves the old file.

    Raises:
        OSError: the folder of `path` cannot be written to, or the disk is full.
    """
    with scratch(path) as folder:
        with (folder / path.name).open("wb") as file:
            yield file
        flush(folder / path.name)
        os.replace(folder / path.name, path)
    flush(path.parent)


@contextlib.contextmanager
def scratch(path: Path, discard: Callable[[Path], None] = shutil.rmtree) -> Iterator[Path]:
    """A new folder beside `path` for its parts, removed at the end; before, those that dead processes left for `path`.

    discard: how such a folder is removed, where it may hold what is still needed.
    """
    remove_left(path, discard)
    folder, descriptor = _new_folder(path)
    try:
        yield folder
    finally:
        try:
            discard(folder)
        finally:
            os.close(descriptor)


def remove_left(path: Path, discard: Callable[[Path], None] = shutil.rmtree) -> None:
    """Removes the scratch folders that dead processes left for `path`; `discard` as in `scratch`."""
    for left in scratch_folders(path):
        if (descriptor := _locked(left)) is not None:
            try:
                if left.is_dir():  # another process may have removed it before the lock
                    discard(left)
            finally:
                os.close(descriptor)


def scratch_folders(path: Path) -> list[Path]:
    """The scratch folders of `path`, of living and of dead processes."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.part")
    return [folder for folder in path.parent.glob(".*.part") if name.fullmatch(folder.name) and folder.is_dir()]


def _new_folder(path: Path) -> tuple[Path, int]:
    """A scratch folder and the descriptor that locks it."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        folder.mkdir()
        # Another process may have taken it for a dead one's before the lock.
        if (descriptor := _locked(folder)) is not None:
            if folder.is_dir():
                return folder, descriptor
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks `folder` until it is closed, or the process ends; None where another process locks it.

    Where folders have no locks (Windows, some network file systems) every folder counts as a dead process's.
    """
    if sys.platform == "win32":
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # gone, or another user's
        return None
    if not try_lock(descriptor):
        os.close(descriptor)
        return None
    return descriptor


def flush(path: Path) -> None:
    """A file or folder to the disk, so that a rename can never come before the contents."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
