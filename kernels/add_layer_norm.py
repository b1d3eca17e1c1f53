"""add_layer_norm: LayerNorm(dropout(x + bias) + residual), one pass over memory.

Moves 3 T H elements and 8 T bytes of statistics. A program holds BLOCK_M whole rows in registers, several where rows
are short, so that a thread always has enough loads in flight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import (
    COMPILER_OPTIONS,
    dropout_arguments,
    dropout_keep,
    layer_norm_rows,
    load_row_vector,
    program_rows,
    round_to,
    row_tiles,
    rows_contiguous,
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

    normalised, mean, rstd = layer_norm_rows(z, mask, n_cols, eps)
    out = normalised * load_row_vector(weight_ptr, cols, n_cols) + load_row_vector(ln_bias_ptr, cols, n_cols)
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


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
