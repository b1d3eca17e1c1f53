"""On CPUs: ours in float32, int16 and int8 against PyTorch, ONNX Runtime and OpenVINO, their int8 included.

Ids are `cpu_peers/fwd/float32/<model>-<batch>/<side>`, and `load/fwd/float32/base-8x128/<side>` for what loading costs.
float32 is the format of the weights and of the answer that all sides are compared with; a side names its own precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shared import peers
from shared.harness import Group, Options, Row
from shared.model_group import ModelGroup
from shared.models import BASE, LARGE, PLBERT, QUICK, Model, RandomModel
from shared.shapes import LOAD_BATCH, LOAD_SIDES, LOAD_SIDES_QUICK, cpu_shapes

from cpu.load_group import LoadGroup

pytestmark = [
    pytest.mark.cpu_peers,
    pytest.mark.skipif(torch.cuda.is_available(), reason="measured on CPUs only: hide the GPU from torch"),
]


def groups(options: Options) -> Iterator[Group]:
    models: tuple[Model, ...] = (RandomModel("base", BASE), RandomModel("large", LARGE), PLBERT())
    if options.quick:
        models = (RandomModel("base", QUICK), PLBERT(layers=2))
    cpu = torch.device("cpu")
    by_name = {model.name: peers.Peers(model, cpu, torch.float32, options.threads, options.quick) for model in models}
    for shape in cpu_shapes(options.quick, options.long):
        yield ModelGroup("cpu_peers", f"{shape.model}-{shape.name}", shape, by_name[shape.model])
    yield LoadGroup(f"base-{LOAD_BATCH}", LOAD_SIDES_QUICK if options.quick else LOAD_SIDES, by_name["base"])


def test_cpu_peers(row: Row, record: Any) -> None:
    record(row)
