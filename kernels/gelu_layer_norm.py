"""gelu_layer_norm: LayerNorm(act(x + bias)), the middle of the MLM head, in one pass over memory; its gradient in one, too.

The forward moves 2 T E elements and 8 T bytes of statistics. Rows are short (E = 128), so a program holds many.

The backward moves 3 T E elements, 8 T bytes of statistics, and 24 P E bytes for the sums of the three vectors' gradients,
P <= 512: at 32,768 x 128 in bfloat16 25 MB, 0.3 MB and 1.6 MB. Rows above 4096 are read twice, 5 T E elements: first for the
two means of a row, then in blocks of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import (
    ACT_CODES,
    COMPILER_OPTIONS,
    activate,
    activation_grad,
    load_row_vector,
    program_rows,
    row_tiles,
    rows_contiguous,
)
from ._layer_norm import NormInputs, layer_norm_bwd, layer_norm_bwd_means, start_layer_norm_bwd, store_layer_norm


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_layer_norm_fwd_kernel(
    x_ptr,  # (T, E), rows `stride_x_row` elements apart
    bias_ptr,  # (E,)
    weight_ptr,  # (E,)
    ln_bias_ptr,  # (E,)
    out_ptr,  # (T, E), contiguous
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    n_rows,  # T
    n_cols,  # E
    stride_x_row,
    eps,
    ACT: tl.constexpr,  # a value of ACT_CODES
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes BLOCK_M whole rows.
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)

    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    # act(0) = 0, so elements outside the mask add nothing to the sums.
    z = activate(x + load_row_vector(bias_ptr, cols, n_cols), ACT)

    store_layer_norm(z, weight_ptr, ln_bias_ptr, out_ptr, mean_ptr, rstd_ptr, rows, cols, row_mask, mask, n_cols, eps)


def gelu_layer_norm_fwd(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, ln_bias: torch.Tensor, eps: float, act: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm(act(x + bias)) * weight + ln_bias.

    Args:
        x: (T, E).
        bias, weight, ln_bias: (E,), in x's dtype.
        eps: added to the variance.
        act: "gelu_tanh", "gelu_erf" or "relu".

    Returns:
        out (T, E) in x's dtype; mean (T,) and rstd (T,) float32 of the rows before LayerNorm.

    Raises:
        ValueError: E above 16384.
    """
    x = rows_contiguous(x)
    bias, weight, ln_bias = bias.contiguous(), weight.contiguous(), ln_bias.contiguous()
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block_m, block_n, num_warps = row_tiles(n_cols)
    numbers = (n_rows, n_cols, x.stride(0), eps)
    tiles = {"ACT": ACT_CODES[act], "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **COMPILER_OPTIONS}
    if n_rows == 0:
        return out, mean, rstd
    grid = (triton.cdiv(n_rows, block_m),)
    with torch.cuda.device_of(x):
        _gelu_layer_norm_fwd_kernel[grid](x, bias, weight, ln_bias, out, mean, rstd, *numbers, **tiles)
    return out, mean, rstd


@triton.jit
def _activated_before_norm(u, ACT: tl.constexpr, rows, cols, mask):
    """The rows before LayerNorm, and u = x + bias."""
    return activate(u, ACT), u


@triton.jit
def _activated_gradient(dz, u, ACT: tl.constexpr, at, mask):
    """The gradient of x, 0 outside the mask: an infinite bias would make NaN of the zeros behind the last row."""
    return tl.where(mask, activation_grad(dz, u, ACT), 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_layer_norm_bwd_means_kernel(
    inputs,  # NormInputs
    means_ptr,  # (2, T) float32, see `layer_norm_bwd_means`
    n_rows,  # T
    n_cols,  # E
    ACT: tl.constexpr,  # a value of ACT_CODES
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    layer_norm_bwd_means(inputs, ACT, means_ptr, n_rows, n_cols, _activated_before_norm, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_layer_norm_bwd_kernel(
    inputs,  # NormInputs
    means_ptr,  # (2, T) float32, read if rows are split
    dx_ptr,  # (T, E), contiguous
    partials_ptr,  # (P, 3, E) float32: each group's part of the gradients of bias, weight and ln_bias
    n_rows,  # T
    n_cols,  # E
    ACT: tl.constexpr,  # a value of ACT_CODES
    WHOLE_ROWS: tl.constexpr,  # BLOCK_N >= E
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    layer_norm_bwd(
        inputs,
        ACT,
        means_ptr,
        dx_ptr,
        partials_ptr,
        n_rows,
        n_cols,
        _activated_before_norm,
        _activated_gradient,
        WHOLE_ROWS,
        BLOCK_M,
        BLOCK_N,
        STAGES,
    )


def gelu_layer_norm_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    act: str,
) -> tuple[torch.Tensor, ...]:
    """Gradients of LayerNorm(act(x + bias)) * weight + ln_bias.

    Args:
        grad, x: (T, E), of one dtype.
        bias, weight: (E,), in x's dtype.
        mean, rstd: (T,) float32, of the forward.
        act: "gelu_tanh", "gelu_erf" or "relu".

    Returns:
        dx (T, E); dbias, dweight, dln_bias (E,). All are in x's dtype. Sums are float32 and taken in the same order everywhere.
    """
    grad, x = rows_contiguous(grad), rows_contiguous(x)
    n_rows, n_cols = x.shape
    dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, *(torch.zeros_like(bias) for _ in range(3))
    inputs = NormInputs(grad, x, bias.contiguous(), weight.contiguous(), mean, rstd, grad.stride(0), x.stride(0))
    kernels = (_gelu_layer_norm_bwd_means_kernel, _gelu_layer_norm_bwd_kernel)
    return dx, *start_layer_norm_bwd(*kernels, inputs, (dx,), (ACT_CODES[act],))
