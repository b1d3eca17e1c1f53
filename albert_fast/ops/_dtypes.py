"""Changes of dtype that operators and losses share."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
