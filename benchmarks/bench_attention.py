"""attention of packed sequences against torch's scaled_dot_product_attention on the same, equally long sequences.

Shapes in ids: sequences x length x heads x head size; `causal` as a decoder is trained; `decode` with one query for every
sequence, whose keys lie in a cache. Training is limited by arithmetic: read GFLOPS; decoding by memory: read GB/s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared.harness import Options, Row
from shared.operators import OperatorGroup, operator_groups
from torch import Tensor

pytestmark = pytest.mark.ops


# One step of a beam search over 16 sentences with 4 beams each.
DECODING = ((1,) * 64, (32,) * 64, 8, 64)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    num_heads: int,
    softmax_scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    **_: Any,
) -> Tensor:
    """What the OpCase computes sequence by sequence, in one call: sequences of one length are a dense batch."""
    rows = len(cu_seqlens_q) - 1
    if key_lengths is not None:
        index = (cu_seqlens_k[:, None] + torch.arange(max_seqlen_k, device=q.device)).flatten()
        k, v = k[index], v[index]
    query, key, value = (t.reshape(rows, -1, num_heads, t.shape[1] // num_heads).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2).reshape(q.shape)


class DecoderGroup(OperatorGroup):
    """Attention as a decoder calls it; torch.compile would only call the same fused operator."""

    def sides(self) -> tuple[str, ...]:
        return self.backend, "eager"


def _shape_name(shape: Any) -> str:
    lengths, _, heads, head_size = shape
    return f"{len(lengths)}x{lengths[0]}x{heads}x{head_size}"


def groups(options: Options) -> Iterator[OperatorGroup]:
    yield from operator_groups("attention", options, _shape_name, sdpa)
    yield from operator_groups(
        "attention", options, lambda shape: f"{_shape_name(shape)}-causal", sdpa, kind=DecoderGroup, causal=True
    )
    decoding = {"shapes": (DECODING,), "directions": (False,), "kind": DecoderGroup, "cached": True}
    yield from operator_groups("attention", options, lambda shape: "64x32x8x64-decode", sdpa, **decoding)


def test_attention(row: Row, record: Any) -> None:
    record(row)
