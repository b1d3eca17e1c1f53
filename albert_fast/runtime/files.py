"""Reads untrusted JSON, and writes files and folders so that a crash leaves the old one or the new one, never half of it.

A new file is written in a scratch folder next to the old one, flushed to the disk and renamed. A process that is killed
leaves its scratch folder; the next process that writes the same file removes it. A running process locks its scratch
folder, so that no other process removes it.
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

# More than any checkpoint needs: 100,000 class names or tensors take 10 MB.
LARGEST_JSON = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: the file holds something else, or an object with two values for one key; the message names the file.
        OSError: the file cannot be read.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_json(path: Path) -> Any:
    """Reads any JSON value; otherwise as `read_json_object`."""
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(
            f"{path}: {size} bytes are too many for a JSON file of a checkpoint; the limit is {LARGEST_JSON}"
        )
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path}: not valid JSON: the file is empty")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}: not valid JSON: it is UTF-16, save it as UTF-8")
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_contradiction)
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object from its keys and values; ValueError where a key has two different values."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and repr(values[key]) != repr(value):
            raise ValueError(f"the key {key!r} is there twice, with different values")
        values[key] = value
    return values


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that gets the name `path` when the block ends; after an error the old file is unchanged.

    Raises:
        OSError: the folder of `path` cannot be written to, or the disk is full.
    """
    with scratch(path) as folder:
        with (folder / path.name).open("wb") as file:
            yield file
        commit(folder / path.name, path)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that gets the name `path` when the block ends; after an error or a kill the old folder is back.

    Its parents are created. After a kill between the two renames the next call for `path` puts the old folder back.

    Raises:
        OSError: the parent of `path` cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch(path, _put_back) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        for file in (*new.rglob("*"), new):
            flush(file)
        if path.exists():
            os.rename(path, folder / "old")
        os.rename(new, path)
        flush(path.parent)


def _put_back(scratch: Path) -> None:
    """Removes a scratch folder of `replacing_folder`. An old folder in it that has no successor goes back first."""
    path = scratch.with_name(scratch.name[1:].rsplit(".", 2)[0])
    if (scratch / "old").exists() and not path.exists():
        os.rename(scratch / "old", path)
    shutil.rmtree(scratch)


@contextlib.contextmanager
def scratch(path: Path, discard: Callable[[Path], None] = shutil.rmtree) -> Iterator[Path]:
    """Makes a folder next to `path` for unfinished files, and removes it when the block ends.

    Scratch folders that killed processes left for `path` are removed first.

    Args:
        discard: removes a scratch folder; for a caller whose scratch folder may hold something that is still needed.
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
    """Removes the scratch folders that killed processes left for `path`; `discard` as in `scratch`."""
    for left in scratch_folders(path):
        if (descriptor := _locked(left)) is not None:
            try:
                if left.is_dir():  # another process may have removed it before we locked it
                    discard(left)
            finally:
                os.close(descriptor)


def scratch_folders(path: Path) -> list[Path]:
    """All scratch folders for `path`: those of running processes and those that killed ones left."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.part")
    return [folder for folder in path.parent.glob(".*.part") if name.fullmatch(folder.name) and folder.is_dir()]


def _new_folder(path: Path) -> tuple[Path, int]:
    """A scratch folder, and the descriptor that locks it."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        folder.mkdir()
        # Before we lock it, another process may take the folder for a killed process's and remove it.
        if (descriptor := _locked(folder)) is not None:
            if folder.is_dir():
                return folder, descriptor
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks `folder` until it is closed or the process ends; None where another process holds the lock.

    Where folders cannot be locked (Windows, some network file systems), every folder counts as left by a killed process.
    """
    if sys.platform == "win32":
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # it is gone, or belongs to another user
        return None
    if not try_lock(descriptor):
        os.close(descriptor)
        return None
    return descriptor


def commit(source: Path, target: Path) -> None:
    """Gives a finished file its final name. After a power failure `target` is the old file or the new one, complete."""
    flush(source)
    source.replace(target)
    flush(target.parent)


def sync(file: BinaryIO) -> None:
    """Writes what an open file has buffered to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Writes a file or folder to the disk, so that a later rename cannot reach the disk before the contents."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
