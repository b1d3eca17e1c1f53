"""ALBERT-base end to end: ours, the plain reference, Hugging Face, torch.compile, ONNX Runtime and OpenVINO.

Ids are `model/fwd/<dtype>/<batch>x<length> or <source>-<rows>/<side>`; GFLOPS count the
operations of real tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peers
import pytest
import torch
from harness import Options, Row
from shapes import BASE, QUICK, Batch, Shape, model_operations, shape_list
from torch import Tensor

from albert_fast.testing.timing import Side

pytestmark = pytest.mark.model


class ModelGroup:
    """One batch, the sides of its shape."""

    bytes_moved = None
    pause = True

    def __init__(self, shape: Shape, model: peers.Peers) -> None:
        self.shape, self.model = shape, model
        self.dtype = model.dtype
        # torch.compile records its CUDA graphs in the first calls.
        self.warmup = shape.warmup + (2 if model.device.type == "cuda" else 0)
        self.key = f"model/fwd/{str(model.dtype).removeprefix('torch.')}/{shape.name}"
        self._batch: Batch | None = None

    @property
    def batch(self) -> Batch:
        if self._batch is None:
            config = self.model.config
            self._batch = Batch.of(self.shape.rows(config.vocab_size), config.pad_token_id or 0, self.model.device)
        return self._batch

    @property
    def operations(self) -> float:
        return model_operations(self.model.config, self.batch.lengths)

    def sides(self) -> tuple[str, ...]:
        return self.shape.sides

    def why_not(self, side: str) -> str | None:
        return peers.why_not(side, self.model.device)

    def build(self, side: str) -> Side:
        return Side(self.model.bind(side, self.batch))

    def expected(self) -> tuple[Tensor, ...]:
        return (self.model.expected(self.batch),)

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        return (self.batch.real(torch.as_tensor(output)).float(),)

    def close(self) -> None:
        self._batch = None
        torch.compiler.reset()


def groups(options: Options) -> Iterator[ModelGroup]:
    device = options.device
    model = peers.Peers(
        config=QUICK if options.quick else BASE,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        threads=options.threads,
    )
    for shape in shape_list(device.type, options.quick, options.long):
        yield ModelGroup(shape, model)


def test_model(row: Row, record: Any) -> None:
    record(row)
