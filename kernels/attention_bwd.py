"""Gradients of attention over packed sequences, without an S x S matrix in memory (Dao 2023, FlashAttention-2, section 3.1.2).

With P the probabilities, G the gradient of the output and dP = G V^T:

    dV = P^T G        dS = P * (dP - mean)        dQ = scale dS K        dK = scale dS^T Q        mean = rowsum(P * dP)

There are two kernels. Each is the only writer of its results, so that the same call gives the same bits. In one a program takes
BLOCK_M queries and walks over their keys for dQ; in the other it takes BLOCK_N keys and walks over their queries for dK and
dV. Both compute the scores again.

FlashAttention-2 takes `mean` as rowsum(G * O). That equals rowsum(P * dP) up to the rounding of O and of both sums. Where
softmax is saturated, this difference is all that dP - mean leaves: a key that is alone in its sequence would get a gradient
although it has none. So this kernel takes the sum over the keys, in a walk of its own before that of dQ, and keeps the one
key that may hold nearly all of a row out of it (`DOMINANT` in _attention_gradients.py). With n blocks of keys a block of
queries costs 5 n - 2 products of tiles for dQ, and 4 n for dK and dV: no more than FlashAttention-2's 7 n in two kernels if a
sequence fits one block, and at most 9 n.

FlashAttention-2 takes P as exp(score - log-sum-exp). The rounding of a large log-sum-exp scales a whole row of P: by 6 % at
scores of 1e6, by any factor at 1e10. So the first walk finds the largest score of each row and the sum of exp(score - largest)
itself, by the online softmax of the forward, and takes the difference before scaling it: the difference is exact for the
leading keys, which alone matter. The kernel of dK and dV reads the largest score and the sum.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._attention_gradients import (
    add_to_row_sums,
    probabilities_of,
    row_shift_of,
    score_gradient,
    scores_and_gradients,
    softmax_weights,
)
from ._attention_tiles import attention_bwd_tiles, choice_key
from ._common import (
    COMPILER_OPTIONS,
    HEAD_STRIDE,
    Dropout,
    dropout_arguments,
    dropout_factor,
    product,
    round_to,
    rows_contiguous,
)
from ._precision import multiplies_tf32
from ._tuning import Tiles
from .attention import (
    LOG2_E,
    AttentionInputs,
    HeadKeys,
    HeadRows,
    HeadTile,
    all_products,
    heads_in_words,
    key_range,
    load_head,
    load_operand,
    own_columns,
    padded_heads,
    program_work,
    seen_keys,
    sequence_range,
    unmasked_keys,
)


class HeadQueries(NamedTuple):
    """Queries, gradients of outputs and row statistics of one head of one sequence."""

    q_base: Any  # address of the first query
    grad_base: Any  # address of its output's gradient
    sums_base: (
        Any  # address of its largest score; the other three statistics lie `plane`, 2 `plane`, 3 `plane` behind it
    )
    plane: Any
    stride_q_row: Any
    stride_grad_row: Any
    n_queries: Any


@triton.jit(
    do_not_specialize=["n_query_blocks", "n_queries_total", "n_keys_total", "seed_lo", "seed_hi", "dropout_threshold"]
)
def _attention_bwd_dq_kernel(
    inputs,  # AttentionInputs
    grad_ptr,  # (Tq, num_heads * HEAD_DIM), gradient of the output, rows `stride_grad_row` elements apart
    dq_ptr,  # (Tq, num_heads * HEAD_DIM), rows `dq_row_heads` * HEAD_DIM elements apart
    sums_ptr,  # (4, num_heads, Tq) float32: largest score, 1 / sum of weights, mean and dominant_gap of `score_gradient`
    stride_grad_row,
    dq_row_heads,
    num_heads,
    n_query_blocks,  # blocks of BLOCK_M queries in the longest sequence
    n_queries_total,  # Tq
    n_keys_total,  # T
    softmax_scale,
    scale_log2,  # softmax_scale * log2(e)
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    HEAD_DIM: tl.constexpr,  # this and the next five: the fields of HeadTile
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,
    TF32: tl.constexpr,
    CAUSAL: tl.constexpr,  # whether query i sees only the keys 0 to i + keys - queries
):
    # A program takes BLOCK_M queries of one head of one sequence.
    TILE: tl.constexpr = HeadTile(HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32)
    dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
    query_block, head, sequence = program_work(inputs.sequence_order_ptr, n_query_blocks, num_heads)
    first_query, n_queries = sequence_range(inputs.cu_seqlens_q_ptr, sequence, n_queries_total)
    if query_block * BLOCK_M >= n_queries:
        return
    first_token, n_keys = key_range(inputs, sequence, n_keys_total)

    dims = tl.arange(0, BLOCK_D)
    query_indices = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # 64 bits: token times row stride passes 2^31 elements in large batches.
    packed_queries = first_query.to(tl.int64) + query_indices
    column = head * HEAD_DIM
    q_ptrs = inputs.q_ptr + packed_queries * inputs.stride_q_row + column
    grad_ptrs = grad_ptr + packed_queries * stride_grad_row + column
    q = load_operand(q_ptrs, query_indices, n_queries, True, TILE)
    grad = load_operand(grad_ptrs, query_indices, n_queries, True, TILE)
    queries = HeadRows(q, q_ptrs, query_indices, n_queries)
    grads = HeadRows(grad, grad_ptrs, query_indices, n_queries)
    k_base = inputs.k_ptr + first_token.to(tl.int64) * inputs.stride_k_row + column
    v_base = inputs.v_ptr + first_token.to(tl.int64) * inputs.stride_v_row + column
    keys = HeadKeys(k_base, v_base, inputs.stride_k_row, inputs.stride_v_row, n_keys)
    statistic = head.to(tl.int64) * n_queries_total + packed_queries
    dropout_rows = head * HEAD_STRIDE + packed_queries

    # The row sums over all keys come first. The last block of keys, the only one that may be partly filled, stays in
    # registers: short sequences are walked over once. Causal: the last block that a query sees; blocks on the diagonal lie
    # before it if BLOCK_M is larger than BLOCK_N.
    n_seen, seen, blind = n_keys, None, n_keys == 0
    if CAUSAL:
        n_seen = seen_keys(query_block * BLOCK_M + BLOCK_M, n_queries, n_keys)
        seen = query_indices + (1 + n_keys - n_queries)
        blind = seen <= 0
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    leading = tl.zeros([BLOCK_M], dtype=tl.float32)
    leading_dp, rest, rest_dp = leading, leading, leading
    last_key = (tl.maximum(n_seen, 1) - 1) // BLOCK_N * BLOCK_N
    full_keys = last_key
    if CAUSAL:
        full_keys = tl.minimum(last_key, unmasked_keys(query_block * BLOCK_M, n_queries, n_keys, BLOCK_N))
    for first_key in range(0, full_keys, BLOCK_N):
        scores, dp, k = scores_and_gradients(queries, grads, keys, first_key, dropout_rows, dropout, False, TILE)
        _, row_max, leading, leading_dp, rest, rest_dp = add_to_row_sums(
            scores, dp, row_max, leading, leading_dp, rest, rest_dp, scale_log2
        )
    if CAUSAL:
        for first_key in range(full_keys, last_key, BLOCK_N):
            scores, dp, k = scores_and_gradients(
                queries, grads, keys, first_key, dropout_rows, dropout, True, TILE, seen
            )
            _, row_max, leading, leading_dp, rest, rest_dp = add_to_row_sums(
                scores, dp, row_max, leading, leading_dp, rest, rest_dp, scale_log2
            )
    scores, last_dp, last_k = scores_and_gradients(
        queries, grads, keys, last_key, dropout_rows, dropout, True, TILE, seen
    )
    last_p, row_max, leading, leading_dp, rest, rest_dp = add_to_row_sums(
        scores, last_dp, row_max, leading, leading_dp, rest, rest_dp, scale_log2
    )
    # Without keys all sums are 0, and so is the gradient; with keys a sum of 0 gives NaN, as in torch.
    total = tl.where(blind, 1.0, leading + rest)
    normal, row_shift = 1.0 / total, row_shift_of(row_max)
    mean = (leading_dp + rest_dp) / total
    # Read if one key dominates: then `leading` is 1, and leading_dp - mean would cancel.
    dominant_gap = (rest * leading_dp - rest_dp) / total

    last_ds = score_gradient(probabilities_of(last_p, normal[:, None]), last_dp, mean[:, None], dominant_gap[:, None])
    dq = product(round_to(last_ds, last_k.dtype), last_k, tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32), TF32)
    for first_key in range(0, full_keys, BLOCK_N):
        scores, dp, k = scores_and_gradients(queries, grads, keys, first_key, dropout_rows, dropout, False, TILE)
        probabilities = probabilities_of(softmax_weights(scores, row_shift[:, None], scale_log2), normal[:, None])
        ds = score_gradient(probabilities, dp, mean[:, None], dominant_gap[:, None])
        dq = product(round_to(ds, k.dtype), k, dq, TF32)
    if CAUSAL:
        for first_key in range(full_keys, last_key, BLOCK_N):
            scores, dp, k = scores_and_gradients(
                queries, grads, keys, first_key, dropout_rows, dropout, True, TILE, seen
            )
            probabilities = probabilities_of(softmax_weights(scores, row_shift[:, None], scale_log2), normal[:, None])
            ds = score_gradient(probabilities, dp, mean[:, None], dominant_gap[:, None])
            dq = product(round_to(ds, k.dtype), k, dq, TF32)

    row_mask = query_indices < n_queries
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
    dk,  # (BLOCK_N, BLOCK_D) float32, sum so far
    dv,  # (BLOCK_N, BLOCK_D) float32, sum so far
    keys,  # HeadRows
    values,  # HeadRows
    queries,  # HeadQueries
    first_query,
    scale_log2,  # softmax_scale * log2(e)
    first_dropout_row,  # row of the dropout mask of the sequence's first query
    dropout,  # Dropout
    MASK_QUERIES: tl.constexpr,  # whether some of the queries may be behind the end of the sequence
    TILE: tl.constexpr,  # HeadTile
    n_keys=None,  # number of keys, where some of the queries may not see all of these; None: all see them
):
    """(dk, dv) with the part of BLOCK_M queries from `first_query` on added.

    Scores are transposed, keys by queries: so weights and score gradients are left operands as they are.
    """
    query_indices = first_query + tl.arange(0, TILE.BLOCK_M)
    dims = tl.arange(0, TILE.BLOCK_D)
    # 64 bits: query times row stride passes 2^31 elements in very long sequences.
    q_ptrs = queries.q_base + query_indices.to(tl.int64) * queries.stride_q_row
    grad_ptrs = queries.grad_base + query_indices.to(tl.int64) * queries.stride_grad_row
    q = load_head(q_ptrs, query_indices, queries.n_queries, dims, MASK_QUERIES, TILE)
    grad = load_head(grad_ptrs, query_indices, queries.n_queries, dims, MASK_QUERIES, TILE)
    valid = query_indices < queries.n_queries
    row_shift = tl.load(queries.sums_base + query_indices, mask=valid, other=0.0)
    normal = tl.load(queries.sums_base + queries.plane + query_indices, mask=valid, other=0.0)
    mean = tl.load(queries.sums_base + 2 * queries.plane + query_indices, mask=valid, other=0.0)
    dominant_gap = tl.load(queries.sums_base + 3 * queries.plane + query_indices, mask=valid, other=0.0)

    q_rows = HeadRows(q, q_ptrs, query_indices, queries.n_queries)
    grad_rows = HeadRows(grad, grad_ptrs, query_indices, queries.n_queries)
    scores = all_products(keys, q_rows, True, MASK_QUERIES, TILE.BLOCK_N, TILE.BLOCK_M, TILE)
    if n_keys is not None:
        seen = query_indices + (1 + n_keys - queries.n_queries)
        scores = tl.where(keys.indices[:, None] < seen[None, :], scores, float("-inf"))
    probabilities = probabilities_of(softmax_weights(scores, row_shift[None, :], scale_log2), normal[None, :])
    dp = all_products(values, grad_rows, True, MASK_QUERIES, TILE.BLOCK_N, TILE.BLOCK_M, TILE)
    kept = probabilities
    if dropout.seed_lo is not None:
        dropout_rows = first_dropout_row + query_indices
        factor = dropout_factor(dropout, dropout_rows[None, :], keys.indices[:, None])
        dp *= factor
        kept *= factor
    ds = score_gradient(probabilities, dp, mean[None, :], dominant_gap[None, :])
    if MASK_QUERIES:
        # Zero times an infinite key would be NaN.
        kept = tl.where(valid[None, :], kept, 0.0)
        ds = tl.where(valid[None, :], ds, 0.0)
    dv = product(round_to(kept, grad.dtype), grad, dv, TILE.TF32)
    dk = product(round_to(ds, q.dtype), q, dk, TILE.TF32)
    return dk, dv


@triton.jit(
    do_not_specialize=["n_key_blocks", "n_queries_total", "n_keys_total", "seed_lo", "seed_hi", "dropout_threshold"]
)
def _attention_bwd_dkdv_kernel(
    inputs,  # AttentionInputs
    grad_ptr,  # (Tq, num_heads * HEAD_DIM), gradient of the output, rows `stride_grad_row` elements apart
    sums_ptr,  # (4, num_heads, Tq) float32, as the kernel of dQ wrote them
    dk_ptr,  # (T, num_heads * HEAD_DIM), rows `dkdv_row_heads` * HEAD_DIM elements apart
    dv_ptr,  # (T, num_heads * HEAD_DIM), rows `dkdv_row_heads` * HEAD_DIM elements apart
    stride_grad_row,
    dkdv_row_heads,
    num_heads,
    n_key_blocks,  # blocks of BLOCK_N keys in the longest sequence
    n_queries_total,  # Tq
    n_keys_total,  # T
    softmax_scale,
    scale_log2,  # softmax_scale * log2(e)
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    HEAD_DIM: tl.constexpr,  # this and the next five: the fields of HeadTile
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,
    TF32: tl.constexpr,
    CAUSAL: tl.constexpr,  # whether query i sees only the keys 0 to i + keys - queries
):
    # A program takes BLOCK_N keys of one head of one sequence.
    TILE: tl.constexpr = HeadTile(HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32)
    dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
    key_block, head, sequence = program_work(inputs.sequence_order_ptr, n_key_blocks, num_heads)
    first_token, n_keys = key_range(inputs, sequence, n_keys_total)
    if key_block * BLOCK_N >= n_keys:
        return
    first_query, n_queries = sequence_range(inputs.cu_seqlens_q_ptr, sequence, n_queries_total)

    dims = tl.arange(0, BLOCK_D)
    key_indices = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64 bits: token times row stride passes 2^31 elements in large batches.
    packed_keys = first_token.to(tl.int64) + key_indices
    packed_query = first_query.to(tl.int64)
    column = head * HEAD_DIM
    k_ptrs = inputs.k_ptr + packed_keys * inputs.stride_k_row + column
    v_ptrs = inputs.v_ptr + packed_keys * inputs.stride_v_row + column
    k = load_operand(k_ptrs, key_indices, n_keys, True, TILE)
    v = load_operand(v_ptrs, key_indices, n_keys, True, TILE)
    keys = HeadRows(k, k_ptrs, key_indices, n_keys)
    values = HeadRows(v, v_ptrs, key_indices, n_keys)
    q_base = inputs.q_ptr + packed_query * inputs.stride_q_row + column
    grad_base = grad_ptr + packed_query * stride_grad_row + column
    sums_base = sums_ptr + (head.to(tl.int64) * n_queries_total + packed_query)
    plane = n_queries_total.to(tl.int64) * num_heads
    queries = HeadQueries(q_base, grad_base, sums_base, plane, inputs.stride_q_row, stride_grad_row, n_queries)
    first_dropout_row = head * HEAD_STRIDE + packed_query

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    full_queries = n_queries // BLOCK_M * BLOCK_M
    unmasked_query = 0
    if CAUSAL:
        # Query i sees the keys up to i + n_keys - n_queries: the first that sees any of these keys, and that sees all.
        first_seeing = tl.maximum(key_block * BLOCK_N - (n_keys - n_queries), 0) // BLOCK_M * BLOCK_M
        all_seeing = tl.maximum(key_block * BLOCK_N + BLOCK_N - 1 - (n_keys - n_queries), 0)
        unmasked_query = tl.minimum(tl.cdiv(all_seeing, BLOCK_M), tl.cdiv(n_queries, BLOCK_M)) * BLOCK_M
    for block_query in range(unmasked_query, full_queries, BLOCK_M):
        dk, dv = _add_queries(
            dk, dv, keys, values, queries, block_query, scale_log2, first_dropout_row, dropout, False, TILE
        )
    if CAUSAL:
        # The blocks on the diagonal, then the last one if it is partly filled: one body, for the registers' sake.
        n_diagonal = (unmasked_query - first_seeing) // BLOCK_M
        n_masked = n_diagonal + (tl.maximum(full_queries, unmasked_query) < n_queries).to(tl.int32)
        for number in range(n_masked):
            block_query = tl.where(number < n_diagonal, first_seeing + number * BLOCK_M, full_queries)
            dk, dv = _add_queries(
                dk, dv, keys, values, queries, block_query, scale_log2, first_dropout_row, dropout, True, TILE, n_keys
            )
    elif full_queries < n_queries:
        dk, dv = _add_queries(
            dk, dv, keys, values, queries, full_queries, scale_log2, first_dropout_row, dropout, True, TILE
        )

    offsets = packed_keys[:, None] * (dkdv_row_heads * HEAD_DIM) + (column + dims)[None, :]
    mask = (key_indices < n_keys)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(dk_ptr + offsets, round_to(dk * softmax_scale, dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offsets, round_to(dv, dv_ptr.dtype.element_ty), mask=mask)


def attention_bwd(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    sequence_order: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    causal: bool = False,
) -> None:
    """Gradients of `attention_fwd` with respect to q, k and v.

    Args:
        grad: (Tq, H), gradient of its output, in q's dtype; rows may be strided.
        dq, dk, dv: (Tq, H), (T, H) and (T, H) in q's dtype, fully written, zeros where a sequence has no keys or no
            queries; rows may be a multiple of the head size apart, and those of dk and dv are equally far apart.
        softmax_scale: not negative.
        All others: as given to `attention_fwd`, without key_lengths; the same dropout_p and seed drop the same probabilities again.

    Raises:
        ValueError: a head size above 256, or dropout_p outside [0, 1).
    """
    head_dim, sequences = q.shape[1] // num_heads, len(cu_seqlens_q) - 1
    grad = rows_contiguous(grad)
    tf32 = multiplies_tf32(q.dtype)
    longest, kind = (max_seqlen_q, max_seqlen_k), (dropout_p > 0.0, tf32, causal)
    dq_tiles, dkdv_tiles = attention_bwd_tiles(head_dim, q.dtype, *longest, *kind)
    if not heads_in_words(num_heads, grad, q, k, v):
        wide_grad, wide_q, wide_k, wide_v = (padded_heads(t, num_heads) for t in (grad, q, k, v))
        wide_gradients = torch.empty_like(wide_q), torch.empty_like(wide_k), torch.empty_like(wide_v)
        wide_dq, wide_dk, wide_dv = wide_gradients
        lengths = (cu_seqlens_q, cu_seqlens_k, sequence_order, max_seqlen_q, max_seqlen_k)
        numbers = num_heads, softmax_scale, dropout_p, seed, causal
        attention_bwd(wide_grad, wide_q, wide_k, wide_v, wide_dq, wide_dk, wide_dv, *lengths, *numbers)
        for out, found in zip((dq, dk, dv), wide_gradients, strict=True):
            out.unflatten(1, (num_heads, head_dim)).copy_(own_columns(found, num_heads, head_dim))
        return
    sums = torch.empty((4, num_heads, len(q)), dtype=torch.float32, device=q.device)
    strides = (q.stride(0), k.stride(0), v.stride(0))
    inputs = AttentionInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, None, sequence_order, *strides)
    # Zero times minus infinity, the maximum before the first key, would be NaN.
    scale_log2 = max(softmax_scale * LOG2_E, 1e-37)
    numbers = (len(q), len(k), softmax_scale, scale_log2, *dropout_arguments(dropout_p, seed))
    options = {"HEAD_DIM": head_dim, "CAUSAL": causal, **COMPILER_OPTIONS}

    def launch_dq(tiles: Tiles) -> None:
        n_blocks = triton.cdiv(max_seqlen_q, tiles["BLOCK_M"])
        sizes = (grad.stride(0), dq.stride(0) // head_dim, num_heads, n_blocks, *numbers)
        grid = (n_blocks * num_heads * sequences,)
        _attention_bwd_dq_kernel[grid](inputs, grad, dq, sums, *sizes, **options, **tiles)

    def launch_dkdv(tiles: Tiles) -> None:
        n_blocks = triton.cdiv(max_seqlen_k, tiles["BLOCK_N"])
        sizes = (grad.stride(0), dk.stride(0) // head_dim, num_heads, n_blocks, *numbers)
        grid = (n_blocks * num_heads * sequences,)
        _attention_bwd_dkdv_kernel[grid](inputs, grad, sums, dk, dv, *sizes, **options, **tiles)

    key = functools.partial(choice_key, head_dim, q.dtype, tf32, dropout_p, causal, max_seqlen_q, max_seqlen_k)
    with torch.cuda.device_of(q):
        if len(q):
            launch_dq(_tuning.choose("attention_bwd_dq", key, dq_tiles, launch_dq))
        if len(k):
            launch_dkdv(_tuning.choose("attention_bwd_dkdv", key, dkdv_tiles, launch_dkdv))
