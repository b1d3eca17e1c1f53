"""ALBERT-base end to end, in PyTorch: ours, the plain reference, Hugging Face, torch.compile.

Ids are `model/fwd/<dtype>/<batch>x<length> or <source>-<rows>/<side>`; GFLOPS count the
operations of real tokens alone. Engines outside PyTorch and integers: cpu/bench_peers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shared import peers
from shared.harness import Options, Row
from shared.model_group import ModelGroup
from shared.models import BASE, QUICK, RandomModel
from shared.shapes import model_shapes

pytestmark = pytest.mark.model


def groups(options: Options) -> Iterator[ModelGroup]:
    device = options.device
    model = peers.Peers(
        RandomModel("base", QUICK if options.quick else BASE),
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        threads=options.threads,
        quick=options.quick,
    )
    for shape in model_shapes(device.type, options.quick):
        yield ModelGroup("model", shape.name, shape, model)


def test_model(row: Row, record: Any) -> None:
    record(row)
