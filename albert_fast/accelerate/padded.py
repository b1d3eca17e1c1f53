"""Every row of a padded batch as a query, padding too, and the real tokens of its sequence as keys: what transformers computes.

Nothing reads the rows at padding as keys. A caller that reads the encoder's result there (ColBERT's query expansion) gets the
numbers that the original forward would give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layers.packing import Packing


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

    @property
    def has_own_keys(self) -> bool:
        return True

    def keys(self, hidden: Tensor) -> tuple[Tensor, Packing]:
        """(B * S, H) -> the rows of real tokens (Tk, H), and their packing."""
        assert self.real is not None
        assert self.real.indices is not None
        return hidden.index_select(0, self.real.indices), self.real
