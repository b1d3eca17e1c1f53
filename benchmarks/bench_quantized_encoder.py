"""quantized_encoder, (tokens of each sequence; ALBERT-base), int8: all layers in one call, against a simulation in floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups

pytestmark = pytest.mark.ops


def groups(options: Options) -> Iterator[OperatorGroup]:
    return operator_groups("quantized_encoder", options, lambda shape: f"{len(shape[0])}x{shape[0][0]}")


def test_quantized_encoder(row: Row, record: Any) -> None:
    record(row)
