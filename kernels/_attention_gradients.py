"""Building blocks of attention's gradient: scores and gradients of probabilities of a tile, sums over rows, gradients of scores."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import dropout_factor
from .attention import HeadRows, all_products, hide_keys, load_head, load_operand

# If one key holds more of a row than this, its dP - mean is computed as a sum over the other keys, not as a difference of
# two numbers that agree.
DOMINANT = tl.constexpr(0.9)
# A weight (relative to the largest of its row) above this may belong to a dominant key: if a key dominates, all other weights
# are below 1 / 0.9 - 1.
_LEADING = tl.constexpr(0.75)


@triton.jit
def softmax_weights(scores, row_shift, scale_log2):
    """exp(score - largest score of its row), from scores before softmax_scale; at most 1."""
    # The difference is taken first: in one FMA with the scale, huge scores would differ from their own maximum. A kernel that
    # sums the same score in another order may find it above the maximum.
    return tl.exp2(tl.minimum((scores - row_shift) * scale_log2, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def scores_and_gradients(
    queries,  # HeadRows
    grads,  # HeadRows, gradients of the outputs
    keys,  # HeadKeys
    first_key,
    dropout_rows,  # (BLOCK_M,) rows of the dropout mask
    dropout,  # Dropout
    MASK_KEYS: tl.constexpr,  # whether some of the keys may be behind the end of the sequence, or unseen
    TILE: tl.constexpr,  # HeadTile
    seen=None,  # (BLOCK_M,) how many keys each query sees; None: all
):
    """For BLOCK_N keys from `first_key` on: scores before softmax_scale and gradients of probabilities (BLOCK_M, BLOCK_N),
    and these keys (BLOCK_N, D)."""
    key_indices = first_key + tl.arange(0, TILE.BLOCK_N)
    # 64 bits: key times row stride passes 2^31 elements in very long sequences.
    k_ptrs = keys.k_base + key_indices.to(tl.int64) * keys.stride_k_row
    v_ptrs = keys.v_base + key_indices.to(tl.int64) * keys.stride_v_row
    k = load_head(k_ptrs, key_indices, keys.n_keys, tl.arange(0, TILE.BLOCK_D), MASK_KEYS, TILE)
    v = load_operand(v_ptrs, key_indices, keys.n_keys, MASK_KEYS, TILE)
    k_rows = HeadRows(k, k_ptrs, key_indices, keys.n_keys)
    v_rows = HeadRows(v, v_ptrs, key_indices, keys.n_keys)
    scores = all_products(queries, k_rows, True, MASK_KEYS, TILE.BLOCK_M, TILE.BLOCK_N, TILE)
    if MASK_KEYS:
        scores = hide_keys(scores, key_indices, keys.n_keys, seen)
    dp = all_products(grads, v_rows, True, MASK_KEYS, TILE.BLOCK_M, TILE.BLOCK_N, TILE)
    if dropout.seed_lo is not None:
        dp *= dropout_factor(dropout, dropout_rows[:, None], key_indices[None, :])
    return scores, dp, k


@triton.jit
def row_shift_of(row_max):
    """What is subtracted from the scores of a row: its maximum, or 0 if that is -inf, whose difference to itself is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def add_to_row_sums(scores, dp, row_max, leading, leading_dp, rest, rest_dp, scale_log2):
    """Adds a tile to four sums of each row: p and p * dp of the leading keys, and of all others. Also returns the weights p.

    If a key dominates the row, it is the only leading key in the end and has weight 1: keys that led a smaller maximum have
    joined the others by then.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    rescale = tl.exp2((row_max - row_shift_of(new_max)) * scale_log2)
    p = softmax_weights(scores, row_shift_of(new_max)[:, None], scale_log2)
    leads, overtaken = p > _LEADING, new_max > row_max
    rest = (rest + tl.where(overtaken, leading, 0.0)) * rescale + tl.sum(tl.where(leads, 0.0, p), axis=1)
    rest_dp = (rest_dp + tl.where(overtaken, leading_dp, 0.0)) * rescale + tl.sum(tl.where(leads, 0.0, p * dp), axis=1)
    leading = tl.where(overtaken, 0.0, leading * rescale) + tl.sum(tl.where(leads, p, 0.0), axis=1)
    leading_dp = tl.where(overtaken, 0.0, leading_dp * rescale) + tl.sum(tl.where(leads, p * dp, 0.0), axis=1)
    return p, new_max, leading, leading_dp, rest, rest_dp


@triton.jit
def probabilities_of(p, normal):
    """Probabilities from weights p and normal = 1 / their sum. A dominant key's weight is 1, whatever the rounding of its score."""
    probabilities = p * normal
    return tl.where(probabilities > DOMINANT, normal, probabilities)


@triton.jit
def score_gradient(probabilities, dp, mean, dominant_gap):
    """dS; `dominant_gap` is dp - mean of the key that dominates a row."""
    return probabilities * tl.where(probabilities > DOMINANT, dominant_gap, dp - mean)
