"""The operators composed of torch's fused ones; they run on a CPU without the C++ extension.

Results and gradients are those of the references, computed with operators that torch has fast kernels for. Shapes and names
are those of the public functions; there is no dropout here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Iterable[tuple[tuple[int, int], tuple[int, int]]],
    num_heads: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """Attention (Tq, H); `sequences` has the (begin, end) of each one's queries, which follow one another, and of its keys.

    Sequences of equal lengths that follow one another are computed together.
    """
    out = []
    for (length_q, length_k), run in itertools.groupby(sequences, lambda pair: tuple(e - b for b, e in pair)):
        pairs = list(run)
        # Causal queries before the first key see none.
        blind = length_q if not length_k else max(length_q - length_k, 0) if causal else 0
        first = pairs[0][0][0]
        queries = q[first : first + len(pairs) * length_q].unflatten(0, (len(pairs), length_q))
        parts = [torch.zeros_like(queries[:, :blind])]
        if blind < length_q:
            keys = _gathered(k, pairs), _gathered(v, pairs)
            heads = [t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (queries[:, blind:], *keys)]
            parts.append(_attention(heads[0], heads[1], heads[2], softmax_scale, causal).transpose(1, 2).flatten(2))
        out.append((torch.cat(parts, dim=1) if blind else parts[-1]).flatten(0, 1))
    if not out:
        return q.new_zeros(q.shape)
    return out[0] if len(out) == 1 else torch.cat(out)


def _gathered(x: Tensor, pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> Tensor:
    """(B, Sk, H), the keys or values of sequences of one length; a view where they follow one another."""
    ranges = [keys for _, keys in pairs]
    if all(before[1] == after[0] for before, after in itertools.pairwise(ranges)):
        return x[ranges[0][0] : ranges[-1][1]].unflatten(0, (len(ranges), -1))
    return torch.stack([x[begin:end] for begin, end in ranges])


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q (B, heads, Sq, D); k, v (B, heads, Sk, D) -> (B, heads, Sq, D); with `causal` Sq is at most Sk."""
    seen = None
    if causal and q.shape[2] > 1:  # the last query sees every key
        seen = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # A softmax over one key has no gradient; the backward of torch's fused kernel gives rounding errors there.
        scores = (q @ k.transpose(2, 3)) * scale
        return torch.softmax(scores if seen is None else scores.masked_fill(~seen, float("-inf")), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
