"""linear_cross_entropy, (labelled rows, embedding size, vocabulary): the MLM loss. Limited by arithmetic: read GFLOPS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups

pytestmark = pytest.mark.ops


def groups(options: Options) -> Iterator[OperatorGroup]:
    return operator_groups("linear_cross_entropy", options, lambda shape: "x".join(map(str, shape)))


def test_linear_cross_entropy(row: Row, record: Any) -> None:
    record(row)
