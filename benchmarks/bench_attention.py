"""attention of packed sequences against torch's scaled_dot_product_attention on the same, equally long sequences.

Shapes in ids: sequences x length x heads x head size. Limited by arithmetic: read GFLOPS.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups
from torch import Tensor

pytestmark = pytest.mark.ops


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, num_heads: int, softmax_scale: float, **_: Any
) -> Tensor:
    """What the OpCase computes sequence by sequence, in one call: sequences of one length are a dense batch."""
    rows = len(cu_seqlens_q) - 1
    query, key, value = (t.view(rows, -1, num_heads, t.shape[1] // num_heads).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, scale=softmax_scale).transpose(1, 2).reshape(q.shape)


def _shape_name(shape: Any) -> str:
    lengths, _, heads, head_size = shape
    return f"{len(lengths)}x{lengths[0]}x{heads}x{head_size}"


def groups(options: Options) -> Iterator[OperatorGroup]:
    return operator_groups("attention", options, _shape_name, sdpa)


def test_attention(row: Row, record: Any) -> None:
    record(row)
