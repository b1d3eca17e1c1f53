"""embedding_layer_norm: rows of three tables, their sum, LayerNorm and dropout in one pass over memory; its gradient in one, too.

The forward reads T H elements of the word table (the other two are small and stay in the L2 cache) and writes T H elements and
8 T bytes of statistics. A program holds BLOCK_M whole rows in registers.

The backward reads the same rows and T H elements of the gradient, and writes the gradient of the sums, dz, 4 T H bytes, which
the tables' gradients are added up from; and 16 P H bytes for the sums of the two vectors' gradients, P <= 512. Rows above
4096 are read twice: first for the two means of a row, then in blocks of columns.

An id outside its table is never followed: its token reads no row, and adds to no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    BWD_OPTIONS,
    COMPILER_OPTIONS,
    Dropout,
    bwd_row_tiles,
    column_sums,
    dropout_arguments,
    dropout_factor,
    group_rows,
    load_row_vector,
    program_rows,
    round_to,
    row_groups,
    row_tiles,
    rows_contiguous,
    store_column_sums,
)
from ._layer_norm import layer_norm_rows

# What `first_bad` holds where every id lies in its table; otherwise token * 3 + table of the first that does not.
NO_BAD_ID = torch.iinfo(torch.int64).max


class Tables(NamedTuple):
    """The look-ups of a batch; one argument of a kernel. Tables are contiguous."""

    ids_ptr: Any  # (T,) int64; None: word has a row for every token
    types_ptr: Any  # (T,) int64; None: there are no token types
    positions_ptr: Any  # (T,) int64
    word_ptr: Any  # (V, H), or (T, H) rows
    type_ptr: Any  # (Y, H) or None
    position_ptr: Any  # (P, H)


class Sizes(NamedTuple):
    """Rows of the tables; kernels take them one by one, because Triton specialises every number of a tuple."""

    words: Any  # V
    types: Any  # Y
    positions: Any  # P


@triton.jit
def _look_up(tables, sizes, rows, row_mask):
    """Rows of each table (BLOCK_M,) int64, which tokens have all of theirs inside, and the first table that has not: 0, 1, 2."""
    words = rows
    word_inside = row_mask
    if tables.ids_ptr is not None:
        words = tl.load(tables.ids_ptr + rows, mask=row_mask, other=0)
        word_inside = (words >= 0) & (words < sizes.words)
    positions = tl.load(tables.positions_ptr + rows, mask=row_mask, other=0)
    inside = word_inside & (positions >= 0) & (positions < sizes.positions)
    types = rows
    bad_table = tl.where(word_inside, 2, 0)
    if tables.types_ptr is not None:
        types = tl.load(tables.types_ptr + rows, mask=row_mask, other=0)
        type_inside = (types >= 0) & (types < sizes.types)
        inside = inside & type_inside
        bad_table = tl.where(word_inside & (type_inside == 0), 1, bad_table)
    return words, types, positions, row_mask & inside, bad_table


@triton.jit
def _sum_rows(tables, words, types, positions, cols, mask, n_cols):
    """(word + type) + position (BLOCK_M, BLOCK_N) in float32, 0 outside `mask`."""
    z = tl.load(tables.word_ptr + words[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if tables.type_ptr is not None:
        z += tl.load(tables.type_ptr + types[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    at = positions[:, None] * n_cols + cols[None, :]
    return z + tl.load(tables.position_ptr + at, mask=mask, other=0.0).to(tl.float32)


_NOT_SPECIALISED = ["n_rows", "n_words", "n_types", "n_positions", "seed_lo", "seed_hi", "dropout_threshold"]


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _embedding_layer_norm_fwd_kernel(
    tables,  # Tables
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,)
    out_ptr,  # (T, H), contiguous
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    first_bad_ptr,  # () int64, NO_BAD_ID before
    n_rows,  # T
    n_words,  # this and the next two: the fields of Sizes
    n_types,
    n_positions,
    n_cols,  # H
    eps,
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes BLOCK_M whole rows.
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)
    sizes = Sizes(n_words, n_types, n_positions)
    words, types, positions, inside, bad_table = _look_up(tables, sizes, rows, row_mask)
    bad = row_mask & (inside == 0)
    first_bad = tl.min(tl.where(bad, rows * 3 + bad_table, 0x7FFFFFFFFFFFFFFF), axis=0)
    if first_bad != 0x7FFFFFFFFFFFFFFF:
        tl.atomic_min(first_bad_ptr, first_bad)

    z = _sum_rows(tables, words, types, positions, cols, mask & inside[:, None], n_cols)
    normalised, mean, rstd = layer_norm_rows(z, mask, n_cols, eps)
    out = normalised * load_row_vector(weight_ptr, cols, n_cols) + load_row_vector(ln_bias_ptr, cols, n_cols)
    if seed_lo is not None:
        dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
        out *= dropout_factor(dropout, rows[:, None], cols[None, :])
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


def _kernel_tables(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor,
) -> tuple[Tables, Sizes]:
    words = word if inputs_embeds is None else inputs_embeds
    given = (input_ids, token_type_ids, position_ids, words, token_type, position)
    sizes = Sizes(len(word), 0 if token_type is None else len(token_type), len(position))
    return Tables(*(None if t is None else t.contiguous() for t in given)), sizes


def embedding_layer_norm_fwd(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])).

    Args:
        input_ids: (T,) int64, or None with inputs_embeds (T, H), which then take the place of the looked-up rows.
        token_type_ids: (T,) int64, or None together with token_type. position_ids: (T,) int64.
        word (V, H), token_type (Y, H), position (P, H), weight (H,), ln_bias (H,): of one dtype.
        eps: added to the variance.
        dropout_p, seed: element (row, col) survives where hash32(seed, row, col) >= floor(dropout_p * 2^32).

    Returns:
        out (T, H) in word's dtype; mean (T,) and rstd (T,) float32 of the rows before LayerNorm; first_bad () int64, NO_BAD_ID
        or token * 3 + table of the first id outside its table (0 word, 1 type, 2 position). Such a token's sum is 0.

    Raises:
        ValueError: H above 16384, or dropout_p outside [0, 1).
    """
    tables, sizes = _kernel_tables(input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position)
    weight, ln_bias = weight.contiguous(), ln_bias.contiguous()
    n_rows, n_cols = len(position_ids), word.shape[1]
    out = torch.empty((n_rows, n_cols), dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=word.device) for _ in range(2))
    first_bad = torch.full((), NO_BAD_ID, dtype=torch.int64, device=word.device)
    block_m, block_n, num_warps = row_tiles(n_cols)
    num_warps = max(num_warps, block_n // 512)  # rows of 4096 from three tables spill with 32 elements a thread
    numbers = (n_rows, *sizes, n_cols, eps, *dropout_arguments(dropout_p, seed))
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **COMPILER_OPTIONS}
    if n_rows == 0:
        return out, mean, rstd, first_bad
    grid = (triton.cdiv(n_rows, block_m),)
    with torch.cuda.device_of(word):
        _embedding_layer_norm_fwd_kernel[grid](tables, weight, ln_bias, out, mean, rstd, first_bad, *numbers, **tiles)
    return out, mean, rstd, first_bad


class SavedRows(NamedTuple):
    """What the backward reads beside the tables; one argument of a kernel."""

    grad_ptr: Any  # (T, H), gradient of the output, rows `stride_grad_row` elements apart
    weight_ptr: Any  # (H,), of LayerNorm
    mean_ptr: Any  # (T,) float32, of the forward
    rstd_ptr: Any  # (T,) float32, of the forward
    stride_grad_row: Any


@triton.jit
def _load_and_normalise(
    tables,  # Tables
    saved,  # SavedRows
    dropout,  # Dropout
    found,  # what `_look_up` returned
    weight,  # (1, BLOCK_N) float32
    rows,  # (BLOCK_M,) int64
    row_mask,  # (BLOCK_M,)
    cols,  # (BLOCK_N,)
    n_cols,  # H
):
    """One tile again: its mask, then float32 grad (before dropout), g = grad * weight and z_hat, and rstd (BLOCK_M,).

    g and z_hat are 0 outside the mask.
    """
    words, types, positions, inside, _ = found
    mask = row_mask[:, None] & (cols < n_cols)[None, :]
    grad_at = saved.grad_ptr + rows[:, None] * saved.stride_grad_row + cols[None, :]
    grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
    if dropout.seed_lo is not None:
        grad *= dropout_factor(dropout, rows[:, None], cols[None, :])
    z = _sum_rows(tables, words, types, positions, cols, mask & inside[:, None], n_cols)
    mean = tl.load(saved.mean_ptr + rows, mask=row_mask, other=0.0)
    rstd = tl.load(saved.rstd_ptr + rows, mask=row_mask, other=0.0)
    # Set to 0, so that NaN or infinity in the vectors cannot reach a sum from outside the mask.
    g = tl.where(mask, grad * weight, 0.0)
    z_hat = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
    return mask, grad, g, z_hat, rstd


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _embedding_layer_norm_bwd_means_kernel(
    tables,  # Tables
    saved,  # SavedRows
    means_ptr,  # (2, T) float32, written: the means of g and of g * z_hat of each row
    n_rows,  # T
    n_words,  # this and the next two: the fields of Sizes
    n_types,
    n_positions,
    n_cols,  # H
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes BLOCK_M rows, BLOCK_N columns at a time.
    dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
    rows, row_mask = group_rows(tl.program_id(0), n_rows, BLOCK_M)
    found = _look_up(tables, Sizes(n_words, n_types, n_positions), rows, row_mask)
    g_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    gz_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_col in range(0, n_cols, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        weight = load_row_vector(saved.weight_ptr, cols, n_cols)
        _, _, g, z_hat, _ = _load_and_normalise(tables, saved, dropout, found, weight, rows, row_mask, cols, n_cols)
        g_sum += g
        gz_sum += g * z_hat
    tl.store(means_ptr + rows, tl.sum(g_sum, axis=1) / n_cols, mask=row_mask)
    tl.store(means_ptr + n_rows + rows, tl.sum(gz_sum, axis=1) / n_cols, mask=row_mask)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _embedding_layer_norm_bwd_kernel(
    tables,  # Tables
    saved,  # SavedRows
    means_ptr,  # (2, T) float32, read if rows are split
    dz_ptr,  # (T, H) float32, contiguous, written
    table_rows_ptr,  # (3, T) int64, written: each token's rows of the tables, 0 for a token with an id outside
    partials_ptr,  # (P, 2, H) float32: each group's part of the gradients of weight and ln_bias
    n_rows,  # T
    n_words,  # this and the next two: the fields of Sizes
    n_types,
    n_positions,
    n_cols,  # H
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    WHOLE_ROWS: tl.constexpr,  # BLOCK_N >= H
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes a block of columns of every P-th tile of rows.
    dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = load_row_vector(saved.weight_ptr, cols, n_cols)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dln_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    for tile in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        rows, row_mask = group_rows(tile, n_rows, BLOCK_M)
        found = _look_up(tables, Sizes(n_words, n_types, n_positions), rows, row_mask)
        words, types, positions, inside, _ = found
        mask, grad, g, z_hat, rstd = _load_and_normalise(
            tables, saved, dropout, found, weight, rows, row_mask, cols, n_cols
        )
        if WHOLE_ROWS:
            g_mean = tl.sum(g, axis=1) / n_cols
            gz_mean = tl.sum(g * z_hat, axis=1) / n_cols
        else:
            g_mean = tl.load(means_ptr + rows, mask=row_mask, other=0.0)
            gz_mean = tl.load(means_ptr + n_rows + rows, mask=row_mask, other=0.0)
        # Ba et al. 2016, equation 3, differentiated.
        dz = (g - g_mean[:, None] - z_hat * gz_mean[:, None]) * rstd[:, None]
        dz = tl.where(inside[:, None], dz, 0.0)
        dweight += grad * z_hat
        dln_bias += grad
        tl.store(dz_ptr + rows[:, None] * n_cols + cols[None, :], dz, mask=mask)
        writes = row_mask & (tl.program_id(0) == 0)
        tl.store(table_rows_ptr + rows, tl.where(inside, words, 0), mask=writes)
        tl.store(table_rows_ptr + n_rows + rows, tl.where(inside, types, 0), mask=writes)
        tl.store(table_rows_ptr + 2 * n_rows + rows, tl.where(inside, positions, 0), mask=writes)
    store_column_sums(partials_ptr, dweight, 0, cols, n_cols, 2)
    store_column_sums(partials_ptr, dln_bias, 1, cols, n_cols, 2)


def embedding_layer_norm_bwd(
    grad: torch.Tensor,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the summed rows and of LayerNorm's vectors (Ba et al. 2016, equation 3, differentiated).

    Args:
        grad: (T, H), in word's dtype. mean, rstd: (T,) float32, of the forward.
        Others: as `embedding_layer_norm_fwd` takes them.

    Returns:
        dz (T, H) float32, the gradient of word + type + position, 0 for a token with an id outside its table; table_rows (3, T)
        int64, the rows of the word, type and position table that it belongs to; dweight, dln_bias (H,) in word's dtype. Sums
        are float32 and taken in the same order everywhere.

    Raises:
        ValueError: dropout_p outside [0, 1).
    """
    tables, sizes = _kernel_tables(input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position)
    grad = rows_contiguous(grad)
    n_rows, n_cols = grad.shape
    dz = torch.empty((n_rows, n_cols), dtype=torch.float32, device=grad.device)
    table_rows = torch.empty((3, n_rows), dtype=torch.int64, device=grad.device)
    if dz.numel() == 0:
        return dz, table_rows, torch.zeros_like(weight), torch.zeros_like(weight)
    saved = SavedRows(grad, weight.contiguous(), mean.contiguous(), rstd.contiguous(), grad.stride(0))
    numbers = (n_rows, *sizes, n_cols, *dropout_arguments(dropout_p, seed))
    block_m, block_n, num_warps = bwd_row_tiles(n_cols)
    col_blocks = triton.cdiv(n_cols, block_n)
    groups = row_groups(n_rows, block_m, col_blocks)
    partials = torch.empty((groups, 2, n_cols), dtype=torch.float32, device=grad.device)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **BWD_OPTIONS}
    means = partials  # a placeholder; the kernel does not read it if rows are whole
    with torch.cuda.device_of(grad):
        if col_blocks > 1:
            means = torch.empty((2, n_rows), dtype=torch.float32, device=grad.device)
            grid = (triton.cdiv(n_rows, block_m),)
            _embedding_layer_norm_bwd_means_kernel[grid](tables, saved, means, *numbers, **tiles)
        written = (dz, table_rows, partials)
        whole = {"WHOLE_ROWS": col_blocks == 1}
        _embedding_layer_norm_bwd_kernel[col_blocks, groups](tables, saved, means, *written, *numbers, **whole, **tiles)
    dweight, dln_bias = column_sums(partials, weight.dtype)
    return dz, table_rows, dweight, dln_bias
