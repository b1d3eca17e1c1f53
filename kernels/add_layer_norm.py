"""add_layer_norm: LayerNorm(dropout(x + bias) + residual), one pass over memory, and its gradient, one pass too.

The forward moves 3 T H elements and 8 T bytes of statistics. A program holds BLOCK_M whole rows in registers, several where
rows are short, so that a thread always has enough loads in flight.

The backward moves 4 T H elements (5 with dropout), 8 T bytes of statistics, and 24 P H bytes for the sums of the three
vectors' gradients, P <= 512: at 32,768 x 768 in bfloat16 201 MB, 0.3 MB and 9 MB, most of the last within the L2 cache.
Rows above 4096, wider than any ALBERT's, are read twice, 7 T H elements: first for the two means of a row, then in blocks
of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import (
    COMPILER_OPTIONS,
    dropout_arguments,
    dropout_keep,
    group_rows,
    layer_norm_grad,
    load_row_vector,
    normalise_again,
    program_rows,
    round_to,
    row_tiles,
    rows_contiguous,
    start_layer_norm_bwd,
    store_column_sums,
    store_layer_norm,
    store_row_means,
)


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi", "dropout_threshold"])
def _add_layer_norm_fwd_kernel(
    x_ptr,  # (T, H), rows `stride_x_row` elements apart
    bias_ptr,  # (H,)
    residual_ptr,  # (T, H), rows `stride_residual_row` elements apart
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,)
    out_ptr,  # (T, H), contiguous
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    n_rows,  # T
    n_cols,  # H
    stride_x_row,
    stride_residual_row,
    eps,
    seed_lo,  # int32 halves of the dropout seed
    seed_hi,
    dropout_threshold,  # int32 holding floor(p * 2^32)
    dropout_scale,  # 1 / (1 - p)
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)

    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + rows[:, None] * stride_residual_row + cols[None, :], mask=mask, other=0.0)
    z = x + load_row_vector(bias_ptr, cols, n_cols)
    if HAS_DROPOUT:
        keep = dropout_keep(seed_lo, seed_hi, dropout_threshold, rows[:, None], cols[None, :])
        # A product, not a choice: a dropped NaN or infinity stays NaN, as in torch.
        z *= tl.where(keep, dropout_scale, 0.0)
    z += residual.to(tl.float32)

    store_layer_norm(z, weight_ptr, ln_bias_ptr, out_ptr, mean_ptr, rstd_ptr, rows, cols, row_mask, mask, n_cols, eps)


def add_layer_norm_fwd(
    x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, ln_bias: torch.Tensor,
    eps: float, dropout_p: float = 0.0, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """LayerNorm(dropout(x + bias) + residual) * weight + ln_bias.

    Args:
        x, residual: (T, H), of one dtype.
        bias, weight, ln_bias: (H,), in x's dtype.
        eps: added to the variance.
        dropout_p, seed: element (row, col) survives where hash32(seed, row, col) >= floor(dropout_p * 2^32).

    Returns:
        out (T, H) in x's dtype; mean (T,) and rstd (T,) float32 of the normalised rows.

    Raises:
        ValueError: H above 16384, dropout_p outside [0, 1).
    """
    x, residual = rows_contiguous(x), rows_contiguous(residual)
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block_m, block_n, num_warps = row_tiles(n_cols)
    dropout = dropout_arguments(dropout_p, seed)
    if n_rows == 0:
        return out, mean, rstd
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(n_rows, block_m),)](
            x, bias.contiguous(), residual, weight.contiguous(), ln_bias.contiguous(), out, mean, rstd, n_rows, n_cols,
            x.stride(0), residual.stride(0), eps, *dropout,
            HAS_DROPOUT=dropout_p > 0.0, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out, mean, rstd


@triton.jit
def _load_gradient(
    grad_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr,  # as in the kernels below
    bias, weight,  # (1, BLOCK_N) float32
    n_rows, n_cols, stride_grad_row, stride_x_row, stride_residual_row,
    seed_lo, seed_hi, dropout_threshold, dropout_scale, tile, cols, HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows: rows, mask, and in float32 grad, g = grad * weight, z_hat, the dropout's factors, rstd."""
    rows, row_mask = group_rows(tile, n_rows, BLOCK_M)
    mask = row_mask[:, None] & (cols < n_cols)[None, :]
    grad = tl.load(grad_ptr + rows[:, None] * stride_grad_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + rows[:, None] * stride_residual_row + cols[None, :], mask=mask, other=0.0)

    z = x + bias
    factor = 1.0
    if HAS_DROPOUT:
        keep = dropout_keep(seed_lo, seed_hi, dropout_threshold, rows[:, None], cols[None, :])
        factor = tl.where(keep, dropout_scale, 0.0)
        z *= factor
    z += residual.to(tl.float32)
    g, z_hat, rstd = normalise_again(z, grad, weight, mean_ptr, rstd_ptr, rows, row_mask, mask)
    return rows, mask, grad, g, z_hat, factor, rstd


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi", "dropout_threshold"])
def _add_layer_norm_bwd_means_kernel(
    grad_ptr,  # (T, H), rows `stride_grad_row` elements apart
    x_ptr,  # (T, H), rows `stride_x_row` elements apart
    bias_ptr,  # (H,)
    residual_ptr,  # (T, H), rows `stride_residual_row` elements apart
    weight_ptr,  # (H,)
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    means_ptr,  # (2, T) float32: of g and of g z_hat, see `layer_norm_grad`
    n_rows,  # T
    n_cols,  # H
    stride_grad_row,
    stride_x_row,
    stride_residual_row,
    seed_lo,  # int32 halves of the dropout seed
    seed_hi,
    dropout_threshold,  # int32 holding floor(p * 2^32)
    dropout_scale,  # 1 / (1 - p)
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    g_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    gz_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_col in range(0, n_cols, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        bias = load_row_vector(bias_ptr, cols, n_cols)
        weight = load_row_vector(weight_ptr, cols, n_cols)
        _, _, _, g, z_hat, _, _ = _load_gradient(
            grad_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, bias, weight, n_rows, n_cols, stride_grad_row, stride_x_row,
            stride_residual_row, seed_lo, seed_hi, dropout_threshold, dropout_scale, tl.program_id(0), cols,
            HAS_DROPOUT, BLOCK_M,
        )  # fmt: skip
        g_sum += g
        gz_sum += g * z_hat
    rows, row_mask = group_rows(tl.program_id(0), n_rows, BLOCK_M)
    store_row_means(g_sum, gz_sum, means_ptr, rows, row_mask, n_rows, n_cols)


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi", "dropout_threshold"])
def _add_layer_norm_bwd_kernel(
    grad_ptr,  # (T, H), rows `stride_grad_row` elements apart
    x_ptr,  # (T, H), rows `stride_x_row` elements apart
    bias_ptr,  # (H,)
    residual_ptr,  # (T, H), rows `stride_residual_row` elements apart
    weight_ptr,  # (H,)
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    means_ptr,  # (2, T) float32, where rows are split
    dx_ptr,  # (T, H), contiguous
    dresidual_ptr,  # (T, H), contiguous; without dropout it equals dx and is not written
    partials_ptr,  # (P, 3, H) float32: each group's part of the gradients of bias, weight, ln_bias
    n_rows,  # T
    n_cols,  # H
    stride_grad_row,
    stride_x_row,
    stride_residual_row,
    seed_lo,  # int32 halves of the dropout seed
    seed_hi,
    dropout_threshold,  # int32 holding floor(p * 2^32)
    dropout_scale,  # 1 / (1 - p)
    HAS_DROPOUT: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,  # BLOCK_N >= H
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    # One block of columns of every P-th tile of rows.
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = load_row_vector(bias_ptr, cols, n_cols)
    weight = load_row_vector(weight_ptr, cols, n_cols)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dln_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(1), n_tiles, tl.num_programs(1), num_stages=STAGES):
        rows, mask, grad, g, z_hat, factor, rstd = _load_gradient(
            grad_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, bias, weight, n_rows, n_cols, stride_grad_row, stride_x_row,
            stride_residual_row, seed_lo, seed_hi, dropout_threshold, dropout_scale, tile, cols,
            HAS_DROPOUT, BLOCK_M,
        )  # fmt: skip
        dz = layer_norm_grad(g, z_hat, rstd, means_ptr, rows, n_rows, n_cols, WHOLE_ROWS)
        # A product, as in the forward.
        dx = dz * factor
        dbias += dx
        dweight += grad * z_hat
        dln_bias += grad

        at = rows[:, None] * n_cols + cols[None, :]
        tl.store(dx_ptr + at, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
        if HAS_DROPOUT:
            tl.store(dresidual_ptr + at, round_to(dz, dx_ptr.dtype.element_ty), mask=mask)
    store_column_sums(partials_ptr, dbias, 0, cols, n_cols, 3)
    store_column_sums(partials_ptr, dweight, 1, cols, n_cols, 3)
    store_column_sums(partials_ptr, dln_bias, 2, cols, n_cols, 3)


def add_layer_norm_bwd(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
    mean: torch.Tensor, rstd: torch.Tensor, dropout_p: float = 0.0, seed: int = 0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of LayerNorm(dropout(x + bias) + residual) * weight + ln_bias (Ba et al. 2016, equation 3, differentiated).

    Args:
        grad, x, residual: (T, H), of one dtype.
        bias, weight: (H,), in x's dtype.
        mean, rstd: (T,) float32, of the forward.
        dropout_p, seed: of the forward.

    Returns:
        dx (T, H); dresidual (T, H), or (0, H) without dropout, where it equals dx; dbias, dweight, dln_bias (H,): all in x's
        dtype, sums in float32 and in one order everywhere.

    Raises:
        ValueError: dropout_p outside [0, 1).
    """
    grad, x, residual = map(rows_contiguous, (grad, x, residual))
    n_rows, n_cols = x.shape
    dropout = dropout_arguments(dropout_p, seed)
    dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    dresidual = torch.empty((n_rows if dropout_p else 0, n_cols), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, dresidual, *(torch.zeros_like(bias) for _ in range(3))
    operands = (grad, x, bias.contiguous(), residual, weight.contiguous(), mean, rstd)
    numbers = (n_rows, n_cols, grad.stride(0), x.stride(0), residual.stride(0), *dropout, dropout_p > 0.0)
    sums = start_layer_norm_bwd(
        _add_layer_norm_bwd_means_kernel, _add_layer_norm_bwd_kernel, operands, (dx, dresidual), numbers
    )
    return dx, dresidual, *sums
