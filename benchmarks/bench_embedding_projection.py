"""embedding_projection: lookups, LayerNorm, the product to the hidden size. The backward writes all of the word table.

Shapes in ids: tokens x embedding size x hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups

pytestmark = pytest.mark.ops


def groups(options: Options) -> Iterator[OperatorGroup]:
    return operator_groups("embedding_projection", options, lambda shape: "x".join(map(str, shape[:3])))


def test_embedding_projection(row: Row, record: Any) -> None:
    record(row)
