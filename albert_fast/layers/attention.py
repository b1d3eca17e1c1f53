"""A layer's self-attention: query, key and value apart, as parameters and modules, and one product at run time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..models.config import ALBERTConfig
from ..runtime.derived import Derived
from ..runtime.linear import linear
from ..runtime.registration import is_traced
from .adapters import check_read, is_plain_linear, product, project
from .packing import Packing, Queries, take

# The weight (3H, H) and the bias (3H,) of query, key and value, as one product.
Fused = tuple[Tensor, Tensor]


def _concatenated(tensors: Sequence[Tensor]) -> Fused:
    return torch.cat(list(tensors[:3])), torch.cat(list(tensors[3:]))


# Without a gradient, on a CPU, where a copy of the weights takes as long as a layer of few tokens.
_FUSED = Derived(_concatenated)


class Attention(nn.Module):
    """Self-attention. query, key and value are three Linears, and one product where nothing but Linears is there."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scale = config.head_dim**-0.5
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.probs_dropout_p = config.attention_probs_dropout_prob
        self.dropout_p = config.hidden_dropout_prob

    def fused(self) -> Fused | None:
        """Weight (3H, H) and bias (3H,) of query, key and value one below the other, in autocast's dtype where it is on.

        None where one of the three is more than a Linear, has no bias or another dtype, or lies elsewhere.
        """
        modules = (self.query, self.key, self.value)
        if not all(map(is_plain_linear, modules)):
            return None
        weights, biases = [module.weight for module in modules], [module.bias for module in modules]
        tensors, first = (*weights, *biases), weights[0]
        if any(t.dtype != first.dtype or t.device != first.device or not t.is_contiguous() for t in tensors):
            return None
        device, compiles = first.device.type, is_traced()
        if device == "cpu" and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            if compiles:
                return None  # a graph keeps nothing between calls: three products are less work than copies
            fused = _FUSED(tensors)
        else:
            fused = _concatenated(tensors)
        if torch.is_autocast_enabled(device) and first.dtype != torch.float64:
            # Once: autocast itself would round it at each application, as it is no parameter.
            weight, bias = (t.to(torch.get_autocast_dtype(device)) for t in fused)
            return weight, bias
        return fused

    def as_one_linear(self) -> nn.Linear:
        """query, key and value as a Linear (H -> 3H) without a gradient.

        Raises:
            RuntimeError: `fused` is None.
        """
        if (fused := self.fused()) is None:
            raise RuntimeError("query, key and value are not three Linears of one dtype with biases")
        one = nn.Linear(self.query.in_features, 3 * self.query.out_features, device="meta")
        one.weight, one.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in fused)
        return one

    def query_key_value(self, wanted: Tensor, hidden: Tensor, fused: Fused | None) -> tuple[Tensor, ...]:
        """Queries (Tq, H) of the rows `wanted` (Tq, H), which may be `hidden`; keys and values (T, H) of `hidden` (T, H)."""
        if fused is None:
            return project(self.query, wanted), project(self.key, hidden), project(self.value, hidden)
        (weight, bias), width = fused, hidden.shape[1]
        if wanted is hidden:
            return ops.split_columns(linear(hidden, weight, bias), width)
        q = linear(wanted, weight[:width], bias[:width])
        return q, *ops.split_columns(linear(hidden, weight[width:], bias[width:]), width)

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        queries: Queries | None,
        backend: str,
        attentions: list[Tensor] | None = None,
        fused: Fused | None = None,
    ) -> Tensor:
        residual = hidden
        cu_seqlens_q, max_seqlen_q = packing.cu_seqlens, packing.max_seqlen
        if queries is not None:
            residual = take(hidden, queries.rows)
            cu_seqlens_q, max_seqlen_q = queries.cu_seqlens, queries.max_seqlen
        q, k, v = self.query_key_value(residual, hidden, self.fused() if fused is None else fused)
        if attentions is not None:
            attentions.append(_probabilities(q, k, packing, self.num_heads, self.scale))
        p, seed = dropout(self, self.probs_dropout_p)
        context = ops.attention(
            q, k, v, cu_seqlens_q, packing.cu_seqlens, max_seqlen_q, packing.max_seqlen, self.num_heads, self.scale, p, seed,
            sequence_order=packing.order, backend=backend,
        )  # fmt: skip
        return add_norm(*product(self.dense, context), residual, self.LayerNorm, self, self.dropout_p, backend)


def add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, norm: nn.LayerNorm, module: nn.Module, dropout_p: float, backend: str
) -> Tensor:  # fmt: skip
    check_read(norm, nn.LayerNorm, "a layer's LayerNorm")
    p, seed = dropout(module, dropout_p)
    return ops.add_layer_norm(x, bias, residual, norm.weight, norm.bias, norm.eps, p, seed, backend=backend)


def dropout(module: nn.Module, p: float) -> tuple[float, Tensor | None]:
    return (p, ops.draw_seed()) if module.training and p else (0.0, None)


def _probabilities(q: Tensor, k: Tensor, packing: Packing, num_heads: int, scale: float) -> Tensor:
    """(B, heads, S, S), zeros wherever the query or the key is padded; only for callers who ask to see them."""
    q, k = (packing.scatter(t).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    real = None if packing.indices is None else packing.mask()[:, None, :, None]
    scores = (q.float() @ k.float().transpose(2, 3)) * scale
    if real is not None:
        scores = scores.masked_fill(~real.transpose(2, 3), torch.finfo(torch.float32).min)
    probabilities = torch.softmax(scores, dim=-1)
    return (probabilities if real is None else probabilities * (real & real.transpose(2, 3))).to(q.dtype)
