"""A Hugging Face ALBERT as ONNX files, made once for given weights and versions, then kept in the temporary folder."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from albert_fast import ALBERTConfig

_INPUTS, _OUTPUTS = ["input_ids", "attention_mask"], ["last_hidden_state"]
_OPSET = 17


class _LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_states: Tensor = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden_states


def export(model: nn.Module, state: Mapping[str, Tensor]) -> Path:
    """`model` with the weights `state` and eager attention, batch and length left open.

    By torch's TorchScript exporter: the graph that its successor makes is not recognised by the fusions below.
    """
    digest = hashlib.sha256()
    for name in ("torch", "transformers", "onnx"):
        digest.update(importlib.metadata.version(name).encode())
    for key, tensor in state.items():
        digest.update(key.encode() + tensor.numpy().tobytes())

    def write(path: Path) -> None:
        ids = torch.full((2, 8), 5)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's; a wrong trace shows in the comparison of outputs
            torch.onnx.export(
                _LastHiddenState(model).eval(),
                (ids, torch.ones_like(ids)),
                path,
                input_names=_INPUTS,
                output_names=_OUTPUTS,
                dynamic_axes={name: {0: "batch", 1: "sequence"} for name in _INPUTS + _OUTPUTS},
                opset_version=_OPSET,
                dynamo=False,
            )

    return _made_once(f"{digest.hexdigest()[:16]}.onnx", write)


def fuse(exported: Path, config: ALBERTConfig) -> Path:
    """The exported graph after ONNX Runtime's transformer optimizer: Attention, SkipLayerNormalization, FastGelu."""
    from onnxruntime.transformers.optimizer import optimize_model

    def write(path: Path) -> None:
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        optimize_model(str(exported), model_type="bert", opt_level=0, **sizes).save_model_to_file(str(path))

    return _made_once(f"{exported.stem}-ort{importlib.metadata.version('onnxruntime')}.onnx", write)


def _made_once(name: str, write: Callable[[Path], None]) -> Path:
    """The file `name` in our temporary folder, written aside and renamed, so that a kill leaves no half of it."""
    folder = Path(tempfile.gettempdir()) / f"albert_fast-benchmarks-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / name
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        write(aside)
        aside.rename(path)
    return path
