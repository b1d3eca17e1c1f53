"""Checks the folder that a command writes a checkpoint into, so that it replaces nothing but another checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..text import vocabulary

# The files of a stored checkpoint; a folder with any other file is not replaced.
NAMES = ("config.json", "model.safetensors", *vocabulary.FILES, *vocabulary.SETTINGS)


def check_output(output: Path, overwrite: bool) -> None:
    """Nothing, if `output` may be written.

    Raises:
        FileExistsError: it exists and `overwrite` is off, or it is a file or holds other files than a checkpoint's.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{output} is a file; the output needs a folder")
    held = sorted(path.name for path in output.iterdir())
    if held and not overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite (overwrite=True) replaces it")
    foreign = [name for name in held if name not in NAMES]
    if foreign:
        raise FileExistsError(f"{output} holds {foreign[0]}, which is no part of a checkpoint; name another folder")
