"""All ways to run one model on the same weights: their files, made where they are missing, and their calls on a batch.

`Peers(...).bind(side, batch)` gives a callable without arguments whose result is last_hidden_state (B, S, H), a tensor
or an array, or a list of the parts of a batch that the side has sorted and split.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from albert_fast import ALBERTConfig, ALBERTModel
from albert_fast.inspect.timing import Side, interleaved
from albert_fast.models import reference
from shared import artifacts, engines, sides
from shared.models import Model
from shared.shapes import Batch

# What an engine needs beside torch; without bench's packages there is nothing to compare with.
_NEEDS = {
    "hf": ("transformers",),
    "torch": ("transformers",),
    "onnxruntime": ("transformers", "onnx", "onnxruntime"),
    "openvino": ("transformers", "onnx", "openvino"),
}
_CALIBRATION, _CALIBRATION_QUICK = 128, 8  # sequences


def why_not(side: str, model: Model) -> str | None:
    """Why `side` cannot run on this machine; None where it can."""
    needs = _NEEDS.get(sides.engine(side), ())
    if sides.engine(side) == "openvino" and sides.precision(side) == sides.INT8:
        needs = (*needs, "nncf")
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'albert-fast[bench]'"
    return model.why_not()


@dataclass(frozen=True)
class Peers:
    """One model, and every engine that runs it. Engines live as long as their calls, files until the system clears them."""

    model: Model
    device: torch.device
    dtype: torch.dtype
    threads: int
    quick: bool = False

    @property
    def config(self) -> ALBERTConfig:
        return self.model.config

    @cached_property
    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """Batches (ids, mask) of one sequence: no padding takes part in any range."""
        rows = self.model.calibration(_CALIBRATION_QUICK if self.quick else _CALIBRATION)
        return [(ids, torch.ones_like(ids)) for ids in (torch.tensor([row]) for row in rows)]

    def batch(self, name: str) -> Batch:
        return Batch.of(self.model.rows(name), self.config.pad_token_id or 0, self.device)

    def files(self, side: str) -> tuple[Path, ...]:
        """The files that `side` reads; for ONNX Runtime the exported graph and the fused one, or only the one it asks for.

        The fused one merges query, key and value, but holds a copy of the shared layer's weights for every layer.
        """
        int8 = sides.precision(side) == sides.INT8
        if sides.engine(side) == "openvino":
            ir = artifacts.openvino_ir(self._exported)
            return (artifacts.quantize_openvino(ir, self.calibration) if int8 else ir,)
        if sides.engine(side) == "onnxruntime":
            fused = artifacts.fuse(self._exported, self.config)
            graphs = (fused,) if "fused" in sides.options(side) else (self._exported, fused)
            return tuple(map(artifacts.quantize_onnx, graphs)) if int8 else graphs
        if sides.precision(side) != sides.FLOAT:
            return (self._integers(sides.precision(side)),)
        return (self._checkpoint,)

    def bind(self, side: str, batch: Batch) -> engines.Call:
        """A call of `side` on `batch`, which may be repeated; of several files the fastest is taken.

        Raises:
            Whatever the engine raises where it cannot load the model.
        """
        parts = [part for _, part in batch.by_length()] if "sorted" in sides.options(side) else None
        # Sub-batches have new lengths every time, so a user would not compile for them.
        rows, columns = batch.ids.shape
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        shape, dense = None if parts else (rows, columns), min(batch.lengths) == columns
        settings = engines.Settings(self.threads, shape, self.device.type, precision, dense)
        calls = [_call(engines.load(side, path, settings), batch, parts) for path in self.files(side)]
        if len(calls) == 1:
            return calls[0]
        trial = interleaved({str(i): Side(call) for i, call in enumerate(calls)}, rounds=1, warmup=1)
        return calls[min(range(len(calls)), key=lambda i: trial[str(i)][0])]

    def expected(self, batch: Batch) -> Tensor:
        """The float32 reference's last_hidden_state of the real tokens (T, H), one unpadded sequence after another."""
        model = reference.ALBERTModel.from_pretrained(self._checkpoint, device=self.device)
        with torch.inference_mode():
            rows = [model(ids[None, :n]).last_hidden_state[0] for ids, n in zip(batch.ids, batch.lengths, strict=True)]
        return torch.cat(rows)

    @cached_property
    def _checkpoint(self) -> Path:
        return artifacts.checkpoint(self.config, self.model.state)

    def _integers(self, precision: str) -> Path:
        """Our own integers, rounded again in every run, so that they come from the code that is measured."""
        folder = Path(self._scratch.name) / precision
        if not folder.exists():
            model = ALBERTModel.from_pretrained(
                self._checkpoint, precision=precision, calibration=self.calibration, device=self.device
            )
            model.save_pretrained(folder)
        return folder

    @cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="albert_fast-integers-")

    @cached_property
    def _exported(self) -> Path:
        return artifacts.export(self._checkpoint)


def _call(bind: engines.Bind, batch: Batch, parts: list[Batch] | None) -> engines.Call:
    if parts is None:
        return bind(batch.ids, batch.mask)
    calls = [bind(part.ids, part.mask) for part in parts]

    def call() -> list[Any]:
        return [one() for one in calls]

    return call
