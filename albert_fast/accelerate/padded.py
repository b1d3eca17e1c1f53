"""Attention of every row of a padded batch, padding too, to the real tokens of its sequence: what transformers computes.

Nothing reads the rows at padding as keys. A caller that reads the encoder's result there (ColBERT's query expansion) gets the
numbers that the original forward would give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.adapters import product
from ..layers.attention import Attention, FusedQKV, add_norm, dropout
from ..layers.packing import Packing
from ..layers.run import Run
from ..layers.wanted import WantedRows


@dataclass(frozen=True)
class PaddedQueries(Packing):
    """A dense packing of all B * S rows, of which `real` are the keys."""

    real: Packing | None = None

    @classmethod
    def of(cls, real: Packing) -> PaddedQueries:
        """All rows of the padded batch that `real` packs."""
        assert real.shape is not None
        batch, columns = real.shape
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=real.cu_seqlens.device) * columns
        return cls(None, cu_seqlens, columns, real.shape, None, replace(real, sequence_order=None))


class PaddedAttention(Attention):
    """Attention whose queries are all rows of a `PaddedQueries`."""

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        wanted: WantedRows | None,
        run: Run,
        fused: FusedQKV | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """(B * S, H) -> (B * S, H)."""
        assert isinstance(packing, PaddedQueries)
        real = packing.real
        assert real is not None
        assert real.indices is not None
        keys = hidden.index_select(0, real.indices)
        q, k, v = self.query_key_value(hidden, keys, self.fused() if fused is None else fused)
        p, seed = dropout(self, self.probs_dropout_p)
        context = ops.attention(
            q,
            k,
            v,
            packing.cu_seqlens,
            real.cu_seqlens,
            packing.max_seqlen,
            real.max_seqlen,
            self.num_heads,
            self.scale,
            p,
            seed,
            backend=run.backend,
        )
        return add_norm(product(self.dense, context), hidden, self.LayerNorm if norm is None else norm, self, run)
