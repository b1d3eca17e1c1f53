"""Finds and reads TensorFlow's checkpoints as Google released them: names, shapes and arrays of their variables.

It needs TensorFlow: pip install 'albert-fast[tensorflow]'.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
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
_PROGRAM = Path(__file__).with_name("tensorflow_process.py")


class Reader(Protocol):
    """The variables of an open checkpoint: `shapes` by name, and the values of one; a context manager that closes it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def array(self, name: str) -> Any: ...

    def __enter__(self) -> Reader: ...

    def __exit__(self, *error: object) -> None: ...


class TensorFlowReader:
    """The variables of a checkpoint, read with TensorFlow; the prefix "module/" of TensorFlow Hub is left out.

    A context manager: TensorFlow runs in a process of its own until the block ends, see `tensorflow_process.py`.

    Args:
        prefix: the path of the checkpoint without ".index".

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: a file that TensorFlow cannot read.
    """

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        # Python would look for numpy and TensorFlow in the folder of the file first, or with -c in the working directory,
        # which may be the checkpoint's: no code from there runs.
        start = "import sys; sys.path[:] = filter(None, sys.path); import runpy"
        code = f"{start}; runpy.run_path({str(_PROGRAM)!r}, run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(prefix)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},  # TensorFlow would take the memory of every GPU
        )
        try:
            shapes = self._answer("not a readable checkpoint of TensorFlow")["shapes"]
        except BaseException:
            self.close()
            raise
        self._names = {name.removeprefix("module/"): name for name in shapes}
        self.shapes = {name: tuple(shapes[stored]) for name, stored in self._names.items()}

    def __enter__(self) -> TensorFlowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends TensorFlow's process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def array(self, name: str) -> Any:
        """The values of a variable. ValueError where they cannot be read, such as in a file that is cut off."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why the process ended
            self._process.stdin.write(self._names[name].encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer(f"{name} cannot be read")
        content = self._process.stdout.read(answer["bytes"])
        if len(content) < answer["bytes"]:
            self._answer(f"{name} cannot be read")  # the process has ended
        return np.frombuffer(content, np.dtype(answer["dtype"])).reshape(self.shapes[name])

    def _answer(self, what: str) -> dict[str, Any]:
        """The next line from TensorFlow's process. ValueError with `what`, or ImportError, where it failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            code, last = self._process.wait(), said[-1] if said else "without a word"
            raise ValueError(f"{self._prefix}: {what}: TensorFlow ended with code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("missing"):
            raise ImportError(
                "TensorFlow reads its checkpoints: pip install 'albert-fast[tensorflow]' (here: "
                + answer["error"]
                + ")"
            )
        if "error" in answer:
            raise ValueError(f"{self._prefix}: {what}: {answer['error']}")
        return answer


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
    stem = path.name.partition(".data-")[0].removesuffix(".index").removesuffix(".meta")
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
        values = reader.array(name)
        if not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"{where}: {name} must hold floats, got {values.dtype}")
        values = values.astype(np.float32)
        tensors[key] = torch.from_numpy(np.ascontiguousarray(values.T if is_transposed(name) else values))
    return tensors
