"""Attention of a layer: query, key and value are three Linears with parameters of their own, and one product at run time.

An encoder's tokens attend to their own sequence. A decoder's attend to the tokens before them, whose keys and values may come
from a cache, and to the source, whose keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..runtime.derived import Derived
from ..runtime.linear import linear
from ..runtime.registration import is_traced
from .adapters import check_read, is_plain_linear, product, project
from .cache import DecoderCache, KeyRows
from .packing import Packing
from .run import Run
from .spec import LayerSpec
from .wanted import WantedRows, take

# The weight (3H, H) and the bias (3H,) of query, key and value, one below the other.
FusedQKV = tuple[Tensor, Tensor]


def _concatenated(tensors: Sequence[Tensor]) -> FusedQKV:
    return torch.cat(list(tensors[:3])), torch.cat(list(tensors[3:]))


# Kept for calls without a gradient on a CPU, where copying the weights takes as long as a layer of few tokens.
_FUSED = Derived(_concatenated)


class Attention(nn.Module):
    """Attention of every token to all tokens of its sequence, the output projection, and LayerNorm of the sum with the input.

    The names of modules are those of Hugging Face's ALBERT. A subclass of another family builds them in `build`, and has
    properties of these names.

    causal: whether a token attends only to itself and the tokens before it.
    """

    causal: ClassVar[bool] = False

    query: Any  # Linears, or their replacements
    key: Any
    value: Any
    dense: Any
    LayerNorm: Any  # absent where the layer holds it

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.scale = spec.head_dim**-0.5
        self.probs_dropout_p = spec.attention_dropout
        self.dropout_p = spec.hidden_dropout
        self.build(spec)

    def build(self, spec: LayerSpec) -> None:
        """Make the modules."""
        width = spec.hidden_size
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=spec.layer_norm_eps)

    def fused(self) -> FusedQKV | None:
        """Weight (3H, H) and bias (3H,) of query, key and value, one below the other, in autocast's dtype where it is on.

        None where one of the three is more than a Linear, has no bias, or differs from the others in dtype or device.
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
                return None  # a compiled graph keeps nothing between calls: three products are less work than copies
            fused = _FUSED(tensors)
        else:
            fused = _concatenated(tensors)
        if torch.is_autocast_enabled(device) and first.dtype != torch.float64:
            # Rounded once here: autocast would round it at each application, because it is not a parameter.
            weight, bias = (t.to(torch.get_autocast_dtype(device)) for t in fused)
            return weight, bias
        return fused

    def as_one_linear(self) -> nn.Linear:
        """query, key and value as one Linear (H -> 3H) without a gradient.

        Raises:
            RuntimeError: `fused` is None.
        """
        if (fused := self.fused()) is None:
            raise RuntimeError("query, key and value are not three Linears of one dtype with biases")
        one = nn.Linear(self.query.in_features, 3 * self.query.out_features, device="meta")
        one.weight, one.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in fused)
        return one

    def query_key_value(self, wanted: Tensor, hidden: Tensor, fused: FusedQKV | None) -> tuple[Tensor, ...]:
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
        wanted: WantedRows | None,
        run: Run,
        fused: FusedQKV | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """(T, H) -> (T, H), or (Tq, H) for the rows that are wanted. `fused` is the result of `self.fused()`, if known; `norm` is
        given where the layer holds the LayerNorm."""
        residual, cu_seqlens_q, max_seqlen_q = hidden, packing.cu_seqlens, packing.max_seqlen
        if wanted is not None:
            residual, cu_seqlens_q, max_seqlen_q = take(hidden, wanted.rows), wanted.cu_seqlens, wanted.max_seqlen
        others, keys = packing.keys(hidden)
        q, k, v = self.query_key_value(residual, others, self.fused() if fused is None else fused)
        if run.attentions is not None:
            run.attentions.append(_probabilities(q, k, packing, self.num_heads, self.scale))
        rows = KeyRows(k, v, keys.cu_seqlens, keys.max_seqlen)
        context = self.context(q, rows, cu_seqlens_q, max_seqlen_q, run, packing.sequence_order)
        if run.listen is not None:
            run.listen(self, hidden)
            run.listen(self.dense, context)
        return add_norm(product(self.dense, context), residual, self.LayerNorm if norm is None else norm, self, run)

    def context(
        self,
        q: Tensor,
        rows: KeyRows,
        cu_seqlens: Tensor,
        max_seqlen: int,
        run: Run,
        sequence_order: Tensor | None = None,
    ) -> Tensor:
        """What the queries (Tq, H) of the sequences `cu_seqlens` (B + 1,) read of the values in `rows`: (Tq, H)."""
        p, seed = dropout(self, self.probs_dropout_p)
        return ops.attention(
            q,
            rows.keys,
            rows.values,
            cu_seqlens,
            rows.begins,
            max_seqlen,
            rows.max_seqlen,
            self.num_heads,
            self.scale,
            p,
            seed,
            sequence_order=sequence_order,
            causal=self.causal,
            key_lengths=rows.lengths,
            backend=run.backend,
        )

    def source_rows(self, states: Tensor, packing: Packing) -> KeyRows:
        """The keys and values of a source's states (Ts, H), for `attend_source`."""
        fused = self.fused()
        if fused is None:
            keys, values = project(self.key, states), project(self.value, states)
        else:
            (weight, bias), width = fused, states.shape[1]
            keys, values = ops.split_columns(linear(states, weight[width:], bias[width:]), width)
        return KeyRows(keys, values, packing.cu_seqlens, packing.max_seqlen)

    def attend_source(self, hidden: Tensor, packing: Packing, rows: KeyRows, run: Run) -> Tensor:
        """(T, H) -> (T, H): every token attends to all rows of its sequence's source."""
        q = project(self.query, hidden)
        context = self.context(q, rows, packing.cu_seqlens, packing.max_seqlen, run, packing.sequence_order)
        return add_norm(product(self.dense, context), hidden, self.LayerNorm, self, run)

    def attend_cache(
        self, hidden: Tensor, packing: Packing, cache: DecoderCache, step: int, run: Run, fused: FusedQKV | None = None
    ) -> Tensor:
        """(B, H), the next token of each sequence -> (B, H): its keys and values join the cache, and it attends to all there.

        Args:
            step: which of the layers that run one after another this is; each has rows of its own in the cache.
        """
        width = hidden.shape[1]
        if fused is None:
            q = project(self.query, hidden)
            rows = torch.cat([project(self.key, hidden), project(self.value, hidden)], 1)
        else:
            joined = linear(hidden, *fused)
            q, rows = joined[:, :width], joined[:, width:]
        context = self.context(q, cache.append(step, rows), packing.cu_seqlens, packing.max_seqlen, run)
        return add_norm(product(self.dense, context), hidden, self.LayerNorm, self, run)


def add_norm(
    x: tuple[Tensor, Tensor], residual: Tensor, norm: nn.LayerNorm, module: Attention | nn.Module, run: Run
) -> Tensor:
    """LayerNorm of residual (T, H) and of x, a product (T, H) and its bias (H,), after dropout as `module` has it."""
    check_read(norm, nn.LayerNorm, "a layer's LayerNorm")
    p, seed = dropout(module, module.dropout_p)  # type: ignore[arg-type]
    return ops.add_layer_norm(*x, residual, norm.weight, norm.bias, norm.eps, p, seed, backend=run.backend)


def dropout(module: nn.Module, p: float) -> tuple[float, Tensor | None]:
    """The probability to apply and a new seed for it: none in eval mode."""
    return (p, ops.draw_seed()) if module.training and p else (0.0, None)


def _probabilities(q: Tensor, k: Tensor, packing: Packing, num_heads: int, scale: float) -> Tensor:
    """(B, heads, S, S), zeros where the query or the key is padding; computed only for callers who ask for them."""
    q, k = (packing.scatter(t).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    real = None if packing.indices is None else packing.mask()[:, None, :, None]
    scores = (q.float() @ k.float().transpose(2, 3)) * scale
    if real is not None:
        scores = scores.masked_fill(~real.transpose(2, 3), torch.finfo(torch.float32).min)
    probabilities = torch.softmax(scores, dim=-1)
    return (probabilities if real is None else probabilities * (real & real.transpose(2, 3))).to(q.dtype)
