"""embedding_layer_norm, (tokens, hidden size): BERT's embeddings. The backward writes all of the word table: read GB/s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups

pytestmark = pytest.mark.ops


def groups(options: Options) -> Iterator[OperatorGroup]:
    return operator_groups("embedding_layer_norm", options, lambda shape: "x".join(map(str, shape[:2])))


def test_embedding_layer_norm(row: Row, record: Any) -> None:
    record(row)
