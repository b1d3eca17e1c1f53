"""Finds and reads TensorFlow's checkpoints as Google released them: names, shapes and arrays of their variables.

It needs TensorFlow: pip install 'albert-fast[tensorflow]'.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .hub import near
from .tensorflow_names import belongs_to_training, is_transposed

# Where the files are in Google's archives, and in a module of TensorFlow Hub.
_FOLDERS = ("", "variables", "assets")
_CONFIGS = ("albert_config.json", "bert_config.json", "config.json")
_MOST_NAMED = 10


class Reader(Protocol):
    """The variables of a checkpoint: `shapes` by name, and the values of one."""

    shapes: Mapping[str, tuple[int, ...]]

    def array(self, name: str) -> Any: ...


class TensorFlowReader:
    """The variables of a checkpoint, read with TensorFlow; the prefix "module/" of TensorFlow Hub is left out.

    Args:
        prefix: the path of the checkpoint without ".index".

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: a file that TensorFlow cannot read.
    """

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or its import writes of the processor to standard error
        try:
            import tensorflow
        except ImportError as error:
            raise ImportError(
                "TensorFlow's checkpoints are read with TensorFlow: pip install 'albert-fast[tensorflow]'"
            ) from error
        try:
            self._reader = tensorflow.train.load_checkpoint(str(prefix))
            shapes = self._reader.get_variable_to_shape_map()
        except Exception as error:  # TensorFlow has many types of errors
            raise ValueError(f"{prefix}: not a readable checkpoint of TensorFlow: {error}") from error
        self._names = {name.removeprefix("module/"): name for name in shapes}
        self.shapes = {name: tuple(shapes[stored]) for name, stored in self._names.items()}

    def array(self, name: str) -> Any:
        """The values of a variable. ValueError where they cannot be read, such as in a file that is cut off."""
        try:
            return self._reader.get_tensor(self._names[name])
        except Exception as error:
            raise ValueError(f"{self._prefix}: {name} cannot be read: {error}") from error


def find_prefix(source: str | Path) -> Path:
    """The checkpoint that a folder, a prefix, or one of a checkpoint's files names, as a path without ".index".

    Raises:
        FileNotFoundError: there is none. ValueError: the folder has several; lists them.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [file for name in _FOLDERS for file in sorted((path / name).glob("*.index"))]
        if not found:
            raise FileNotFoundError(f"{path}: holds no checkpoint of TensorFlow, which has a file that ends in .index")
        if len(found) > 1:
            names = ", ".join(str(file.with_suffix("")) for file in found)
            raise ValueError(f"{path}: holds several checkpoints; name one of {names}")
        return found[0].with_suffix("")
    stem = path.name.partition(".data-")[0].removesuffix(".index")
    prefix = path.with_name(stem)
    if not path.with_name(f"{stem}.index").is_file():
        raise FileNotFoundError(f"{path}: no such folder or checkpoint of TensorFlow{near(str(path))}")
    return prefix


def find_config(prefix: Path) -> Path:
    """The configuration beside a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in _around(prefix):
        for name in _CONFIGS:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"{prefix.parent}: holds none of {', '.join(_CONFIGS)}; --config (config=) names the configuration"
    )


def find_vocabulary(prefix: Path) -> Path | None:
    """The vocabulary beside a checkpoint: a SentencePiece model, or a list of pieces; None where there is none.

    Raises:
        ValueError: there are several; lists them.
    """
    found = [file for folder in _around(prefix) for name in ("*.model", "vocab*.txt") for file in folder.glob(name)]
    if len(found) > 1:
        names = ", ".join(str(file) for file in sorted(found))
        raise ValueError(f"{prefix.parent}: several vocabularies; --vocab (vocab=) names one of {names}")
    return found[0] if found else None


def _around(prefix: Path) -> list[Path]:
    """The folder of a checkpoint; for one of TensorFlow Hub also the folder above and its assets."""
    folder = prefix.parent
    return [folder, folder.parent, folder.parent / "assets"] if folder.name == "variables" else [folder]


def read_tensors(
    reader: Reader, variables: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], where: str | Path
) -> dict[str, Tensor]:
    """Reads variables as float32 tensors of Hugging Face's names and layout.

    Args:
        variables: variable -> tensor.
        shapes: tensor -> its shape, as the configuration has it.
        where: the checkpoint, for messages.

    Raises:
        ValueError: variables that are missing, of another shape, unknown or not of floats; names them.
    """
    problems = []
    for name, key in variables.items():
        expected = tuple(reversed(shapes[key])) if is_transposed(name) else tuple(shapes[key])
        if name not in reader.shapes:
            problems.append(f"{name} is missing")
        elif reader.shapes[name] != expected:
            problems.append(f"{name} has the shape {reader.shapes[name]}, the configuration asks for {expected}")
    for name in sorted(reader.shapes.keys() - variables.keys()):
        if not belongs_to_training(name, variables):
            problems.append(f"{name} is no variable of a model with this configuration")
    if problems:
        more = f"\n... and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise ValueError(f"{where} cannot be converted:\n" + "\n".join(problems[:_MOST_NAMED]) + more)
    tensors = {}
    for name, key in variables.items():
        values = np.asarray(reader.array(name))
        if not (np.issubdtype(values.dtype, np.floating) or values.dtype.name == "bfloat16"):
            raise ValueError(f"{where}: {name} must hold floats, got {values.dtype}")
        values = values.astype(np.float32)
        tensors[key] = torch.from_numpy(np.ascontiguousarray(values.T if is_transposed(name) else values))
    return tensors
