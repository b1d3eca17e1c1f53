"""attention: softmax(Q K^T * scale) V over packed sequences, one pass (Dao et al. 2022, FlashAttention, algorithm 1).

A program owns BLOCK_M queries of one head of one sequence and walks over its keys, BLOCK_N at a time, with the running
maximum and sum of each row in float32 (Milakov & Gimelshein 2018). Scores never reach memory. Heads that do not begin at
words of 16 bytes, as those of an odd size, are copied first and padded: `heads_in_words`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import _tuning
from ._attention_tiles import attention_tiles, choice_key
from ._common import COMPILER_OPTIONS, dropout_arguments, dropout_keep, product, round_to
from ._precision import multiplies_tf32
from ._tuning import Tiles

LOG2_E = 1.4426950408889634


@triton.jit
def program_work(order_ptr, n_blocks, num_heads):
    """(block, head, sequence) of this program: of `n_blocks` blocks of a head of the sequence whose turn it is.

    Programs of one head of one sequence are neighbours, so that what all of them read stays in the L2 cache. Sequences
    take turns in the order of `order_ptr`, longest first: a long one that started last would keep one multiprocessor
    busy while the others wait.
    """
    block = tl.program_id(0) % n_blocks
    head = (tl.program_id(0) // n_blocks) % num_heads
    sequence = tl.program_id(0) // (n_blocks * num_heads)
    if order_ptr is not None:
        # Nobody has looked at the order yet: it may name no sequence, but not lead outside.
        last = tl.num_programs(0) // (n_blocks * num_heads) - 1
        sequence = tl.minimum(tl.maximum(tl.load(order_ptr + sequence), 0), last)
    return block, head, sequence


@triton.jit
def sequence_range(cu_seqlens_ptr, sequence, n_tokens):
    """(first token, number of tokens) of a sequence, within `n_tokens` whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), n_tokens)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), n_tokens)
    return first, tl.maximum(end - first, 0)


@triton.jit
def load_rows(ptrs, rows, n_rows, dims, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head, zeros beyond the sequence and beyond HEAD_DIM; no mask where none is needed."""
    if MASK_ROWS and HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def all_products(
    a, a_rows, a_index, n_a, b, b_rows, b_index, n_b, MASK_A: tl.constexpr, MASK_B: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    TF32: tl.constexpr,
):  # fmt: skip
    """(BLOCK_A, BLOCK_B) float32: every row of one tile times every row of another, as scores are.

    The tiles `a` and `b` are whole rows if CHUNK_D is BLOCK_D. Else they are not looked at, and CHUNK_D columns at a time
    are read through the rows' addresses `a_rows` and `b_rows`: float32 operands of a product stand in registers.
    """
    total = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    if CHUNK_D == BLOCK_D:
        total = product(a, tl.trans(b), total, TF32)
    else:
        for first_dim in range(0, BLOCK_D, CHUNK_D):
            chunk = first_dim + tl.arange(0, CHUNK_D)
            a_chunk = load_rows(a_rows[:, None] + chunk[None, :], a_index, n_a, chunk, MASK_A, HEAD_DIM, BLOCK_D)
            b_chunk = load_rows(b_rows[:, None] + chunk[None, :], b_index, n_b, chunk, MASK_B, HEAD_DIM, BLOCK_D)
            total = product(a_chunk, tl.trans(b_chunk), total, TF32)
    return total


@triton.jit
def finite_or_zero(x):
    # An infinite maximum is not subtracted: inf - inf would make a NaN of rows that torch can still compute.
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, q_rows, k_base, v_base, stride_k_row, stride_v_row, first_key, n_keys, queries, n_queries,
    scale_log2, dropout_rows, seed_lo, seed_hi, dropout_threshold, dropout_scale,
    MASK_KEYS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys from `first_key` on enter (acc, row_max, row_sum)."""
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    # 64 bits: key times row stride passes 2^31 elements in very long sequences.
    k_rows = k_base + keys.to(tl.int64) * stride_k_row
    v_rows = v_base + keys.to(tl.int64) * stride_v_row
    k = q
    if CHUNK_D == BLOCK_D:
        k = load_rows(k_rows[:, None] + dims[None, :], keys, n_keys, dims, MASK_KEYS, HEAD_DIM, BLOCK_D)
    scores = all_products(
        q, q_rows, queries, n_queries, k, k_rows, keys, n_keys, True, MASK_KEYS, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
        CHUNK_D, TF32,
    )  # fmt: skip
    scores *= scale_log2
    if MASK_KEYS:
        scores = tl.where((keys < n_keys)[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    shift = finite_or_zero(new_max)
    rescale = tl.exp2(row_max - shift)
    p = tl.exp2(scores - shift[:, None])
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        keep = dropout_keep(seed_lo, seed_hi, dropout_threshold, dropout_rows[:, None], keys[None, :])
        # A product, not a choice: a dropped NaN or infinity stays NaN, as in torch.
        p *= tl.where(keep, dropout_scale, 0.0)
    v = load_rows(v_rows[:, None] + dims[None, :], keys, n_keys, dims, MASK_KEYS, HEAD_DIM, BLOCK_D)
    acc = product(round_to(p, v.dtype), v, acc * rescale[:, None], TF32)
    return acc, new_max, row_sum


@triton.jit(
    do_not_specialize=["n_query_blocks", "n_queries_total", "n_keys_total", "seed_lo", "seed_hi", "dropout_threshold"]
)
def _attention_fwd_kernel(
    q_ptr,  # (Tq, num_heads * HEAD_DIM), rows `stride_q_row` elements apart
    k_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_k_row` elements apart
    v_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_v_row` elements apart
    out_ptr,  # (Tq, num_heads * HEAD_DIM), contiguous
    lse_ptr,  # (num_heads, Tq) float32
    cu_seqlens_q_ptr,  # (B + 1,) int32
    cu_seqlens_k_ptr,  # (B + 1,) int32
    order_ptr,  # (B,) int32, or None for 0 to B - 1
    stride_q_row,
    stride_k_row,
    stride_v_row,
    num_heads,
    n_query_blocks,  # blocks of BLOCK_M queries in the longest sequence
    n_queries_total,  # Tq
    n_keys_total,  # T
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
    # Queries stay in registers for the whole walk, unless they are read again in chunks.
    q = q_ptr
    if CHUNK_D == BLOCK_D:
        q = load_rows(q_rows[:, None] + dims[None, :], queries, n_queries, dims, True, HEAD_DIM, BLOCK_D)
    k_base = k_ptr + first_token.to(tl.int64) * stride_k_row + column
    v_base = v_ptr + first_token.to(tl.int64) * stride_v_row + column

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    dropout_rows = head * 0x10001 + packed_queries
    # Full blocks of keys need no mask; at most one block is left over.
    full_keys = n_keys // BLOCK_N * BLOCK_N
    for first_key in range(0, full_keys, BLOCK_N):
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, q_rows, k_base, v_base, stride_k_row, stride_v_row, first_key, n_keys,
            queries, n_queries, scale_log2, dropout_rows, seed_lo, seed_hi, dropout_threshold,
            dropout_scale, False, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32,
        )  # fmt: skip
    if full_keys < n_keys:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, q_rows, k_base, v_base, stride_k_row, stride_v_row, full_keys, n_keys,
            queries, n_queries, scale_log2, dropout_rows, seed_lo, seed_hi, dropout_threshold,
            dropout_scale, True, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D, TF32,
        )  # fmt: skip

    # Without keys the sum over none is zero; with keys a zero sum is 0 / 0, NaN as in torch.
    out = acc / tl.where(n_keys == 0, 1.0, row_sum)[:, None]
    lse = (finite_or_zero(row_max) + tl.log2(row_sum)) * 0.6931471805599453
    out_ptrs = out_ptr + packed_queries[:, None] * (num_heads * HEAD_DIM) + (column + dims)[None, :]
    out_mask = (queries < n_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptrs, round_to(out, out_ptr.dtype.element_ty), mask=out_mask)
    lse_ptrs = lse_ptr + head.to(tl.int64) * n_queries_total + packed_queries
    tl.store(lse_ptrs, lse, mask=queries < n_queries)


def heads_in_words(num_heads: int, *rows: torch.Tensor) -> bool:
    """Whether every head of these (T, H) begins at a whole 16-byte word, and Triton can tell: it looks for multiples of 16.

    Heads that are read number by number take more addresses than there are registers.
    """
    words = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in rows)
    return words and rows[0].shape[1] // num_heads % (16 // rows[0].itemsize) == 0


def padded_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """A copy of `x` (T, H), heads padded with zeros to a multiple of 16 numbers: no score and no output changes by them."""
    heads = x.unflatten(1, (num_heads, x.shape[1] // num_heads))
    head_dim = heads.shape[2]
    padded = x.new_zeros((len(x), num_heads, triton.cdiv(head_dim, 16) * 16))
    padded[..., :head_dim] = heads
    return padded.flatten(1)


def own_columns(x: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
    """(T, num_heads, head_dim), without what `padded_heads` added."""
    return x.unflatten(1, (num_heads, x.shape[1] // num_heads))[..., :head_dim]


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    order: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int, num_heads: int, softmax_scale: float,
    dropout_p: float = 0.0, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of packed sequences, each query over all keys of its own sequence.

    Args:
        q: (Tq, H); k, v: (T, H), of one dtype. Rows may be strided, as in views into a fused projection; columns are
            adjacent.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where the sequences of queries and of keys begin and end.
        order: (B,) int32, every sequence once, those with most keys first, or None; only the time depends on it.
        max_seqlen_q: at least the longest range of queries.
        max_seqlen_k: the same of keys.
        num_heads: H / num_heads is the head size, 1 to 256.
        softmax_scale: factor on the scores.
        dropout_p, seed: the probability of query row r of head h and key c survives where
            hash32(seed, h * 0x10001 + r, c) >= floor(dropout_p * 2^32).

    Returns:
        out (Tq, H) in q's dtype, zeros where a sequence has no keys;
        lse (num_heads, Tq) float32, the natural logarithm of the softmax's denominator, -inf where there are no keys.

    Raises:
        ValueError: a head size above 256, dropout_p outside [0, 1).
    """
    n_queries_total, width = q.shape
    head_dim, sequences = width // num_heads, len(cu_seqlens_q) - 1
    tf32 = multiplies_tf32(q.dtype)
    candidates = attention_tiles(head_dim, q.dtype, max_seqlen_q, dropout_p > 0.0, tf32)
    if not heads_in_words(num_heads, q, k, v):
        q, k, v = (padded_heads(t, num_heads) for t in (q, k, v))
        out, lse = attention_fwd(
            q, k, v, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale, dropout_p,
            seed,
        )  # fmt: skip
        return own_columns(out, num_heads, head_dim).flatten(1).contiguous(), lse
    out = torch.empty((n_queries_total, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, n_queries_total), dtype=torch.float32, device=q.device)
    dropout = dropout_arguments(dropout_p, seed)
    if n_queries_total == 0:
        return out, lse

    def launch(tiles: Tiles) -> None:
        n_query_blocks = triton.cdiv(max_seqlen_q, tiles["BLOCK_M"])
        _attention_fwd_kernel[(n_query_blocks * num_heads * sequences,)](
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, order, q.stride(0), k.stride(0), v.stride(0), num_heads,
            n_query_blocks, n_queries_total, len(k), softmax_scale * LOG2_E, *dropout,
            HAS_DROPOUT=dropout_p > 0.0, HEAD_DIM=head_dim, **tiles, **COMPILER_OPTIONS,
        )  # fmt: skip

    key = functools.partial(choice_key, head_dim, q.dtype, tf32, dropout_p, max_seqlen_q, max_seqlen_k)
    with torch.cuda.device_of(q):
        launch(_tuning.choose("attention_fwd", key, candidates, launch))
    return out, lse
