"""bias_gelu, (tokens, intermediate size): the seam between the FFN's two products. Limited by memory: read GB/s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups

pytestmark = pytest.mark.ops


def groups(options: Options) -> Iterator[OperatorGroup]:
    return operator_groups("bias_gelu", options, lambda shape: "x".join(map(str, shape)))


def test_bias_gelu(row: Row, record: Any) -> None:
    record(row)
