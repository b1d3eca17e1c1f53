"""Sides in other environments: sentence-transformers' own backends, fastembed, infinity and CTranslate2, as their users call
them.

They want older versions of transformers and numpy than the rest, so each runs in a process of an environment that
`--peer-python` names (peer_worker.py). The process answers a call with a line, which costs a tenth of a millisecond; its
embeddings are fetched after the measurement.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import artifacts
from shared.workers import Worker
from torch import Tensor

_SCRIPT = Path(__file__).with_name("peer_worker.py")
_COMMON = ("sentence-transformers", "transformers", "torch")
_ONNX, _OPENVINO = ("optimum-onnx", "onnxruntime"), ("optimum-intel", "openvino", "nncf", "datasets")


@dataclass(frozen=True)
class _Peer:
    """files: which of peer_worker's files it reads; "" for the model's folder. packages: by their names in an index."""

    files: str
    packages: tuple[str, ...]


_PEERS = {
    "st-onnx-o3": _Peer("onnx", (*_COMMON, *_ONNX)),
    "st-onnx-int8": _Peer("onnx", (*_COMMON, *_ONNX)),
    "st-openvino": _Peer("openvino", (*_COMMON, *_OPENVINO)),
    "st-openvino-bf16": _Peer("openvino", (*_COMMON, *_OPENVINO)),
    "st-openvino-int8": _Peer("openvino", (*_COMMON, *_OPENVINO)),
    "fastembed": _Peer("onnx", ("fastembed", *_COMMON, *_ONNX)),
    "infinity": _Peer("", ("infinity-emb", *_COMMON)),
    "ctranslate2": _Peer("", ("ctranslate2",)),
}
TRANSLATOR = "ctranslate2"
BACKENDS = tuple(side for side in _PEERS if side.startswith("st-"))  # of a SentenceTransformer and a CrossEncoder
EMBEDDERS = tuple(side for side in _PEERS if side != TRANSLATOR)
# O3 computes GELU by tanh, another function than the model's: embeddings of all-MiniLM-L6-v2 err by 1e-3.
ALLOWED = {"st-onnx-o3": 5e-3, "fastembed": 5e-3}


@cache
def _versions(python: str, packages: tuple[str, ...]) -> dict[str, str | None]:
    worker = Worker(python, _SCRIPT)
    try:
        found: dict[str, str | None] = worker.ask(do="versions", packages=packages)
    finally:
        worker.close()
    return found


def environment(side: str, pythons: Sequence[str]) -> tuple[str, dict[str, str | None]] | str:
    """The first of `pythons` that has the side's packages, with their versions; or why there is none."""
    packages, lacking = _PEERS[side].packages, [f"no --peer-python for {side} (benchmarks/README.md)"]
    for python in pythons:
        versions = _versions(python, packages)
        missing = [package for package, version in versions.items() if version is None]
        if not missing:
            return python, versions
        lacking.append(f"{python} lacks {' and '.join(missing)}")
    return "not measured: " + (lacking[0] if len(lacking) == 1 else "; ".join(lacking[1:]))


def why_not(side: str, pythons: Sequence[str]) -> str | None:
    """Why a peer cannot run with these environments; None where it can, and for every other side."""
    found = environment(side, pythons) if side in _PEERS else None
    return found if isinstance(found, str) else None


def version_text(side: str, pythons: Sequence[str]) -> str | None:
    """The versions that a peer runs with, in words; None for every other side."""
    found = environment(side, pythons) if side in _PEERS else None
    return None if found is None or isinstance(found, str) else ", ".join(f"{k} {v}" for k, v in found[1].items())


class PeerCall:
    """A call in another environment, and its answer.

    Args:
        folder: the model, as sentence-transformers reads it. inputs, calibration: texts, or pairs of texts. The export takes
            one column of texts, so it calibrates on each text of a pair by itself.

    Raises:
        RuntimeError: no environment has the library, or it failed, with its own words.
    """

    def __init__(
        self,
        side: str,
        pythons: Sequence[str],
        folder: Path,
        inputs: Sequence[Any],
        calibration: Sequence[Any],
        threads: int,
    ) -> None:
        found = environment(side, pythons)
        if isinstance(found, str):
            raise RuntimeError(found)
        python, versions = found
        pairs = not isinstance(inputs[0], str)
        self._worker = Worker(python, _SCRIPT)
        try:
            files = _PEERS[side].files
            if files:
                texts = [text for one in calibration for text in ([one] if isinstance(one, str) else one)]
                folder = self._made(files, folder, pairs, texts, versions)
            self._worker.ask(do="load", side=side, folder=str(folder), inputs=inputs, pairs=pairs, threads=threads)
        except RuntimeError:
            self.close()
            raise

    def _made(
        self, files: str, folder: Path, pairs: bool, calibration: list[str], versions: dict[str, str | None]
    ) -> Path:
        made_of = repr([_digest(folder), sorted(versions.items()), calibration])
        name = f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}-peer-{files}"

        def write(target: Path) -> None:
            request = {"files": files, "source": str(folder), "pairs": pairs, "calibration": calibration}
            self._worker.ask(do="make", target=str(target), **request)

        return artifacts.made_once(name, write)

    def __call__(self) -> PeerCall:
        self._worker.ask(do="call")
        return self

    def answer(self) -> Tensor:
        """The last call's embeddings (N, D) or scores (N,)."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "answer.npy")
            self._worker.ask(do="save", path=str(path))
            return torch.from_numpy(np.load(path))

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in (folder / "config.json", folder / "model.safetensors"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
