"""add_layer_norm, (tokens, hidden size): the seam after both products of the layer. Limited by memory: read GB/s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups

pytestmark = pytest.mark.ops


def groups(options: Options) -> Iterator[OperatorGroup]:
    return operator_groups("add_layer_norm", options, lambda shape: "x".join(map(str, shape)))


def test_add_layer_norm(row: Row, record: Any) -> None:
    record(row)
