"""The operators composed of torch's fused ones; they run on a CPU without the C++ extension.

Results and gradients are those of the references, computed with operators that torch has fast kernels for. Shapes and names
are those of the public functions; there is no dropout here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.linear import linear


def activation(x: Tensor, act: str) -> Tensor:
    """act(x) for one of `ACTS`."""
    if act == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def bias_gelu(x: Tensor, bias: Tensor, act: str) -> Tensor:
    """act(x + bias): x (T, I), bias (I,)."""
    return activation(x + bias, act)


def add_layer_norm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x + bias + residual): x, residual (T, N), the others (N,)."""
    return F.layer_norm((x + bias) + residual, x.shape[1:], weight, ln_bias, eps)


def gelu_layer_norm(x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor, eps: float, act: str) -> Tensor:
    """LayerNorm(act(x + bias)): x (T, E), the others (E,)."""
    return F.layer_norm(activation(x + bias, act), x.shape[1:], weight, ln_bias, eps)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """act(x @ weight.T + bias): x (T, K), weight (N, K), bias (N,)."""
    return activation(linear(x, weight, bias), act)


def embedding_layer_norm(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    padding_idx: int,
    position_padding_idx: int = -1,
) -> Tensor:
    """The normalised embeddings (T, E); all ids lie in their tables. `inputs_embeds` (T, E) may replace input_ids."""
    row = padding_idx if 0 <= padding_idx < len(word) else None
    z = inputs_embeds if input_ids is None else F.embedding(input_ids, word, padding_idx=row)
    assert z is not None, "one of input_ids and inputs_embeds"
    if token_type_ids is not None and token_type is not None:
        z = z + F.embedding(token_type_ids, token_type)
    row = position_padding_idx if 0 <= position_padding_idx < len(position) else None
    z = z + F.embedding(position_ids, position, padding_idx=row)
    return F.layer_norm(z, z.shape[1:], ln_weight, ln_bias, eps)


def embedding_projection(
    lookup: Sequence[Tensor | None], proj_weight: Tensor, proj_bias: Tensor, eps: float, padding_idx: int
) -> Tensor:
    """The projected embeddings (T, H); `lookup` has the tensors that `embedding_layer_norm` takes."""
    normed = embedding_layer_norm(*lookup, eps=eps, padding_idx=padding_idx)  # type: ignore[arg-type, misc]
    return linear(normed, proj_weight, proj_bias)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_heads: int, softmax_scale: float
) -> Tensor:
    """Attention (Tq, H) of packed sequences; sequences of equal lengths that follow one another are computed together."""
    pairs = [(e - b, f - c) for (b, e), (c, f) in zip(_ranges(cu_seqlens_q), _ranges(cu_seqlens_k), strict=True)]
    parts: list[Tensor] = []
    first_query = first_key = 0
    for (queries, keys), run in itertools.groupby(pairs):
        count = len(list(run))
        if queries and keys:
            heads = [
                t[first : first + count * length]
                .unflatten(0, (count, length))
                .unflatten(-1, (num_heads, -1))
                .transpose(1, 2)
                for t, first, length in ((q, first_query, queries), (k, first_key, keys), (v, first_key, keys))
            ]
            out = _attention(heads[0], heads[1], heads[2], softmax_scale)
            parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        elif queries:
            parts.append(q.new_zeros((count * queries, q.shape[1])))
        first_query, first_key = first_query + count * queries, first_key + count * keys
    if not parts:
        return q.new_zeros(q.shape)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (B, heads, Sq, D); k, v (B, heads, Sk, D) -> (B, heads, Sq, D)."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # A softmax over one key has no gradient; the backward of torch's fused kernel gives rounding errors there.
        return torch.softmax((q @ k.transpose(2, 3)) * scale, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _ranges(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))
