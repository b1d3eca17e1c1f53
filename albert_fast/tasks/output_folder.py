"""Checks the folder that a command writes a checkpoint into, so that it replaces nothing but another checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints import sentence_modules
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
    held = sorted(output.iterdir())
    if held and not overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite replaces it (in Python: overwrite=True)")
    foreign = [path for path in held if path.name not in NAMES]
    if foreign and (asked := sentence_modules.read(output)) is not None:
        encoder = asked.encoder.resolve()
        known = {*sentence_modules.stored_files(asked), *(encoder / name for name in NAMES)}
        foreign = [path for path in sorted(output.resolve().rglob("*")) if path.is_file() and path not in known]
    if foreign:
        raise FileExistsError(
            f"{output} holds {foreign[0].name}, which is no part of a checkpoint; name another folder"
        )
