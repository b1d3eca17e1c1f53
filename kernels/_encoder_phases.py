"""The phases of encoder's kernel, each divided into tiles over the programs of a grid, and the barrier between two."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import activate, load_row_vector, moments_overflow, product, round_to
from .attention import _attend, load_rows, sequence_range

NO_ACT = tl.constexpr(-1)
_MAX_POLLS = tl.constexpr(1 << 22)


@triton.jit
def barrier(counter_ptr, target):
    """Wait until `target` programs, counted over all barriers of the launch, have come."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    polls = 0
    while arrived < target:
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
        if polls == _MAX_POLLS:
            tl.inline_asm_elementwise("trap; mov.u32 $0, $1;", "=r,r", [polls], tl.int32, is_pure=False, pack=1)


@triton.jit
def chosen(condition, first_ptr, second_ptr):
    if condition:
        second_ptr = first_ptr
    return second_ptr


@triton.jit
def _joined_statistics(
    statistics_ptr,  # (rows, 2, blocks) float32: mean and sum of squared differences within each block of columns
    rows,  # (BLOCK_M,) int64
    row_mask,
    width,
    eps,
    is_sum,  # whether the rows are sums with statistics, or embeddings that no LayerNorm is applied to
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """LayerNorm's mean and rstd (BLOCK_M,) of whole rows."""
    blocks = tl.arange(0, BLOCKS)
    n_blocks = tl.cdiv(width, BLOCK_N)
    counts = tl.minimum(tl.maximum(width - blocks * BLOCK_N, 0), BLOCK_N).to(tl.float32)[None, :]
    at = statistics_ptr + rows[:, None] * (2 * n_blocks) + blocks[None, :]
    mask = row_mask[:, None] & (blocks < n_blocks)[None, :] & is_sum
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + n_blocks, mask=mask, other=0.0)
    mean = tl.sum(means * counts, axis=1) / width
    difference = means - mean[:, None]
    variance = tl.sum(squares + counts * difference * difference, axis=1) / width
    rstd = tl.rsqrt(variance + moments_overflow(mean, width) + eps)
    return mean, tl.where(is_sum, rstd, 1.0)


@triton.jit
def _normalised(z, mean, rstd, norm_weight_ptr, norm_bias_ptr, cols, n_cols, is_sum):
    """float32 LayerNorm of a tile; of embeddings the tile itself."""
    weight = tl.where(is_sum, load_row_vector(norm_weight_ptr, cols, n_cols), 1.0)
    bias = tl.where(is_sum, load_row_vector(norm_bias_ptr, cols, n_cols), 0.0)
    return (z.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight + bias


@triton.jit
def _source_rows(rows_ptr, rows, row_mask, gather, n_tokens):
    """Where the rows of a tile stand among all tokens: as they are, or in the last layer those that are asked for."""
    if rows_ptr is not None:
        asked = tl.load(rows_ptr + rows, mask=row_mask & gather, other=0)
        # Nobody has looked at them yet: they may be wrong, but not lead outside.
        rows = tl.where(gather, tl.minimum(tl.maximum(asked, 0), n_tokens - 1), rows)
    return rows


@triton.jit
def product_phase(
    x_ptr,  # (n_rows, depth), multiplied; not read where the LayerNorm of z is
    z_ptr,  # (T, H): its LayerNorm is multiplied, or added to the product
    z_statistics_ptr,  # (T, 2, blocks) float32
    norm_weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    weight_ptr,  # (n_cols, depth); of three PARTS the first, and behind it the others, each a product of its own
    bias_ptr,  # (n_cols,)
    second_weight_ptr,
    second_bias_ptr,
    third_weight_ptr,
    third_bias_ptr,
    out_ptr,  # (n_rows, PARTS, n_cols)
    out_statistics_ptr,  # (n_rows, 2, blocks) float32 where z is added, else None
    partials_ptr,  # (tiles, splits, BLOCK_M, BLOCK_N) float32
    arrivals_ptr,  # (tiles,) int32, zeros before and after
    rows_ptr,  # (n_rows,) int64 or None
    n_tokens,  # T
    n_rows,
    n_cols,
    depth,
    splits,
    steps,  # of BLOCK_K in a split
    eps,
    is_sum,
    gather,
    PARTS: tl.constexpr,  # 1 or 3
    ADD_Z: tl.constexpr,  # of one part alone
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    TF32: tl.constexpr,
):
    """out = act(LayerNorm(z) weight^T + bias), of each of PARTS weights; or x weight^T + bias + LayerNorm(z) with the
    statistics of its rows."""
    dtype = out_ptr.dtype.element_ty
    row_tiles = tl.cdiv(n_rows, BLOCK_M)
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    for item in range(tl.program_id(0), row_tiles * (PARTS * col_tiles) * splits, tl.num_programs(0)):
        split = item % splits
        tile = item // splits
        block = tile // row_tiles
        own_weight_ptr = weight_ptr
        own_bias_ptr = bias_ptr
        own_out_ptr = out_ptr
        if PARTS == 3:
            part = block // col_tiles
            block = block % col_tiles
            own_weight_ptr = chosen(part == 0, weight_ptr, chosen(part == 1, second_weight_ptr, third_weight_ptr))
            own_bias_ptr = chosen(part == 0, bias_ptr, chosen(part == 1, second_bias_ptr, third_bias_ptr))
            own_out_ptr = out_ptr + part * n_cols
        # 64 bits: a row's number times its width passes 2^31 elements in large batches.
        rows = (tile % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = rows < n_rows
        col_mask = cols < n_cols
        z_rows = _source_rows(rows_ptr, rows, row_mask, gather, n_tokens)
        width = n_cols if ADD_Z else depth
        mean, rstd = _joined_statistics(z_statistics_ptr, z_rows, row_mask, width, eps, is_sum, BLOCK_N, BLOCKS)

        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        first = split * steps * BLOCK_K
        for first_k in range(first, tl.minimum(first + steps * BLOCK_K, depth), BLOCK_K):
            inner = first_k + tl.arange(0, BLOCK_K)
            inner_mask = inner < depth
            mask = row_mask[:, None] & inner_mask[None, :]
            weights = own_weight_ptr + cols.to(tl.int64)[:, None] * depth + inner[None, :]
            b = tl.load(weights, mask=col_mask[:, None] & inner_mask[None, :], other=0.0)
            if ADD_Z:
                a = tl.load(x_ptr + rows[:, None] * depth + inner[None, :], mask=mask, other=0.0)
            else:
                z = tl.load(z_ptr + z_rows[:, None] * depth + inner[None, :], mask=mask, other=0.0)
                a = _normalised(z, mean, rstd, norm_weight_ptr, norm_bias_ptr, inner, depth, is_sum)
                a = round_to(a, dtype)
            acc = product(a, tl.trans(b), acc, TF32)

        is_last = splits == 1
        if splits > 1:
            inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            partials = partials_ptr + tile * splits * (BLOCK_M * BLOCK_N) + inside
            tl.store(partials + split * (BLOCK_M * BLOCK_N), acc)
            tl.debug_barrier()
            # As in `barrier`: release of these sums, and acquire of the others' by the last that comes.
            is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
            if is_last:
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for i in range(splits):
                    acc += tl.load(partials + i * (BLOCK_M * BLOCK_N))
                tl.store(arrivals_ptr + tile, 0)
        if is_last:
            mask = row_mask[:, None] & col_mask[None, :]
            out = acc + load_row_vector(own_bias_ptr, cols, n_cols)
            if ADD_Z:
                z = tl.load(z_ptr + z_rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
                out += _normalised(z, mean, rstd, norm_weight_ptr, norm_bias_ptr, cols, n_cols, is_sum)
            if ACT != NO_ACT:
                out = activate(out, ACT)
            rounded = round_to(out, dtype)
            tl.store(own_out_ptr + rows[:, None] * (PARTS * n_cols) + cols[None, :], rounded, mask=mask)
            if ADD_Z:
                # Of the rounded sums, so that the LayerNorm's mean is 0 and its variance 1 all the same.
                out = tl.where(mask, rounded.to(tl.float32), 0.0)
                block_mean = tl.sum(out, axis=1) / tl.minimum(n_cols - block * BLOCK_N, BLOCK_N)
                difference = tl.where(mask, out - block_mean[:, None], 0.0)
                at = out_statistics_ptr + rows * (2 * col_tiles) + block
                tl.store(at, block_mean, mask=row_mask)
                tl.store(at + col_tiles, tl.sum(difference * difference, axis=1), mask=row_mask)


@triton.jit
def attention_phase(
    qkv_ptr,  # (T, 3H)
    context_ptr,  # (n_rows, H)
    cu_seqlens_ptr,  # (B + 1,) int32
    cu_rows_ptr,  # (B + 1,) int32: where each sequence's queries begin among the rows; cu_seqlens but in the last layer
    rows_ptr,  # (n_rows,) int64 or None
    n_tokens,  # T
    n_rows,
    n_sequences,
    width,
    num_heads,
    scale_log2,
    gather,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TF32: tl.constexpr,
):
    """context = attention(qkv), a head of BLOCK_Q queries at a time, which may belong to several sequences."""
    dims = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_Q) * num_heads, tl.num_programs(0)):
        column = item % num_heads * HEAD_DIM
        rows = (item // num_heads).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        row_mask = rows < n_rows
        sequence = tl.zeros([BLOCK_Q], dtype=tl.int32)
        for first in range(1, n_sequences + 1, 32):
            ends = first + tl.arange(0, 32)
            is_end = ends <= n_sequences
            passed = tl.load(cu_rows_ptr + ends, mask=is_end, other=0)[None, :] <= rows[:, None]
            sequence += tl.sum((passed & is_end[None, :]).to(tl.int32), axis=1)
        # Rows behind the last sequence have no keys.
        inside = row_mask & (sequence < n_sequences)
        first_sequence = tl.min(tl.where(inside, sequence, n_sequences), axis=0)
        last_sequence = tl.max(tl.where(inside, sequence, -1), axis=0)

        q_rows = qkv_ptr + _source_rows(rows_ptr, rows, row_mask, gather, n_tokens) * (3 * width) + column
        q = qkv_ptr
        if CHUNK_D == BLOCK_D:
            q = load_rows(q_rows[:, None] + dims[None, :], rows, n_rows, dims, True, HEAD_DIM, BLOCK_D)
        acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        row_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
        row_keys = tl.zeros([BLOCK_Q], dtype=tl.int32)
        for i in range(first_sequence, last_sequence + 1):
            first_token, n_keys = sequence_range(cu_seqlens_ptr, i, n_tokens)
            k_base = qkv_ptr + first_token.to(tl.int64) * (3 * width) + width + column
            # A choice, not a product with 0: NaN in one sequence stays out of the others.
            here = inside & (sequence == i)
            row_keys = tl.where(here, n_keys, row_keys)
            for first_key in range(0, n_keys, BLOCK_S):
                new_acc, new_max, new_sum = _attend(
                    acc, row_max, row_sum, q, q_rows, k_base, k_base + width, 3 * width, 3 * width, first_key, n_keys, rows,
                    n_rows, scale_log2, rows, 0, 0, 0, 1.0,
                    True, False, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_S, CHUNK_D, TF32,
                )  # fmt: skip
                acc = tl.where(here[:, None], new_acc, acc)
                row_max = tl.where(here, new_max, row_max)
                row_sum = tl.where(here, new_sum, row_sum)

        # Without keys the sum over none is zero; with keys a zero sum is 0 / 0, NaN as in torch.
        out = acc / tl.where(row_keys == 0, 1.0, row_sum)[:, None]
        at = context_ptr + rows[:, None] * width + (column + dims)[None, :]
        mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(at, round_to(out, context_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_phase(
    z_ptr,  # (n_rows, H)
    z_statistics_ptr,  # (n_rows, 2, blocks) float32
    norm_weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    out_ptr,  # (n_rows, H)
    n_rows,
    width,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out = LayerNorm(z)."""
    row_tiles = tl.cdiv(n_rows, BLOCK_M)
    for tile in range(tl.program_id(0), row_tiles * tl.cdiv(width, BLOCK_N), tl.num_programs(0)):
        rows = (tile % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = rows < n_rows
        mean, rstd = _joined_statistics(z_statistics_ptr, rows, row_mask, width, eps, True, BLOCK_N, BLOCKS)
        at = rows[:, None] * width + cols[None, :]
        mask = row_mask[:, None] & (cols < width)[None, :]
        z = tl.load(z_ptr + at, mask=mask, other=0.0)
        out = _normalised(z, mean, rstd, norm_weight_ptr, norm_bias_ptr, cols, width, True)
        tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty), mask=mask)
