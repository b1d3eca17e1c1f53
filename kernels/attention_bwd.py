"""Gradients of attention over packed sequences, no S x S matrix in memory (Dao 2023, FlashAttention-2, section 3.1.2).

With P the probabilities, G the gradient of the output and dP = G V^T:

    dV = P^T G        dS = P * (dP - mean)        dQ = scale dS K        dK = scale dS^T Q        mean = rowsum(P * dP)

Two kernels, each the only writer of its results, so that the same call gives the same bits: one owns BLOCK_M queries and
walks over their keys for dQ, the other owns BLOCK_N keys and walks over their queries for dK and dV. Both compute the
scores again.

FlashAttention-2 takes `mean` as rowsum(G * O). That equals rowsum(P * dP) but for the rounding of O and of either sum,
and where softmax is saturated the difference is all that dP - mean leaves: one key alone in its sequence would get a
gradient where there is none. So the sum is taken over the keys, in a walk of its own before that of dQ, and the one key
that may hold nearly all of a row is kept out of it (`_DOMINANT`). With n blocks of keys a block of queries costs dQ
5 n - 2 products of tiles, and dK and dV 4 n: where a sequence fits one block no more than FlashAttention-2's 7 n in two
kernels, at most 9 n.

FlashAttention-2 takes P as exp(score - log-sum-exp). The rounding of a large log-sum-exp scales a whole row of P: by 6 % at
scores of 1e6, by anything at 1e10. So the first walk finds the largest score of each row and the sum of exp(score - largest)
itself, by the online softmax of the forward, and the difference is taken before it is scaled: it is exact for the leading
keys, which alone matter. The kernel of dK and dV reads the largest score and the sum.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import _tuning
from ._attention_tiles import attention_bwd_tiles, choice_key
from ._common import COMPILER_OPTIONS, dropout_arguments, dropout_keep, product, round_to, rows_contiguous
from ._precision import multiplies_tf32
from ._tuning import Tiles
from .attention import (
    LOG2_E,
    all_products,
    heads_in_words,
    load_rows,
    own_columns,
    padded_heads,
    program_work,
    sequence_range,
)

# Where one key holds more of a row than this, its dP - mean is a sum over the other keys, not a difference of two numbers
# that agree.
_DOMINANT = tl.constexpr(0.9)
# A weight (relative to the largest of its row) above this may be a dominant key's: where a key dominates, all other weights
# are below 1 / 0.9 - 1.
_LEADING = tl.constexpr(0.75)


@triton.jit
def _weights(scores, row_shift, scale_log2):
    """exp(score - largest score of its row), from scores before softmax_scale; at most 1."""
    # The difference comes first: in one FMA with the scale, huge scores would differ from their own maximum. A kernel that
    # sums the same score in another order may find it above the maximum.
    return tl.exp2(tl.minimum((scores - row_shift) * scale_log2, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _keys_of_queries(
    q, q_rows, grad, grad_rows, queries, n_queries, k_base, v_base, stride_k_row, stride_v_row, first_key, n_keys,
    dropout_rows, seed_lo, seed_hi, dropout_threshold, dropout_scale,
    MASK_KEYS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Scores before softmax_scale (BLOCK_M, BLOCK_N) and the gradient dp of the probabilities, for BLOCK_N keys from
    `first_key` on, and these keys (BLOCK_N, D)."""
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    # 64 bits: key times row stride passes 2^31 elements in very long sequences.
    k_rows = k_base + keys.to(tl.int64) * stride_k_row
    v_rows = v_base + keys.to(tl.int64) * stride_v_row
    k = load_rows(k_rows[:, None] + dims[None, :], keys, n_keys, dims, MASK_KEYS, HEAD_DIM, BLOCK_D)
    v = k
    if CHUNK_D == BLOCK_D:
        v = load_rows(v_rows[:, None] + dims[None, :], keys, n_keys, dims, MASK_KEYS, HEAD_DIM, BLOCK_D)
    scores = all_products(
        q, q_rows, queries, n_queries, k, k_rows, keys, n_keys, True, MASK_KEYS, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
        CHUNK_D, TF32,
    )  # fmt: skip
    if MASK_KEYS:
        scores = tl.where((keys < n_keys)[None, :], scores, float("-inf"))
    dp = all_products(
        grad, grad_rows, queries, n_queries, v, v_rows, keys, n_keys, True, MASK_KEYS, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
        CHUNK_D, TF32,
    )  # fmt: skip
    if HAS_DROPOUT:
        keep = dropout_keep(seed_lo, seed_hi, dropout_threshold, dropout_rows[:, None], keys[None, :])
        dp *= tl.where(keep, dropout_scale, 0.0)
    return scores, dp, k


@triton.jit
def _shift(row_max):
    """What is subtracted from the scores of a row: its maximum, but 0 for -inf, whose difference to itself is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def _add_to_row_sums(scores, dp, row_max, leading, leading_dp, rest, rest_dp, scale_log2):
    """Adds a tile to four sums of each row: p and p * dp of the leading keys, and of all others. Returns the weights p too.

    Where a key dominates the row it is the only leading one in the end, with the weight 1: keys that led a smaller maximum
    have joined the others by then.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    rescale = tl.exp2((row_max - _shift(new_max)) * scale_log2)
    p = _weights(scores, _shift(new_max)[:, None], scale_log2)
    leads, overtaken = p > _LEADING, new_max > row_max
    rest = (rest + tl.where(overtaken, leading, 0.0)) * rescale + tl.sum(tl.where(leads, 0.0, p), axis=1)
    rest_dp = (rest_dp + tl.where(overtaken, leading_dp, 0.0)) * rescale + tl.sum(tl.where(leads, 0.0, p * dp), axis=1)
    leading = tl.where(overtaken, 0.0, leading * rescale) + tl.sum(tl.where(leads, p, 0.0), axis=1)
    leading_dp = tl.where(overtaken, 0.0, leading_dp * rescale) + tl.sum(tl.where(leads, p * dp, 0.0), axis=1)
    return p, new_max, leading, leading_dp, rest, rest_dp


@triton.jit
def _probabilities(p, normal):
    """Of weights p, with normal = 1 / their sum. A dominant key's weight is 1, whatever the rounding of its score."""
    probabilities = p * normal
    return tl.where(probabilities > _DOMINANT, normal, probabilities)


@triton.jit
def _score_gradient(probabilities, dp, mean, dominant_gap):
    """dS; `dominant_gap` is dp - mean of a key that dominates its row."""
    return probabilities * tl.where(probabilities > _DOMINANT, dominant_gap, dp - mean)


@triton.jit(
    do_not_specialize=["n_query_blocks", "n_queries_total", "n_keys_total", "seed_lo", "seed_hi", "dropout_threshold"]
)
def _attention_bwd_dq_kernel(
    grad_ptr,  # (Tq, num_heads * HEAD_DIM), gradient of the output, rows `stride_grad_row` elements apart
    q_ptr,  # (Tq, num_heads * HEAD_DIM), rows `stride_q_row` elements apart
    k_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_k_row` elements apart
    v_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_v_row` elements apart
    dq_ptr,  # (Tq, num_heads * HEAD_DIM), rows `dq_row_heads` * HEAD_DIM elements apart
    sums_ptr,  # (4, num_heads, Tq) float32: largest score, 1 / sum of weights, mean and dominant_gap of `_score_gradient`
    cu_seqlens_q_ptr,  # (B + 1,) int32
    cu_seqlens_k_ptr,  # (B + 1,) int32
    order_ptr,  # (B,) int32, or None for 0 to B - 1
    stride_grad_row,
    stride_q_row,
    stride_k_row,
    stride_v_row,
    dq_row_heads,
    num_heads,
    n_query_blocks,  # blocks of BLOCK_M queries in the longest sequence
    n_queries_total,  # Tq
    n_keys_total,  # T
    softmax_scale,
    scale_log2,  # softmax_scale * log2(e)
    seed_lo,  # int32 halves of the dropout seed
    seed_hi,
    dropout_threshold,  # int32 holding floor(p * 2^32)
    dropout_scale,  # 1 / (1 - p)
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM padded to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,  # columns of a head multiplied at a time; BLOCK_D, or a divisor of it
    TF32: tl.constexpr,  # whether float32 is multiplied so
):
    query_block, head, sequence = program_work(order_ptr, n_query_blocks, num_heads)
    first_query, n_queries = sequence_range(cu_seqlens_q_ptr, sequence, n_queries_total)
    if query_block * BLOCK_M >= n_queries:
        return
    first_token, n_keys = sequence_range(cu_seqlens_k_ptr, sequence, n_keys_total)

    dims = tl.arange(0, BLOCK_D)
    queries = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # 64 bits: token times row stride passes 2^31 elements in large batches.
    packed_queries = first_query.to(tl.int64) + queries
    column = head * HEAD_DIM
    q_rows = q_ptr + packed_queries * stride_q_row + column
    grad_rows = grad_ptr + packed_queries * stride_grad_row + column
    q, grad = q_ptr, grad_ptr
    if CHUNK_D == BLOCK_D:
        q = load_rows(q_rows[:, None] + dims[None, :], queries, n_queries, dims, True, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_rows[:, None] + dims[None, :], queries, n_queries, dims, True, HEAD_DIM, BLOCK_D)
    k_base = k_ptr + first_token.to(tl.int64) * stride_k_row + column
    v_base = v_ptr + first_token.to(tl.int64) * stride_v_row + column
    statistic = head.to(tl.int64) * n_queries_total + packed_queries
    dropout_rows = head * 0x10001 + packed_queries

    # The row sums of all keys come first. The last block of keys, the only one that may be partly filled, stays in
    # registers: short sequences are walked over once.
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    leading = tl.zeros([BLOCK_M], dtype=tl.float32)
    leading_dp, rest, rest_dp = leading, leading, leading
    last_key = (tl.maximum(n_keys, 1) - 1) // BLOCK_N * BLOCK_N
    for first_key in range(0, last_key, BLOCK_N):
        scores, dp, k = _keys_of_queries(
            q, q_rows, grad, grad_rows, queries, n_queries, k_base, v_base, stride_k_row, stride_v_row, first_key, n_keys,
            dropout_rows, seed_lo, seed_hi, dropout_threshold, dropout_scale,
            False, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32,
        )  # fmt: skip
        _, row_max, leading, leading_dp, rest, rest_dp = _add_to_row_sums(
            scores, dp, row_max, leading, leading_dp, rest, rest_dp, scale_log2
        )
    scores, last_dp, last_k = _keys_of_queries(
        q, q_rows, grad, grad_rows, queries, n_queries, k_base, v_base, stride_k_row, stride_v_row, last_key, n_keys,
        dropout_rows, seed_lo, seed_hi, dropout_threshold, dropout_scale,
        True, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32,
    )  # fmt: skip
    last_p, row_max, leading, leading_dp, rest, rest_dp = _add_to_row_sums(
        scores, last_dp, row_max, leading, leading_dp, rest, rest_dp, scale_log2
    )
    # Without keys all sums are zero, and so is the gradient; with keys a zero sum is NaN, as in torch.
    total = tl.where(n_keys == 0, 1.0, leading + rest)
    normal, row_shift = 1.0 / total, _shift(row_max)
    mean = (leading_dp + rest_dp) / total
    # Read where one key dominates: `leading` is 1, and leading_dp - mean would cancel.
    dominant_gap = (rest * leading_dp - rest_dp) / total

    last_ds = _score_gradient(_probabilities(last_p, normal[:, None]), last_dp, mean[:, None], dominant_gap[:, None])
    dq = product(round_to(last_ds, last_k.dtype), last_k, tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32), TF32)
    for first_key in range(0, last_key, BLOCK_N):
        scores, dp, k = _keys_of_queries(
            q, q_rows, grad, grad_rows, queries, n_queries, k_base, v_base, stride_k_row, stride_v_row, first_key, n_keys,
            dropout_rows, seed_lo, seed_hi, dropout_threshold, dropout_scale,
            False, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32,
        )  # fmt: skip
        probabilities = _probabilities(_weights(scores, row_shift[:, None], scale_log2), normal[:, None])
        ds = _score_gradient(probabilities, dp, mean[:, None], dominant_gap[:, None])
        dq = product(round_to(ds, k.dtype), k, dq, TF32)

    row_mask = queries < n_queries
    dq_ptrs = dq_ptr + packed_queries[:, None] * (dq_row_heads * HEAD_DIM) + (column + dims)[None, :]
    dq_mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(dq_ptrs, round_to(dq * softmax_scale, dq_ptr.dtype.element_ty), mask=dq_mask)
    plane = n_queries_total.to(tl.int64) * num_heads
    tl.store(sums_ptr + statistic, row_shift, mask=row_mask)
    tl.store(sums_ptr + plane + statistic, normal, mask=row_mask)
    tl.store(sums_ptr + 2 * plane + statistic, mean, mask=row_mask)
    tl.store(sums_ptr + 3 * plane + statistic, dominant_gap, mask=row_mask)


@triton.jit
def _add_queries(
    dk, dv, k, k_rows, v, v_rows, keys, n_keys, q_base, grad_base, sums_base, plane, stride_q_row, stride_grad_row,
    first_query, n_queries, scale_log2, first_dropout_row, seed_lo, seed_hi, dropout_threshold,
    dropout_scale,
    MASK_QUERIES: tl.constexpr, HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M queries from `first_query` on add to dk and dv (BLOCK_N, BLOCK_D).

    Everything is transposed, keys by queries: weights and score gradients are then left operands as they are.
    """
    queries = first_query + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    # 64 bits: query times row stride passes 2^31 elements in very long sequences.
    q_rows = q_base + queries.to(tl.int64) * stride_q_row
    grad_rows = grad_base + queries.to(tl.int64) * stride_grad_row
    q = load_rows(q_rows[:, None] + dims[None, :], queries, n_queries, dims, MASK_QUERIES, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_rows[:, None] + dims[None, :], queries, n_queries, dims, MASK_QUERIES, HEAD_DIM, BLOCK_D)
    valid = queries < n_queries
    row_shift = tl.load(sums_base + queries, mask=valid, other=0.0)
    normal = tl.load(sums_base + plane + queries, mask=valid, other=0.0)
    mean = tl.load(sums_base + 2 * plane + queries, mask=valid, other=0.0)
    dominant_gap = tl.load(sums_base + 3 * plane + queries, mask=valid, other=0.0)

    scores = all_products(
        k, k_rows, keys, n_keys, q, q_rows, queries, n_queries, True, MASK_QUERIES, BLOCK_N, BLOCK_M, HEAD_DIM, BLOCK_D,
        CHUNK_D, TF32,
    )  # fmt: skip
    probabilities = _probabilities(_weights(scores, row_shift[None, :], scale_log2), normal[None, :])
    dp = all_products(
        v, v_rows, keys, n_keys, grad, grad_rows, queries, n_queries, True, MASK_QUERIES, BLOCK_N, BLOCK_M, HEAD_DIM,
        BLOCK_D, CHUNK_D, TF32,
    )  # fmt: skip
    kept = probabilities
    if HAS_DROPOUT:
        rows = first_dropout_row + queries
        keep = dropout_keep(seed_lo, seed_hi, dropout_threshold, rows[None, :], keys[:, None])
        # A product, not a choice: a dropped NaN or infinity stays NaN, as in torch.
        factor = tl.where(keep, dropout_scale, 0.0)
        dp *= factor
        kept *= factor
    ds = _score_gradient(probabilities, dp, mean[None, :], dominant_gap[None, :])
    if MASK_QUERIES:
        # Zero times an infinite key would be NaN.
        kept = tl.where(valid[None, :], kept, 0.0)
        ds = tl.where(valid[None, :], ds, 0.0)
    dv = product(round_to(kept, grad.dtype), grad, dv, TF32)
    dk = product(round_to(ds, q.dtype), q, dk, TF32)
    return dk, dv


@triton.jit(
    do_not_specialize=["n_key_blocks", "n_queries_total", "n_keys_total", "seed_lo", "seed_hi", "dropout_threshold"]
)
def _attention_bwd_dkdv_kernel(
    grad_ptr,  # (Tq, num_heads * HEAD_DIM), gradient of the output, rows `stride_grad_row` elements apart
    q_ptr,  # (Tq, num_heads * HEAD_DIM), rows `stride_q_row` elements apart
    k_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_k_row` elements apart
    v_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_v_row` elements apart
    sums_ptr,  # (4, num_heads, Tq) float32, as the kernel of dQ wrote them
    dk_ptr,  # (T, num_heads * HEAD_DIM), rows `dkdv_row_heads` * HEAD_DIM elements apart
    dv_ptr,  # (T, num_heads * HEAD_DIM), likewise
    cu_seqlens_q_ptr,  # (B + 1,) int32
    cu_seqlens_k_ptr,  # (B + 1,) int32
    order_ptr,  # (B,) int32, or None for 0 to B - 1
    stride_grad_row,
    stride_q_row,
    stride_k_row,
    stride_v_row,
    dkdv_row_heads,
    num_heads,
    n_key_blocks,  # blocks of BLOCK_N keys in the longest sequence
    n_queries_total,  # Tq
    n_keys_total,  # T
    softmax_scale,
    scale_log2,  # softmax_scale * log2(e)
    seed_lo,  # int32 halves of the dropout seed
    seed_hi,
    dropout_threshold,  # int32 holding floor(p * 2^32)
    dropout_scale,  # 1 / (1 - p)
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM padded to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,  # columns of a head multiplied at a time; BLOCK_D, or a divisor of it
    TF32: tl.constexpr,  # whether float32 is multiplied so
):
    key_block, head, sequence = program_work(order_ptr, n_key_blocks, num_heads)
    first_token, n_keys = sequence_range(cu_seqlens_k_ptr, sequence, n_keys_total)
    if key_block * BLOCK_N >= n_keys:
        return
    first_query, n_queries = sequence_range(cu_seqlens_q_ptr, sequence, n_queries_total)

    dims = tl.arange(0, BLOCK_D)
    keys = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64 bits: token times row stride passes 2^31 elements in large batches.
    packed_keys = first_token.to(tl.int64) + keys
    packed_query = first_query.to(tl.int64)
    column = head * HEAD_DIM
    k_rows = k_ptr + packed_keys * stride_k_row + column
    v_rows = v_ptr + packed_keys * stride_v_row + column
    k, v = k_ptr, v_ptr
    if CHUNK_D == BLOCK_D:
        k = load_rows(k_rows[:, None] + dims[None, :], keys, n_keys, dims, True, HEAD_DIM, BLOCK_D)
        v = load_rows(v_rows[:, None] + dims[None, :], keys, n_keys, dims, True, HEAD_DIM, BLOCK_D)
    q_base = q_ptr + packed_query * stride_q_row + column
    grad_base = grad_ptr + packed_query * stride_grad_row + column
    statistic = head.to(tl.int64) * n_queries_total + packed_query
    plane = n_queries_total.to(tl.int64) * num_heads

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    full_queries = n_queries // BLOCK_M * BLOCK_M
    for block_query in range(0, full_queries, BLOCK_M):
        dk, dv = _add_queries(
            dk, dv, k, k_rows, v, v_rows, keys, n_keys, q_base, grad_base, sums_ptr + statistic, plane, stride_q_row,
            stride_grad_row, block_query, n_queries, scale_log2, head * 0x10001 + packed_query, seed_lo,
            seed_hi, dropout_threshold, dropout_scale,
            False, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32,
        )  # fmt: skip
    if full_queries < n_queries:
        dk, dv = _add_queries(
            dk, dv, k, k_rows, v, v_rows, keys, n_keys, q_base, grad_base, sums_ptr + statistic, plane, stride_q_row,
            stride_grad_row, full_queries, n_queries, scale_log2, head * 0x10001 + packed_query, seed_lo,
            seed_hi, dropout_threshold, dropout_scale,
            True, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32,
        )  # fmt: skip

    offsets = packed_keys[:, None] * (dkdv_row_heads * HEAD_DIM) + (column + dims)[None, :]
    mask = (keys < n_keys)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(dk_ptr + offsets, round_to(dk * softmax_scale, dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offsets, round_to(dv, dv_ptr.dtype.element_ty), mask=mask)


def attention_bwd(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dq: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    order: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int, num_heads: int, softmax_scale: float,
    dropout_p: float = 0.0, seed: int = 0,
) -> None:  # fmt: skip
    """Gradients of `attention_fwd` with respect to q, k and v.

    Args:
        grad: (Tq, H), gradient of its output, in q's dtype; rows may be strided.
        dq, dk, dv: (Tq, H), (T, H) and (T, H) in q's dtype, written as a whole, zeros where a sequence has no keys or no
            queries; rows may be a multiple of the head size apart, those of dk and dv alike.
        softmax_scale: not negative.
        The others: as it was given them; the same dropout_p and seed drop the same probabilities again.

    Raises:
        ValueError: a head size above 256, dropout_p outside [0, 1).
    """
    head_dim, sequences = q.shape[1] // num_heads, len(cu_seqlens_q) - 1
    grad = rows_contiguous(grad)
    tf32 = multiplies_tf32(q.dtype)
    dq_tiles, dkdv_tiles = attention_bwd_tiles(head_dim, q.dtype, max_seqlen_q, max_seqlen_k, dropout_p > 0.0, tf32)
    if not heads_in_words(num_heads, grad, q, k, v):
        grad, q, k, v = (padded_heads(t, num_heads) for t in (grad, q, k, v))
        gradients = wide_dq, wide_dk, wide_dv = tuple(torch.empty_like(t) for t in (q, k, v))
        attention_bwd(
            grad, q, k, v, wide_dq, wide_dk, wide_dv, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads,
            softmax_scale, dropout_p, seed,
        )  # fmt: skip
        for given, found in zip((dq, dk, dv), gradients, strict=True):
            given.unflatten(1, (num_heads, head_dim)).copy_(own_columns(found, num_heads, head_dim))
        return
    sums = torch.empty((4, num_heads, len(q)), dtype=torch.float32, device=q.device)
    schedule = (cu_seqlens_q, cu_seqlens_k, order, *(t.stride(0) for t in (grad, q, k, v)))
    # Zero times minus infinity, the maximum before the first key, would be NaN.
    scale_log2 = max(softmax_scale * LOG2_E, 1e-37)
    numbers = (len(q), len(k), softmax_scale, scale_log2, *dropout_arguments(dropout_p, seed))
    options = {"HAS_DROPOUT": dropout_p > 0.0, "HEAD_DIM": head_dim, **COMPILER_OPTIONS}

    def launch_dq(tiles: Tiles) -> None:
        n_blocks = triton.cdiv(max_seqlen_q, tiles["BLOCK_M"])
        _attention_bwd_dq_kernel[(n_blocks * num_heads * sequences,)](
            grad, q, k, v, dq, sums, *schedule, dq.stride(0) // head_dim, num_heads, n_blocks, *numbers,
            **options, **tiles,
        )  # fmt: skip

    def launch_dkdv(tiles: Tiles) -> None:
        n_blocks = triton.cdiv(max_seqlen_k, tiles["BLOCK_N"])
        _attention_bwd_dkdv_kernel[(n_blocks * num_heads * sequences,)](
            grad, q, k, v, sums, dk, dv, *schedule, dk.stride(0) // head_dim, num_heads, n_blocks, *numbers,
            **options, **tiles,
        )  # fmt: skip

    key = functools.partial(choice_key, head_dim, q.dtype, tf32, dropout_p, max_seqlen_q, max_seqlen_k)
    with torch.cuda.device_of(q):
        if len(q):
            launch_dq(_tuning.choose("attention_bwd_dq", key, dq_tiles, launch_dq))
        if len(k):
            launch_dkdv(_tuning.choose("attention_bwd_dkdv", key, dkdv_tiles, launch_dkdv))
