"""attention: softmax(Q K^T * scale) V over packed sequences, one pass (Dao et al. 2022, FlashAttention, algorithm 1).

A program owns BLOCK_M queries of one head of one sequence and walks over its keys, BLOCK_N at a time, with the running
maximum and sum of each row in float32 (Milakov & Gimelshein 2018). Scores never reach memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import COMPILER_OPTIONS, INTERPRETED, dropout_arguments, dropout_keep, round_to

MAX_HEAD_DIM = 256

# Longest query range -> BLOCK_M: the last layer often asks for one token a sequence only.
_FEW_QUERIES, _SOME_QUERIES = 16, 64
# (bytes an element, padded head size) -> (BLOCK_M, BLOCK_N, CHUNK_D, num_warps, num_stages) for long query ranges.
# Bounded by registers (no spill on any of sm_80, sm_90, sm_100, dropout included) and by the 163 KiB of shared memory
# of sm_80. A float32 product runs on plain FMA, with all its operands in registers: hence small tiles and chunks.
_TILES = {
    (2, 16): (128, 32, 16, 8, 3),
    (2, 32): (64, 64, 32, 4, 3),
    (2, 64): (128, 64, 64, 8, 3),
    (2, 128): (128, 64, 64, 8, 3),
    (2, 256): (64, 16, 64, 8, 2),
    (4, 16): (64, 32, 16, 4, 1),
    (4, 32): (64, 16, 16, 8, 1),
    (4, 64): (64, 16, 16, 8, 1),
    (4, 128): (32, 32, 16, 4, 1),
    (4, 256): (16, 32, 16, 4, 1),
}


def attention_tiles(head_dim: int, dtype: torch.dtype, max_seqlen: int) -> dict[str, int]:
    """Tile sizes and launch options for queries of at most `max_seqlen` tokens a sequence, as keywords of the kernel.

    Raises:
        ValueError: a head size above 256.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention: head size {head_dim}; the Triton kernel takes up to {MAX_HEAD_DIM}")
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m, block_n, chunk_d, num_warps, num_stages = _TILES[dtype.itemsize, block_d]
    if max_seqlen <= _FEW_QUERIES:
        # Larger key tiles hide the loads of few queries; float32 heads of 128 would spill.
        block_n = 16 if (dtype.itemsize, block_d) == (4, 128) else max(block_n, 32)
        block_m, num_warps = 16, 4
    elif max_seqlen <= _SOME_QUERIES and block_m > 64:
        block_m, num_warps = 64, 4
    tiles = {"BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "CHUNK_D": chunk_d}
    return tiles | {"num_warps": num_warps, "num_stages": num_stages}


@triton.jit
def _load_rows(ptrs, rows, n_rows, dims, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
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
def _product(a, b, acc):
    """a @ b + acc with float32 sums."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as bare bits and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _shift_of(row_max):
    # An infinite maximum is not subtracted: inf - inf would make a NaN of rows that torch can still compute.
    return tl.where(tl.abs(row_max) == float("inf"), 0.0, row_max)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, q_rows, k_base, v_base, stride_k_row, stride_v_row, first_key, n_keys, queries, n_queries,
    scale_log2, dropout_rows, seed_lo, seed_hi, dropout_threshold, dropout_scale,
    MASK_KEYS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys from `first_key` on enter (acc, row_max, row_sum)."""
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    # 64 bits: key times row stride passes 2^31 elements in very long sequences.
    k_rows = k_base + keys.to(tl.int64) * stride_k_row
    v_rows = v_base + keys.to(tl.int64) * stride_v_row
    scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if CHUNK_D == BLOCK_D:
        k = _load_rows(k_rows[:, None] + dims[None, :], keys, n_keys, dims, MASK_KEYS, HEAD_DIM, BLOCK_D)
        scores = _product(q, tl.trans(k), scores)
    else:
        for first_dim in range(0, BLOCK_D, CHUNK_D):
            chunk = first_dim + tl.arange(0, CHUNK_D)
            q_chunk = _load_rows(q_rows[:, None] + chunk[None, :], queries, n_queries, chunk, True, HEAD_DIM, BLOCK_D)
            k_chunk = _load_rows(k_rows[:, None] + chunk[None, :], keys, n_keys, chunk, MASK_KEYS, HEAD_DIM, BLOCK_D)
            scores = _product(q_chunk, tl.trans(k_chunk), scores)
    scores *= scale_log2
    if MASK_KEYS:
        scores = tl.where((keys < n_keys)[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    shift = _shift_of(new_max)
    rescale = tl.exp2(row_max - shift)
    p = tl.exp2(scores - shift[:, None])
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        keep = dropout_keep(seed_lo, seed_hi, dropout_threshold, dropout_rows[:, None], keys[None, :])
        # A product, not a choice: a dropped NaN or infinity stays NaN, as in torch.
        p *= tl.where(keep, dropout_scale, 0.0)
    v = _load_rows(v_rows[:, None] + dims[None, :], keys, n_keys, dims, MASK_KEYS, HEAD_DIM, BLOCK_D)
    acc = _product(round_to(p, v.dtype), v, acc * rescale[:, None])
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["n_query_blocks", "n_queries_total", "seed_lo", "seed_hi", "dropout_threshold"])
def _attention_fwd_kernel(
    q_ptr,  # (Tq, num_heads * HEAD_DIM), rows `stride_q_row` elements apart
    k_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_k_row` elements apart
    v_ptr,  # (T, num_heads * HEAD_DIM), rows `stride_v_row` elements apart
    out_ptr,  # (Tq, num_heads * HEAD_DIM), contiguous
    lse_ptr,  # (num_heads, Tq) float32
    cu_seqlens_q_ptr,  # (B + 1,) int32
    cu_seqlens_k_ptr,  # (B + 1,) int32
    stride_q_row,
    stride_k_row,
    stride_v_row,
    num_heads,
    n_query_blocks,  # blocks of BLOCK_M queries in the longest sequence
    n_queries_total,  # Tq
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
):
    # Programs of one head of one sequence are neighbours, so that its keys and values stay in the L2 cache.
    query_block = tl.program_id(0) % n_query_blocks
    head = (tl.program_id(0) // n_query_blocks) % num_heads
    sequence = tl.program_id(0) // (n_query_blocks * num_heads)
    first_query = tl.load(cu_seqlens_q_ptr + sequence)
    n_queries = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_query
    if query_block * BLOCK_M >= n_queries:
        return
    first_token = tl.load(cu_seqlens_k_ptr + sequence)
    n_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - first_token

    dims = tl.arange(0, BLOCK_D)
    queries = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # 64 bits: token times row stride passes 2^31 elements in large batches.
    packed_queries = first_query.to(tl.int64) + queries
    column = head * HEAD_DIM
    q_rows = q_ptr + packed_queries * stride_q_row + column
    # Queries stay in registers for the whole walk, unless they are read again in chunks.
    q = q_ptr
    if CHUNK_D == BLOCK_D:
        q = _load_rows(q_rows[:, None] + dims[None, :], queries, n_queries, dims, True, HEAD_DIM, BLOCK_D)
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
            dropout_scale, False, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D,
        )  # fmt: skip
    if full_keys < n_keys:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, q_rows, k_base, v_base, stride_k_row, stride_v_row, full_keys, n_keys,
            queries, n_queries, scale_log2, dropout_rows, seed_lo, seed_hi, dropout_threshold,
            dropout_scale, True, HAS_DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CHUNK_D,
        )  # fmt: skip

    # Without keys the sum over none is zero; with keys a zero sum is 0 / 0, NaN as in torch.
    out = acc / tl.where(n_keys == 0, 1.0, row_sum)[:, None]
    lse = (_shift_of(row_max) + tl.log2(row_sum)) * 0.6931471805599453
    out_ptrs = out_ptr + packed_queries[:, None] * (num_heads * HEAD_DIM) + (column + dims)[None, :]
    out_mask = (queries < n_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptrs, round_to(out, out_ptr.dtype.element_ty), mask=out_mask)
    lse_ptrs = lse_ptr + head.to(tl.int64) * n_queries_total + packed_queries
    tl.store(lse_ptrs, lse, mask=queries < n_queries)


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, num_heads: int, softmax_scale: float, dropout_p: float = 0.0, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of packed sequences, each query over all keys of its own sequence.

    Args:
        q: (Tq, H); k, v: (T, H), of one dtype. Rows may be strided, as in views into a fused projection; columns are
            adjacent.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where the sequences of queries and of keys begin and end.
        max_seqlen_q: at least the longest range of queries.
        max_seqlen_k: the same of keys; not needed here, since a program walks over the keys that there are.
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
    head_dim = width // num_heads
    out = torch.empty((n_queries_total, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, n_queries_total), dtype=torch.float32, device=q.device)
    tiles = attention_tiles(head_dim, q.dtype, max_seqlen_q)
    dropout = dropout_arguments(dropout_p, seed)
    n_query_blocks = triton.cdiv(max_seqlen_q, tiles["BLOCK_M"])
    n_programs = n_query_blocks * num_heads * (len(cu_seqlens_q) - 1)
    if n_queries_total == 0 or n_programs == 0:
        return out, lse
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(n_programs,)](
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, q.stride(0), k.stride(0), v.stride(0), num_heads, n_query_blocks,
            n_queries_total, softmax_scale * 1.4426950408889634, *dropout,
            HAS_DROPOUT=dropout_p > 0.0, HEAD_DIM=head_dim, **tiles, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out, lse
