"""bias_gelu: dropout(act(x + bias)) in one pass over memory; its gradient in one pass, too.

The forward moves 2 T I elements and nothing else: a program takes BLOCK_M rows of BLOCK_N columns, so that the bias is
read once for all of its rows.

The backward moves 3 T I elements, and 8 P I bytes for the sums of the bias's gradient, where P is at most 512 divided by I's
blocks of columns: at 32,768 x 3072 in bfloat16 604 MB, and 2 MB of sums.

Dropout moves nothing: its mask is computed, and the backward computes it again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import (
    ACT_CODES,
    BWD_OPTIONS,
    COMPILER_OPTIONS,
    Dropout,
    activate,
    activation_grad,
    bwd_stages,
    column_sums,
    dropout_arguments,
    dropout_factor,
    group_rows,
    load_row_vector,
    round_to,
    row_groups,
    rows_contiguous,
    store_column_sums,
)

# I is a multiple of 512 in every released model but the tiny one, where it is 1248.
BLOCK_N, NUM_WARPS = 512, 4


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi", "dropout_threshold"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (T, I), rows `stride_x_row` elements apart
    bias_ptr,  # (I,), or None for zeros
    out_ptr,  # (T, I), contiguous
    n_rows,  # T
    n_cols,  # I
    stride_x_row,
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    ACT: tl.constexpr,  # a value of ACT_CODES
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes a tile of BLOCK_M rows and BLOCK_N columns; neighbouring programs take neighbouring columns of the same rows.
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    row_block = tl.program_id(0) // col_blocks
    col_block = tl.program_id(0) % col_blocks
    # 64 bits: T * I passes 2^31 elements in large batches.
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]

    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += load_row_vector(bias_ptr, cols, n_cols)
    out = activate(x, ACT)
    if seed_lo is not None:
        dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
        out *= dropout_factor(dropout, rows[:, None], cols[None, :])
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)


def bias_gelu_fwd(
    x: torch.Tensor, bias: torch.Tensor | None, act: str, dropout_p: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """dropout(act(x + bias)), (T, I) in x's dtype.

    Args:
        x: (T, I).
        bias: (I,), in x's dtype; None: zeros.
        act: "gelu_tanh", "gelu_erf" or "relu".
        dropout_p, seed: element (row, col) survives where hash32(seed, row, col) >= floor(dropout_p * 2^32).

    Raises:
        ValueError: dropout_p outside [0, 1).
    """
    x, bias = rows_contiguous(x), None if bias is None else bias.contiguous()
    n_rows, n_cols = x.shape
    numbers = (n_rows, n_cols, x.stride(0), *dropout_arguments(dropout_p, seed))
    out = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_m = 16 // x.itemsize  # four 16-byte loads in flight in every thread
    grid = (triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, BLOCK_N),)
    tiles = {"ACT": ACT_CODES[act], "BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "num_warps": NUM_WARPS}
    # Rows that are not made of whole words take more addresses; without a limit ptxas spills some of them.
    options = BWD_OPTIONS if n_cols % 16 else COMPILER_OPTIONS
    with torch.cuda.device_of(x):
        _bias_gelu_fwd_kernel[grid](x, bias, out, *numbers, **tiles, **options)
    return out


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi", "dropout_threshold"])
def _bias_gelu_bwd_kernel(
    grad_ptr,  # (T, I), rows `stride_grad_row` elements apart
    x_ptr,  # (T, I), rows `stride_x_row` elements apart
    bias_ptr,  # (I,), or None for zeros
    dx_ptr,  # (T, I), contiguous
    partials_ptr,  # (P, 1, I) float32: each group's part of the bias's gradient
    n_rows,  # T
    n_cols,  # I
    stride_grad_row,
    stride_x_row,
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    ACT: tl.constexpr,  # a value of ACT_CODES
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    # A program takes one block of columns of every P-th tile of rows.
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        bias = load_row_vector(bias_ptr, cols, n_cols)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(1), n_tiles, tl.num_programs(1), num_stages=STAGES):
        rows, row_mask = group_rows(tile, n_rows, BLOCK_M)
        mask = row_mask[:, None] & (cols < n_cols)[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * stride_grad_row + cols[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += bias

        dx = activation_grad(grad.to(tl.float32), x, ACT)
        if seed_lo is not None:
            # After the slope of the activation, whose registers are free by then.
            dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
            dx *= dropout_factor(dropout, rows[:, None], cols[None, :])
        # An infinite bias would make NaN of the zeros behind the last row.
        dbias += tl.where(mask, dx, 0.0)
        tl.store(dx_ptr + rows[:, None] * n_cols + cols[None, :], round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
    store_column_sums(partials_ptr, dbias, 0, cols, n_cols, 1)


def bias_gelu_bwd(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, act: str, dropout_p: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of dropout(act(x + bias)).

    Args:
        grad, x: (T, I), of one dtype.
        bias: (I,), in x's dtype; None: zeros.
        act: "gelu_tanh", "gelu_erf" or "relu".
        dropout_p, seed: of the forward.

    Returns:
        dx (T, I) and dbias (I,) in x's dtype. The sums of dbias are float32 and taken in the same order everywhere.

    Raises:
        ValueError: dropout_p outside [0, 1).
    """
    grad, x, bias = rows_contiguous(grad), rows_contiguous(x), None if bias is None else bias.contiguous()
    n_rows, n_cols = x.shape
    numbers = (n_rows, n_cols, grad.stride(0), x.stride(0), *dropout_arguments(dropout_p, seed))
    dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, x.new_zeros(n_cols)
    block_m = 4  # 16 elements a thread
    col_blocks = triton.cdiv(n_cols, BLOCK_N)
    groups = row_groups(n_rows, block_m, col_blocks)
    partials = torch.empty((groups, 1, n_cols), dtype=torch.float32, device=x.device)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "STAGES": bwd_stages(x), "num_warps": NUM_WARPS, **BWD_OPTIONS}
    with torch.cuda.device_of(x):
        _bias_gelu_bwd_kernel[(col_blocks, groups)](grad, x, bias, dx, partials, *numbers, ACT=ACT_CODES[act], **tiles)
    (dbias,) = column_sums(partials, x.dtype)
    return dx, dbias
