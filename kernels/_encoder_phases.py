"""The phases of the persistent encoder kernel, each divided into tiles over all programs, and the barrier between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._common import Dropout, activate, load_row_vector, product, round_to
from ._layer_norm import moments_overflow
from .attention import HeadKeys, HeadRows, add_keys, load_operand, sequence_range

NO_ACT = tl.constexpr(-1)
_MAX_POLLS = tl.constexpr(1 << 22)


class ProductTile(NamedTuple):
    """Compile-time sizes of the products."""

    BLOCK_M: Any  # rows
    BLOCK_N: Any  # columns of the output
    BLOCK_K: Any  # columns multiplied at a time
    BLOCKS: Any  # blocks of BLOCK_N columns in a row of H, up to a power of two
    TF32: Any  # whether float32 is multiplied as TF32


class NormedRows(NamedTuple):
    """Rows z, and the LayerNorm that is applied wherever they are read."""

    z_ptr: Any  # (T, H)
    statistics_ptr: Any  # (T, 2, blocks) float32: mean and sum of squared differences in each block of columns
    weight_ptr: Any  # (H,)
    bias_ptr: Any  # (H,)
    is_sum: Any  # whether z are sums with statistics; False: embeddings, to which no LayerNorm is applied


class Linear(NamedTuple):
    """A weight matrix and its bias."""

    weight_ptr: Any  # (n_cols, depth)
    bias_ptr: Any  # (n_cols,)


class Wanted(NamedTuple):
    """The rows that the last layer computes."""

    rows_ptr: Any  # (Tq,) int64, or None for all tokens
    gather: Any  # whether this is the last layer
    n_tokens: Any  # T


class SplitSums(NamedTuple):
    """Memory for products whose inner dimension is split over several programs."""

    partials_ptr: Any  # (tiles, splits, BLOCK_M, BLOCK_N) float32
    arrivals_ptr: Any  # (tiles,) int32, zeros before and after


@triton.jit
def barrier(counter_ptr, target):
    """Wait until `target` programs, counted over all barriers of the launch, have arrived."""
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
    """`first_ptr` if the condition holds, otherwise `second_ptr`."""
    if condition:
        second_ptr = first_ptr
    return second_ptr


@triton.jit
def _row_statistics(
    normed,  # NormedRows
    rows,  # (BLOCK_M,) int64
    row_mask,  # (BLOCK_M,)
    width,  # H
    eps,
    TILE: tl.constexpr,  # ProductTile
):
    """LayerNorm's mean and rstd (BLOCK_M,) of whole rows, from the statistics of their blocks (Chan et al. 1979)."""
    blocks = tl.arange(0, TILE.BLOCKS)
    n_blocks = tl.cdiv(width, TILE.BLOCK_N)
    counts = tl.minimum(tl.maximum(width - blocks * TILE.BLOCK_N, 0), TILE.BLOCK_N).to(tl.float32)[None, :]
    at = normed.statistics_ptr + rows[:, None] * (2 * n_blocks) + blocks[None, :]
    mask = row_mask[:, None] & (blocks < n_blocks)[None, :] & normed.is_sum
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + n_blocks, mask=mask, other=0.0)
    mean = tl.sum(means * counts, axis=1) / width
    difference = means - mean[:, None]
    variance = tl.sum(squares + counts * difference * difference, axis=1) / width
    rstd = tl.rsqrt(variance + moments_overflow(mean, width) + eps)
    return mean, tl.where(normed.is_sum, rstd, 1.0)


@triton.jit
def _normalised(
    z,  # a tile of the rows
    mean,  # (BLOCK_M,) float32
    rstd,  # (BLOCK_M,) float32
    normed,  # NormedRows
    cols,  # the tile's columns
    n_cols,  # H
):
    """float32 LayerNorm of a tile; embeddings come back unchanged."""
    weight = tl.where(normed.is_sum, load_row_vector(normed.weight_ptr, cols, n_cols), 1.0)
    bias = tl.where(normed.is_sum, load_row_vector(normed.bias_ptr, cols, n_cols), 0.0)
    return (z.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight + bias


@triton.jit
def _token_rows(wanted, rows, row_mask):
    """The row numbers of a tile among all tokens: unchanged, or in the last layer those of the wanted rows."""
    if wanted.rows_ptr is not None:
        indices = tl.load(wanted.rows_ptr + rows, mask=row_mask & wanted.gather, other=0)
        # They are not checked before the launch: clamping keeps a wrong one inside the batch.
        rows = tl.where(wanted.gather, tl.minimum(tl.maximum(indices, 0), wanted.n_tokens - 1), rows)
    return rows


@triton.jit
def product_phase(
    x_ptr,  # (n_rows, depth), the rows that are multiplied if ADD_Z; otherwise not read
    normed,  # NormedRows: their LayerNorm is added to the product if ADD_Z; otherwise it is multiplied
    first,  # Linear
    second,  # Linear, or None; with it and the third there are three products of the same rows
    third,
    out_ptr,  # (n_rows, products, n_cols)
    out_statistics_ptr,  # (n_rows, 2, blocks) float32, written if ADD_Z; otherwise None
    split_sums,  # SplitSums
    wanted,  # Wanted
    n_rows,
    n_cols,
    depth,
    split_steps,  # steps of BLOCK_K in a split of the inner dimension
    eps,
    ADD_Z: tl.constexpr,  # with one product only
    ACT: tl.constexpr,  # a value of ACT_CODES, or NO_ACT
    TILE: tl.constexpr,  # ProductTile
):
    """out = act(LayerNorm(z) weight^T + bias), for one or three weights; or x weight^T + bias + LayerNorm(z), and the
    statistics of these rows. A program takes every P-th tile of BLOCK_M x BLOCK_N outputs, or a split of one."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    PRODUCTS: tl.constexpr = 1 if third is None else 3
    splits = tl.cdiv(depth, split_steps * BLOCK_K)
    dtype = out_ptr.dtype.element_ty
    row_tiles = tl.cdiv(n_rows, BLOCK_M)
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    for item in range(tl.program_id(0), row_tiles * (PRODUCTS * col_tiles) * splits, tl.num_programs(0)):
        split = item % splits
        tile = item // splits
        block = tile // row_tiles
        own_weight_ptr = first.weight_ptr
        own_bias_ptr = first.bias_ptr
        own_out_ptr = out_ptr
        if PRODUCTS == 3:
            index = block // col_tiles
            block = block % col_tiles
            own_weight_ptr = chosen(
                index == 0, first.weight_ptr, chosen(index == 1, second.weight_ptr, third.weight_ptr)
            )
            own_bias_ptr = chosen(index == 0, first.bias_ptr, chosen(index == 1, second.bias_ptr, third.bias_ptr))
            own_out_ptr = out_ptr + index * n_cols
        # 64 bits: row number times width passes 2^31 elements in large batches.
        rows = (tile % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = rows < n_rows
        col_mask = cols < n_cols
        z_rows = _token_rows(wanted, rows, row_mask)
        width = n_cols if ADD_Z else depth
        mean, rstd = _row_statistics(normed, z_rows, row_mask, width, eps, TILE)

        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        first_of_split = split * split_steps * BLOCK_K
        for first_k in range(first_of_split, tl.minimum(first_of_split + split_steps * BLOCK_K, depth), BLOCK_K):
            inner = first_k + tl.arange(0, BLOCK_K)
            inner_mask = inner < depth
            mask = row_mask[:, None] & inner_mask[None, :]
            weights = own_weight_ptr + cols.to(tl.int64)[:, None] * depth + inner[None, :]
            b = tl.load(weights, mask=col_mask[:, None] & inner_mask[None, :], other=0.0)
            if ADD_Z:
                a = tl.load(x_ptr + rows[:, None] * depth + inner[None, :], mask=mask, other=0.0)
            else:
                z = tl.load(normed.z_ptr + z_rows[:, None] * depth + inner[None, :], mask=mask, other=0.0)
                a = _normalised(z, mean, rstd, normed, inner, depth)
                a = round_to(a, dtype)
            acc = product(a, tl.trans(b), acc, TILE.TF32)

        is_last = splits == 1
        if splits > 1:
            inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            partials = split_sums.partials_ptr + tile * splits * (BLOCK_M * BLOCK_N) + inside
            tl.store(partials + split * (BLOCK_M * BLOCK_N), acc)
            tl.debug_barrier()
            # As in `barrier`: it releases these sums, and the last program to arrive acquires those of the others.
            is_last = tl.atomic_add(split_sums.arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
            if is_last:
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for i in range(splits):
                    acc += tl.load(partials + i * (BLOCK_M * BLOCK_N))
                tl.store(split_sums.arrivals_ptr + tile, 0)
        if is_last:
            mask = row_mask[:, None] & col_mask[None, :]
            out = acc + load_row_vector(own_bias_ptr, cols, n_cols)
            if ADD_Z:
                z = tl.load(normed.z_ptr + z_rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
                out += _normalised(z, mean, rstd, normed, cols, n_cols)
            if ACT != NO_ACT:
                out = activate(out, ACT)
            rounded = round_to(out, dtype)
            tl.store(own_out_ptr + rows[:, None] * (PRODUCTS * n_cols) + cols[None, :], rounded, mask=mask)
            if ADD_Z:
                # Statistics of the rounded sums, so that their LayerNorm has exactly mean 0 and variance 1.
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
    cu_seqlens_ptr,  # (B + 1,) int32, where each sequence's keys begin among the tokens
    cu_queries_ptr,  # (B + 1,) int32, where each sequence's queries begin among the rows
    wanted,  # Wanted
    n_rows,
    n_sequences,
    width,  # H
    num_heads,
    scale_log2,  # softmax_scale * log2(e)
    TILE: tl.constexpr,  # HeadTile
):
    """context = attention(qkv). A program takes one head of every P-th block of BLOCK_M queries, which may belong to several
    sequences."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    dims = tl.arange(0, TILE.BLOCK_D)
    for item in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M) * num_heads, tl.num_programs(0)):
        column = item % num_heads * TILE.HEAD_DIM
        rows = (item // num_heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < n_rows
        sequence = tl.zeros([BLOCK_M], dtype=tl.int32)
        for first in range(1, n_sequences + 1, 32):
            ends = first + tl.arange(0, 32)
            is_end = ends <= n_sequences
            passed = tl.load(cu_queries_ptr + ends, mask=is_end, other=0)[None, :] <= rows[:, None]
            sequence += tl.sum((passed & is_end[None, :]).to(tl.int32), axis=1)
        # Rows behind the last sequence have no keys.
        inside = row_mask & (sequence < n_sequences)
        first_sequence = tl.min(tl.where(inside, sequence, n_sequences), axis=0)
        last_sequence = tl.max(tl.where(inside, sequence, -1), axis=0)

        q_ptrs = qkv_ptr + _token_rows(wanted, rows, row_mask) * (3 * width) + column
        q = load_operand(q_ptrs, rows, n_rows, True, TILE)
        queries = HeadRows(q, q_ptrs, rows, n_rows)
        acc = tl.zeros([BLOCK_M, TILE.BLOCK_D], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        row_keys = tl.zeros([BLOCK_M], dtype=tl.int32)
        for i in range(first_sequence, last_sequence + 1):
            first_token, n_keys = sequence_range(cu_seqlens_ptr, i, wanted.n_tokens)
            k_base = qkv_ptr + first_token.to(tl.int64) * (3 * width) + width + column
            keys = HeadKeys(k_base, k_base + width, 3 * width, 3 * width, n_keys)
            # Selected, not multiplied by 0: NaN in one sequence stays out of the others.
            here = inside & (sequence == i)
            row_keys = tl.where(here, n_keys, row_keys)
            for first_key in range(0, n_keys, TILE.BLOCK_N):
                new_acc, new_max, new_sum = add_keys(
                    acc,
                    row_max,
                    row_sum,
                    queries,
                    keys,
                    first_key,
                    scale_log2,
                    rows,
                    Dropout(None, None, None, None),
                    True,
                    TILE,
                )
                acc = tl.where(here[:, None], new_acc, acc)
                row_max = tl.where(here, new_max, row_max)
                row_sum = tl.where(here, new_sum, row_sum)

        # Without keys the sum is 0 and so is the output; with keys a sum of 0 gives 0 / 0, NaN as in torch.
        out = acc / tl.where(row_keys == 0, 1.0, row_sum)[:, None]
        at = context_ptr + rows[:, None] * width + (column + dims)[None, :]
        mask = row_mask[:, None] & (dims < TILE.HEAD_DIM)[None, :]
        tl.store(at, round_to(out, context_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_phase(
    normed,  # NormedRows
    out_ptr,  # (n_rows, H)
    n_rows,
    width,  # H
    eps,
    TILE: tl.constexpr,  # ProductTile
):
    """out = LayerNorm(z). A program takes every P-th tile of BLOCK_M x BLOCK_N elements."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    row_tiles = tl.cdiv(n_rows, BLOCK_M)
    for tile in range(tl.program_id(0), row_tiles * tl.cdiv(width, BLOCK_N), tl.num_programs(0)):
        rows = (tile % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = rows < n_rows
        mean, rstd = _row_statistics(normed, rows, row_mask, width, eps, TILE)
        at = rows[:, None] * width + cols[None, :]
        mask = row_mask[:, None] & (cols < width)[None, :]
        z = tl.load(normed.z_ptr + at, mask=mask, other=0.0)
        out = _normalised(z, mean, rstd, normed, cols, width)
        tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty), mask=mask)
