"""attention: softmax(Q K^T * scale) V over packed sequences in one pass (Dao et al. 2022, FlashAttention, algorithm 1).

A program takes BLOCK_M queries of one head of one sequence and walks over its keys, BLOCK_N at a time, with the running
maximum and sum of each row in float32 (Milakov & Gimelshein 2018). Scores never reach memory. Causal: it walks up to the last
key that one of its queries sees, and hides keys only from the first one on that one of them does not see. Heads that do not
begin at 16-byte words, such as those of an odd size, are first copied and padded: see `heads_in_words`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._attention_tiles import attention_tiles, choice_key
from ._common import (
    COMPILER_OPTIONS,
    HEAD_STRIDE,
    Dropout,
    dropout_arguments,
    dropout_factor,
    product,
    round_to,
)
from ._precision import multiplies_tf32
from ._tuning import Tiles

LOG2_E = 1.4426950408889634


class AttentionInputs(NamedTuple):
    """What all kernels of attention read; one argument of a kernel."""

    q_ptr: Any  # (Tq, num_heads * HEAD_DIM), rows `stride_q_row` elements apart
    k_ptr: Any  # (T, num_heads * HEAD_DIM), rows `stride_k_row` elements apart
    v_ptr: Any  # (T, num_heads * HEAD_DIM), rows `stride_v_row` elements apart
    cu_seqlens_q_ptr: Any  # (B + 1,) int32
    cu_seqlens_k_ptr: Any  # (B + 1,) int32, or (B,) with key_lengths_ptr
    key_lengths_ptr: Any  # (B,) int32, or None: cu_seqlens_k_ptr holds the ends too
    sequence_order_ptr: Any  # (B,) int32, or None for 0 to B - 1
    stride_q_row: Any
    stride_k_row: Any
    stride_v_row: Any


class HeadTile(NamedTuple):
    """Compile-time sizes of a kernel that multiplies heads."""

    HEAD_DIM: Any
    BLOCK_D: Any  # HEAD_DIM padded to a power of two
    BLOCK_M: Any  # queries
    BLOCK_N: Any  # keys
    CHUNK_D: Any  # columns of a head multiplied at a time; BLOCK_D, or a divisor of it
    TF32: Any  # whether float32 is multiplied as TF32


class HeadRows(NamedTuple):
    """Rows of one head of one sequence, as operands of a product."""

    tile: Any  # (rows, BLOCK_D) if CHUNK_D is BLOCK_D; otherwise unused: the rows are read again in chunks
    ptrs: Any  # (rows,) addresses
    indices: Any  # (rows,) positions in the sequence
    n_rows: Any  # length of the sequence


class HeadKeys(NamedTuple):
    """Keys and values of one head of one sequence."""

    k_base: Any  # address of the first key
    v_base: Any  # address of the first value
    stride_k_row: Any
    stride_v_row: Any
    n_keys: Any


@triton.jit
def program_work(sequence_order_ptr, n_blocks, num_heads):
    """(block, head, sequence) of this program, where each head of a sequence has `n_blocks` blocks.

    Programs of one head of one sequence are neighbours, so that what all of them read stays in the L2 cache. Sequences run
    in the order of `sequence_order_ptr`, longest first: a long sequence that started last would keep one multiprocessor
    busy while the others wait.
    """
    block = tl.program_id(0) % n_blocks
    head = (tl.program_id(0) // n_blocks) % num_heads
    sequence = tl.program_id(0) // (n_blocks * num_heads)
    if sequence_order_ptr is not None:
        # The order is not checked before the launch: clamping keeps a wrong entry inside the batch.
        last = tl.num_programs(0) // (n_blocks * num_heads) - 1
        sequence = tl.minimum(tl.maximum(tl.load(sequence_order_ptr + sequence), 0), last)
    return block, head, sequence


@triton.jit
def sequence_range(cu_seqlens_ptr, sequence, n_tokens):
    """(first token, number of tokens) of a sequence, inside [0, n_tokens) whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), n_tokens)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), n_tokens)
    return first, tl.maximum(end - first, 0)


@triton.jit
def key_range(inputs, sequence, n_tokens):
    """(first token, number of keys) of a sequence, inside [0, n_tokens) whatever the tensors hold; `inputs`: AttentionInputs."""
    if inputs.key_lengths_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(inputs.cu_seqlens_k_ptr + sequence), 0), n_tokens)
        length = tl.load(inputs.key_lengths_ptr + sequence)
        n_keys = tl.maximum(tl.minimum(length, n_tokens - first), 0)
    else:
        first, n_keys = sequence_range(inputs.cu_seqlens_k_ptr, sequence, n_tokens)
    return first, n_keys


@triton.jit
def load_head(
    ptrs,  # (rows,) addresses
    indices,  # (rows,) positions in the sequence
    n_rows,  # length of the sequence
    cols,  # columns of the head
    MASK_ROWS: tl.constexpr,  # whether some rows may be behind the end of the sequence
    TILE: tl.constexpr,  # HeadTile
):
    """Columns `cols` of rows of a head, with zeros beyond the sequence and beyond HEAD_DIM; no mask if none is needed."""
    at = ptrs[:, None] + cols[None, :]
    if MASK_ROWS and TILE.HEAD_DIM != TILE.BLOCK_D:
        tile = tl.load(at, mask=(indices < n_rows)[:, None] & (cols < TILE.HEAD_DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(at, mask=(indices < n_rows)[:, None], other=0.0)
    elif TILE.HEAD_DIM != TILE.BLOCK_D:
        tile = tl.load(at, mask=(cols < TILE.HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_operand(ptrs, indices, n_rows, MASK_ROWS: tl.constexpr, TILE: tl.constexpr):
    """The `tile` of HeadRows: whole rows, or, if they are read in chunks, a placeholder."""
    tile = ptrs
    if TILE.CHUNK_D == TILE.BLOCK_D:
        tile = load_head(ptrs, indices, n_rows, tl.arange(0, TILE.BLOCK_D), MASK_ROWS, TILE)
    return tile


@triton.jit
def all_products(
    a,  # HeadRows, BLOCK_A of them
    b,  # HeadRows, BLOCK_B of them
    MASK_A: tl.constexpr,  # whether rows of a may be behind the end of the sequence
    MASK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TILE: tl.constexpr,  # HeadTile
):
    """(BLOCK_A, BLOCK_B) float32: the product of every row of a with every row of b, such as scores.

    The operands are read in chunks of CHUNK_D columns if that is less than BLOCK_D: float32 operands of a product are held in
    registers.
    """
    total = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    if TILE.CHUNK_D == TILE.BLOCK_D:
        total = product(a.tile, tl.trans(b.tile), total, TILE.TF32)
    else:
        for first_col in range(0, TILE.BLOCK_D, TILE.CHUNK_D):
            cols = first_col + tl.arange(0, TILE.CHUNK_D)
            a_chunk = load_head(a.ptrs, a.indices, a.n_rows, cols, MASK_A, TILE)
            b_chunk = load_head(b.ptrs, b.indices, b.n_rows, cols, MASK_B, TILE)
            total = product(a_chunk, tl.trans(b_chunk), total, TILE.TF32)
    return total


@triton.jit
def seen_keys(n_first, n_queries, n_keys):
    """How many keys the first `n_first` queries of a causal sequence see together; the last query sees all."""
    return tl.minimum(tl.maximum(n_first + n_keys - n_queries, 0), n_keys)


@triton.jit
def unmasked_keys(first_query, n_queries, n_keys, BLOCK_N: tl.constexpr):
    """The keys in whole blocks that all queries of a causal sequence see, from `first_query` on."""
    return seen_keys(first_query + 1, n_queries, n_keys) // BLOCK_N * BLOCK_N


@triton.jit
def finite_or_zero(x):
    # An infinite maximum is not subtracted: inf - inf would make a NaN of rows that torch can still compute.
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def hide_keys(scores, key_indices, n_keys, seen):
    """scores (queries, keys) with -inf behind the last key, or, for `seen` (queries,), behind those that a query sees."""
    visible = (key_indices < n_keys)[None, :]
    if seen is not None:
        visible = key_indices[None, :] < seen[:, None]
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def add_keys(
    acc,  # (BLOCK_M, BLOCK_D) float32, weighted sum of values so far
    row_max,  # (BLOCK_M,) float32, largest score so far
    row_sum,  # (BLOCK_M,) float32, sum of exp(score - row_max) so far
    queries,  # HeadRows
    keys,  # HeadKeys
    first_key,
    scale_log2,  # softmax_scale * log2(e)
    dropout_rows,  # (BLOCK_M,) rows of the dropout mask
    dropout,  # Dropout
    MASK_KEYS: tl.constexpr,  # whether some of the keys may be behind the end of the sequence, or unseen
    TILE: tl.constexpr,  # HeadTile
    seen=None,  # (BLOCK_M,) how many keys each query sees; None: all
):
    """(acc, row_max, row_sum) after one more step of the online softmax: BLOCK_N keys from `first_key` on."""
    key_indices = first_key + tl.arange(0, TILE.BLOCK_N)
    # 64 bits: key times row stride passes 2^31 elements in very long sequences.
    k_ptrs = keys.k_base + key_indices.to(tl.int64) * keys.stride_k_row
    v_ptrs = keys.v_base + key_indices.to(tl.int64) * keys.stride_v_row
    k = load_operand(k_ptrs, key_indices, keys.n_keys, MASK_KEYS, TILE)
    k_rows = HeadRows(k, k_ptrs, key_indices, keys.n_keys)
    scores = all_products(queries, k_rows, True, MASK_KEYS, TILE.BLOCK_M, TILE.BLOCK_N, TILE)
    scores *= scale_log2
    if MASK_KEYS:
        scores = hide_keys(scores, key_indices, keys.n_keys, seen)

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    shift = finite_or_zero(new_max)
    rescale = tl.exp2(row_max - shift)
    p = tl.exp2(scores - shift[:, None])
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    if dropout.seed_lo is not None:
        p *= dropout_factor(dropout, dropout_rows[:, None], key_indices[None, :])
    v = load_head(v_ptrs, key_indices, keys.n_keys, tl.arange(0, TILE.BLOCK_D), MASK_KEYS, TILE)
    acc = product(round_to(p, v.dtype), v, acc * rescale[:, None], TILE.TF32)
    return acc, new_max, row_sum


@triton.jit(
    do_not_specialize=["n_query_blocks", "n_queries_total", "n_keys_total", "seed_lo", "seed_hi", "dropout_threshold"]
)
def _attention_fwd_kernel(
    inputs,  # AttentionInputs
    out_ptr,  # (Tq, num_heads * HEAD_DIM), contiguous
    lse_ptr,  # (num_heads, Tq) float32
    num_heads,
    n_query_blocks,  # blocks of BLOCK_M queries in the longest sequence
    n_queries_total,  # Tq
    n_keys_total,  # T
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
    # Queries stay in registers for the whole walk, unless they are read again in chunks.
    q = load_operand(q_ptrs, query_indices, n_queries, True, TILE)
    queries = HeadRows(q, q_ptrs, query_indices, n_queries)
    k_base = inputs.k_ptr + first_token.to(tl.int64) * inputs.stride_k_row + column
    v_base = inputs.v_ptr + first_token.to(tl.int64) * inputs.stride_v_row + column
    keys = HeadKeys(k_base, v_base, inputs.stride_k_row, inputs.stride_v_row, n_keys)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    dropout_rows = head * HEAD_STRIDE + packed_queries
    # Full blocks of keys that every query sees need no mask; at most one partial block remains, or those on the diagonal.
    full_keys = n_keys // BLOCK_N * BLOCK_N
    blind = n_keys == 0
    if CAUSAL:
        seen = query_indices + (1 + n_keys - n_queries)
        blind = seen <= 0
        full_keys = unmasked_keys(query_block * BLOCK_M, n_queries, n_keys, BLOCK_N)
    for first_key in range(0, full_keys, BLOCK_N):
        acc, row_max, row_sum = add_keys(
            acc, row_max, row_sum, queries, keys, first_key, scale_log2, dropout_rows, dropout, False, TILE
        )
    if CAUSAL:
        last_key = seen_keys(query_block * BLOCK_M + BLOCK_M, n_queries, n_keys)
        for first_key in range(full_keys, last_key, BLOCK_N):
            acc, row_max, row_sum = add_keys(
                acc, row_max, row_sum, queries, keys, first_key, scale_log2, dropout_rows, dropout, True, TILE, seen
            )
    elif full_keys < n_keys:
        acc, row_max, row_sum = add_keys(
            acc, row_max, row_sum, queries, keys, full_keys, scale_log2, dropout_rows, dropout, True, TILE
        )

    # Without keys the sum is 0 and so is the output; with keys a sum of 0 gives 0 / 0, NaN as in torch.
    out = acc / tl.where(blind, 1.0, row_sum)[:, None]
    lse = (finite_or_zero(row_max) + tl.log2(row_sum)) * 0.6931471805599453
    out_ptrs = out_ptr + packed_queries[:, None] * (num_heads * HEAD_DIM) + (column + dims)[None, :]
    out_mask = (query_indices < n_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptrs, round_to(out, out_ptr.dtype.element_ty), mask=out_mask)
    lse_ptrs = lse_ptr + head.to(tl.int64) * n_queries_total + packed_queries
    tl.store(lse_ptrs, lse, mask=query_indices < n_queries)


def heads_in_words(num_heads: int, *rows: torch.Tensor) -> bool:
    """Whether every head of these (T, H) begins at a 16-byte word, and Triton can tell: it looks for multiples of 16.

    Heads that are read number by number take more addresses than there are registers.
    """
    words = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in rows)
    return words and rows[0].shape[1] // num_heads % (16 // rows[0].itemsize) == 0


def padded_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """A copy of `x` (T, H) whose heads are padded with zeros to a multiple of 16 numbers; scores and outputs do not change."""
    heads = x.unflatten(1, (num_heads, x.shape[1] // num_heads))
    head_dim = heads.shape[2]
    padded = x.new_zeros((len(x), num_heads, triton.cdiv(head_dim, 16) * 16))
    padded[..., :head_dim] = heads
    return padded.flatten(1)


def own_columns(x: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
    """(T, num_heads, head_dim): `x` without the columns that `padded_heads` added."""
    return x.unflatten(1, (num_heads, x.shape[1] // num_heads))[..., :head_dim]


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed sequences: each query attends to all keys of its own sequence, or to those up to its own position.

    Args:
        q: (Tq, H); k, v: (T, H), of one dtype. Rows may be strided, as in views into a fused projection; columns are
            adjacent.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where the sequences of queries and of keys begin and end.
        sequence_order: (B,) int32, every sequence once, those with most keys first, or None; it changes only the time.
        max_seqlen_q: at least the largest number of queries of a sequence.
        max_seqlen_k: the same for keys.
        num_heads: H / num_heads is the head size, 1 to 256.
        softmax_scale: factor on the scores.
        dropout_p, seed: the probability of query row r of head h and key c survives where
            hash32(seed, h * HEAD_STRIDE + r, c) >= floor(dropout_p * 2^32).
        causal: whether query i of a sequence sees only the keys 0 to i + keys - queries.
        key_lengths: (B,) int32, the number of each sequence's keys; then cu_seqlens_k is (B,) int32, where they begin.

    Returns:
        out (Tq, H) in q's dtype, zeros for a query that sees no key;
        lse (num_heads, Tq) float32, the natural logarithm of the softmax's denominator, -inf for such a query.

    Raises:
        ValueError: a head size above 256, or dropout_p outside [0, 1).
    """
    n_queries_total, width = q.shape
    head_dim, sequences = width // num_heads, len(cu_seqlens_q) - 1
    tf32 = multiplies_tf32(q.dtype)
    candidates = attention_tiles(head_dim, q.dtype, max_seqlen_q, dropout_p > 0.0, tf32, causal)
    if not heads_in_words(num_heads, q, k, v):
        wide_q, wide_k, wide_v = (padded_heads(t, num_heads) for t in (q, k, v))
        lengths = (cu_seqlens_q, cu_seqlens_k, sequence_order, max_seqlen_q, max_seqlen_k)
        numbers = num_heads, softmax_scale, dropout_p, seed
        out, lse = attention_fwd(wide_q, wide_k, wide_v, *lengths, *numbers, causal, key_lengths)
        return own_columns(out, num_heads, head_dim).flatten(1).contiguous(), lse
    out = torch.empty((n_queries_total, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, n_queries_total), dtype=torch.float32, device=q.device)
    numbers = (n_queries_total, len(k), softmax_scale * LOG2_E, *dropout_arguments(dropout_p, seed))
    options = {"HEAD_DIM": head_dim, "CAUSAL": causal, **COMPILER_OPTIONS}
    if n_queries_total == 0:
        return out, lse
    strides = (q.stride(0), k.stride(0), v.stride(0))
    inputs = AttentionInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, key_lengths, sequence_order, *strides)

    def launch(tiles: Tiles) -> None:
        n_blocks = triton.cdiv(max_seqlen_q, tiles["BLOCK_M"])
        _attention_fwd_kernel[(n_blocks * num_heads * sequences,)](
            inputs, out, lse, num_heads, n_blocks, *numbers, **tiles, **options
        )

    key = functools.partial(choice_key, head_dim, q.dtype, tf32, dropout_p, causal, max_seqlen_q, max_seqlen_k)
    with torch.cuda.device_of(q):
        launch(_tuning.choose("attention_fwd", key, candidates, launch))
    return out, lse
