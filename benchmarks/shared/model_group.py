"""The question of how long a model takes on a batch: `ModelGroup` measures every engine on it, interleaved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from albert_fast.inspect.timing import Side
from shared import peers, sides
from shared.harness import CallGroup, allowed_error
from shared.shapes import Batch, Shape, model_operations


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class ModelGroup(CallGroup):
    """One batch, the sides of its shape."""

    bytes_moved = None
    pause = True  # engines bring their own threads
    flushes = 1  # a small batch's launches are part of the answer

    def __init__(self, op: str, shape_name: str, shape: Shape, model: peers.Peers) -> None:
        self.shape, self.model = shape, model
        self.dtype, self.device = model.dtype, model.device
        # torch.compile records its CUDA graphs in the first calls.
        self.warmup = shape.warmup + (2 if model.device.type == "cuda" else 0)
        self.key = f"{op}/fwd/{dtype_name(model.dtype)}/{shape_name}"
        self._batch: Batch | None = None

    @property
    def batch(self) -> Batch:
        if self._batch is None:
            self._batch = self.model.batch(self.shape.name)
        return self._batch

    @property
    def operations(self) -> float:
        return model_operations(self.model.config, self.batch.lengths)

    def sides(self) -> tuple[str, ...]:
        return self.shape.sides

    def why_not(self, side: str) -> str | None:
        return peers.why_not(side, self.model.model)

    def ours(self, side: str) -> str:
        return sides.ours(side)

    def allowed(self, side: str) -> float:
        return allowed_error(side, self.dtype)

    def build(self, side: str) -> Side:
        return Side(self.model.bind(side, self.batch))

    def expected(self) -> tuple[Tensor, ...]:
        return (self.model.expected(self.batch),)

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        if isinstance(output, list):
            output = self.batch.join([torch.as_tensor(part) for part in output])
        return (self.batch.real(torch.as_tensor(output)).float(),)

    def close(self) -> None:
        self._batch = None
        torch.compiler.reset()
