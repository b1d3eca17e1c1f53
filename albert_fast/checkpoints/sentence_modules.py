"""Describes sentence-transformers' modules.json: the steps after the encoder, which this library does not apply yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("modules.json", "1_Pooling/config.json")


def describe(folder: Path) -> str | None:
    """Lists the modules after the encoder of a sentence-transformers folder, such as "Pooling (cls_token), Normalize".

    Args:
        folder: the folder with the encoder's config.json: that of modules.json, or a folder in it that modules.json names.

    Returns:
        None if there is no modules.json, or if it names only an encoder.
    """
    folder = folder.resolve()
    for root in (folder, folder.parent):
        modules = _read(root / "modules.json")
        if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
            continue
        if root != folder and folder.name not in (str(module.get("path")) for module in modules):
            continue
        later = [module for module in modules if not _kind(module).endswith("Transformer")]
        return ", ".join(_with_modes(root, module) for module in later) or None
    return None


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "?")).rpartition(".")[2]


def _with_modes(root: Path, module: dict[str, Any]) -> str:
    settings = _read(root / str(module.get("path", "")) / "config.json")
    if _kind(module) != "Pooling" or not isinstance(settings, dict):
        return _kind(module)
    modes = [
        name.removeprefix("pooling_mode_")
        for name, on in settings.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    modes += [str(settings["pooling_mode"])] if "pooling_mode" in settings else []
    return f"Pooling ({', '.join(modes)})" if modes else "Pooling"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
