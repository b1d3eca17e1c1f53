"""Recovers the padding mask (B, S) from what transformers hands to a stack of layers.

A model's forward expands the user's mask for its attention implementation: (B, 1, S, S) or (B, 1, 1, S), bool or added to the
scores. Looking at it costs about one pass over its elements; attention computes thousands of operations for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOT_PADDING = "the attention mask is more than padding"


def padding_mask(mask: object, shape: tuple[int, int]) -> Tensor | str | None:
    """(B, S), False at padding, None where every token is real, or the reason why `mask` is no padding mask.

    Args:
        mask: (B, S), (B, 1, 1, S) or (B, 1, S, S), or with B = 1; bool (True: attend), numbers added to the scores, or, with
            two dimensions, 0 at padding. shape: (B, S).
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return f"the attention mask is a {type(mask).__name__}"
    batch, columns = shape
    if mask.dim() == 2:
        return mask.expand(shape) != 0 if mask.shape in ((batch, columns), (1, columns)) else NOT_PADDING
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != columns:
        return NOT_PADDING
    if mask.shape[2] not in (1, columns):
        return NOT_PADDING
    first = mask[:, 0, 0]
    if mask.shape[2] != 1 and columns and mask.stride(2) != 0 and not bool((mask[:, 0] == first[:, None]).all()):
        return NOT_PADDING
    if mask.dtype == torch.bool:
        return first.expand(shape)
    if not mask.is_floating_point():
        return NOT_PADDING
    # Added to the scores: 0 at real tokens; at padding the smallest number, or -inf, and nothing between.
    real = first == 0
    if not bool((real | (first <= torch.finfo(mask.dtype).min)).all()):
        return NOT_PADDING
    return real.expand(shape)
