"""add_layer_norm: LayerNorm(dropout(x + bias) + residual) in one pass over memory; its gradient in one pass, too.

The forward moves 3 T H elements and 8 T bytes of statistics. A program holds BLOCK_M whole rows in registers, several if
rows are short, so that a thread always has enough loads in flight.

The backward moves 4 T H elements (5 with dropout), 8 T bytes of statistics, and 24 P H bytes for the sums of the three
vectors' gradients, P <= 512: at 32,768 x 768 in bfloat16 201 MB, 0.3 MB and 9 MB, most of the last in the L2 cache.
Rows above 4096, wider than any ALBERT's, are read twice, 7 T H elements: first for the two means of a row, then in blocks
of columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    COMPILER_OPTIONS,
    Dropout,
    dropout_arguments,
    dropout_factor,
    load_row_vector,
    program_rows,
    round_to,
    row_tiles,
    rows_contiguous,
)
from ._layer_norm import NormInputs, layer_norm_bwd, layer_norm_bwd_means, start_layer_norm_bwd, store_layer_norm


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
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes BLOCK_M whole rows.
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)

    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + rows[:, None] * stride_residual_row + cols[None, :], mask=mask, other=0.0)
    z = x + load_row_vector(bias_ptr, cols, n_cols)
    if seed_lo is not None:
        dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
        z *= dropout_factor(dropout, rows[:, None], cols[None, :])
    z += residual.to(tl.float32)

    store_layer_norm(z, weight_ptr, ln_bias_ptr, out_ptr, mean_ptr, rstd_ptr, rows, cols, row_mask, mask, n_cols, eps)


def add_layer_norm_fwd(
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm(dropout(x + bias) + residual) * weight + ln_bias.

    Args:
        x, residual: (T, H), of one dtype.
        bias, weight, ln_bias: (H,), in x's dtype.
        eps: added to the variance.
        dropout_p, seed: element (row, col) survives where hash32(seed, row, col) >= floor(dropout_p * 2^32).

    Returns:
        out (T, H) in x's dtype; mean (T,) and rstd (T,) float32 of the rows before LayerNorm.

    Raises:
        ValueError: H above 16384, or dropout_p outside [0, 1).
    """
    x, residual = rows_contiguous(x), rows_contiguous(residual)
    bias, weight, ln_bias = bias.contiguous(), weight.contiguous(), ln_bias.contiguous()
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block_m, block_n, num_warps = row_tiles(n_cols)
    numbers = (n_rows, n_cols, x.stride(0), residual.stride(0), eps, *dropout_arguments(dropout_p, seed))
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **COMPILER_OPTIONS}
    if n_rows == 0:
        return out, mean, rstd
    grid = (triton.cdiv(n_rows, block_m),)
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[grid](x, bias, residual, weight, ln_bias, out, mean, rstd, *numbers, **tiles)
    return out, mean, rstd


class _ResidualSum(NamedTuple):
    """What the backward needs to compute dropout(x + bias) + residual again."""

    residual_ptr: Any  # (T, H), rows `stride_residual_row` elements apart
    stride_residual_row: Any
    dresidual_ptr: Any  # (T, H), contiguous, written with dropout only; the means kernel has None
    dropout: Any  # Dropout


@triton.jit
def _sum_before_norm(u, own, rows, cols, mask):
    """The rows before LayerNorm, from u = x + bias, and what dropout multiplied u by."""
    residual_at = own.residual_ptr + rows[:, None] * own.stride_residual_row + cols[None, :]
    residual = tl.load(residual_at, mask=mask, other=0.0)
    factor = 1.0
    if own.dropout.seed_lo is not None:
        factor = dropout_factor(own.dropout, rows[:, None], cols[None, :])
        u *= factor
    return u + residual.to(tl.float32), factor


@triton.jit
def _sum_gradient(dz, factor, own, at, mask):
    """The gradient of x; that of the residual is dz, which is stored if dropout makes the two differ."""
    if own.dropout.seed_lo is not None:
        tl.store(own.dresidual_ptr + at, round_to(dz, own.dresidual_ptr.dtype.element_ty), mask=mask)
    # Multiplied as in the forward, instead of selected.
    return dz * factor


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi", "dropout_threshold"])
def _add_layer_norm_bwd_means_kernel(
    inputs,  # NormInputs
    means_ptr,  # (2, T) float32, see `layer_norm_bwd_means`
    n_rows,  # T
    n_cols,  # H
    residual_ptr,  # (T, H), rows `stride_residual_row` elements apart
    stride_residual_row,
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
    own = _ResidualSum(residual_ptr, stride_residual_row, None, dropout)
    layer_norm_bwd_means(inputs, own, means_ptr, n_rows, n_cols, _sum_before_norm, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi", "dropout_threshold"])
def _add_layer_norm_bwd_kernel(
    inputs,  # NormInputs
    means_ptr,  # (2, T) float32, read if rows are split
    dx_ptr,  # (T, H), contiguous
    dresidual_ptr,  # (T, H), contiguous; without dropout it equals dx and is not written
    partials_ptr,  # (P, 3, H) float32: each group's part of the gradients of bias, weight and ln_bias
    n_rows,  # T
    n_cols,  # H
    residual_ptr,  # (T, H), rows `stride_residual_row` elements apart
    stride_residual_row,
    seed_lo,  # this and the next three: the fields of Dropout
    seed_hi,
    dropout_threshold,
    dropout_scale,
    WHOLE_ROWS: tl.constexpr,  # BLOCK_N >= H
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    dropout = Dropout(seed_lo, seed_hi, dropout_threshold, dropout_scale)
    own = _ResidualSum(residual_ptr, stride_residual_row, dresidual_ptr, dropout)
    layer_norm_bwd(
        inputs,
        own,
        means_ptr,
        dx_ptr,
        partials_ptr,
        n_rows,
        n_cols,
        _sum_before_norm,
        _sum_gradient,
        WHOLE_ROWS,
        BLOCK_M,
        BLOCK_N,
        STAGES,
    )


def add_layer_norm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Gradients of LayerNorm(dropout(x + bias) + residual) * weight + ln_bias (Ba et al. 2016, equation 3, differentiated).

    Args:
        grad, x, residual: (T, H), of one dtype.
        bias, weight: (H,), in x's dtype.
        mean, rstd: (T,) float32, of the forward.
        dropout_p, seed: of the forward.

    Returns:
        dx (T, H); dresidual (T, H), or (0, H) without dropout, where it equals dx; dbias, dweight, dln_bias (H,). All are in
        x's dtype. Sums are float32 and taken in the same order everywhere.

    Raises:
        ValueError: dropout_p outside [0, 1).
    """
    grad, x, residual = map(rows_contiguous, (grad, x, residual))
    n_rows, n_cols = x.shape
    own = (residual, residual.stride(0), *dropout_arguments(dropout_p, seed))
    dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    dresidual = torch.empty((n_rows if dropout_p else 0, n_cols), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, dresidual, *(torch.zeros_like(bias) for _ in range(3))
    inputs = NormInputs(grad, x, bias.contiguous(), weight.contiguous(), mean, rstd, grad.stride(0), x.stride(0))
    kernels = (_add_layer_norm_bwd_means_kernel, _add_layer_norm_bwd_kernel)
    return dx, dresidual, *start_layer_norm_bwd(*kernels, inputs, (dx, dresidual), own)
