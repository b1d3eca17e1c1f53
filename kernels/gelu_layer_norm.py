"""gelu_layer_norm: LayerNorm(act(x + bias)), the middle of the MLM head, one pass over memory, and its gradient, one too.

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
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)

    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    # act(0) = 0, so what lies outside the mask adds nothing to the sums.
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
        out (T, E) in x's dtype; mean (T,) and rstd (T,) float32 of the normalised rows.

    Raises:
        ValueError: E above 16384.
    """
    x = rows_contiguous(x)
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block_m, block_n, num_warps = row_tiles(n_cols)
    if n_rows == 0:
        return out, mean, rstd
    with torch.cuda.device_of(x):
        _gelu_layer_norm_fwd_kernel[(triton.cdiv(n_rows, block_m),)](
            x, bias.contiguous(), weight.contiguous(), ln_bias.contiguous(), out, mean, rstd, n_rows, n_cols, x.stride(0),
            eps, ACT=ACT_CODES[act], BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out, mean, rstd


@triton.jit
def _load_gradient(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr,  # as in the kernels below
    bias, weight,  # (1, BLOCK_N) float32
    n_rows, n_cols, stride_grad_row, stride_x_row, tile, cols, ACT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows: rows, mask, and in float32 grad, g = grad * weight, u = x + bias, z_hat, rstd."""
    rows, row_mask = group_rows(tile, n_rows, BLOCK_M)
    mask = row_mask[:, None] & (cols < n_cols)[None, :]
    grad = tl.load(grad_ptr + rows[:, None] * stride_grad_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)

    u = x + bias
    g, z_hat, rstd = normalise_again(activate(u, ACT), grad, weight, mean_ptr, rstd_ptr, rows, row_mask, mask)
    return rows, mask, grad, g, u, z_hat, rstd


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_layer_norm_bwd_means_kernel(
    grad_ptr,  # (T, E), rows `stride_grad_row` elements apart
    x_ptr,  # (T, E), rows `stride_x_row` elements apart
    bias_ptr,  # (E,)
    weight_ptr,  # (E,)
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    means_ptr,  # (2, T) float32: of g and of g z_hat, see `layer_norm_grad`
    n_rows,  # T
    n_cols,  # E
    stride_grad_row,
    stride_x_row,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    g_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    gz_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_col in range(0, n_cols, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        bias = load_row_vector(bias_ptr, cols, n_cols)
        weight = load_row_vector(weight_ptr, cols, n_cols)
        _, _, _, g, _, z_hat, _ = _load_gradient(
            grad_ptr, x_ptr, mean_ptr, rstd_ptr, bias, weight, n_rows, n_cols, stride_grad_row, stride_x_row,
            tl.program_id(0), cols, ACT, BLOCK_M,
        )  # fmt: skip
        g_sum += g
        gz_sum += g * z_hat
    rows, row_mask = group_rows(tl.program_id(0), n_rows, BLOCK_M)
    store_row_means(g_sum, gz_sum, means_ptr, rows, row_mask, n_rows, n_cols)


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_layer_norm_bwd_kernel(
    grad_ptr,  # (T, E), rows `stride_grad_row` elements apart
    x_ptr,  # (T, E), rows `stride_x_row` elements apart
    bias_ptr,  # (E,)
    weight_ptr,  # (E,)
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    means_ptr,  # (2, T) float32, where rows are split
    dx_ptr,  # (T, E), contiguous
    partials_ptr,  # (P, 3, E) float32: each group's part of the gradients of bias, weight, ln_bias
    n_rows,  # T
    n_cols,  # E
    stride_grad_row,
    stride_x_row,
    ACT: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,  # BLOCK_N >= E
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
        rows, mask, grad, g, u, z_hat, rstd = _load_gradient(
            grad_ptr, x_ptr, mean_ptr, rstd_ptr, bias, weight, n_rows, n_cols, stride_grad_row, stride_x_row,
            tile, cols, ACT, BLOCK_M,
        )  # fmt: skip
        dz = layer_norm_grad(g, z_hat, rstd, means_ptr, rows, n_rows, n_cols, WHOLE_ROWS)
        dx = activation_grad(dz, u, ACT)
        # An infinite bias makes NaN of the zeros beyond the last row.
        dbias += tl.where(mask, dx, 0.0)
        dweight += grad * z_hat
        dln_bias += grad

        at = rows[:, None] * n_cols + cols[None, :]
        tl.store(dx_ptr + at, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
    store_column_sums(partials_ptr, dbias, 0, cols, n_cols, 3)
    store_column_sums(partials_ptr, dweight, 1, cols, n_cols, 3)
    store_column_sums(partials_ptr, dln_bias, 2, cols, n_cols, 3)


def gelu_layer_norm_bwd(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor, act: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of LayerNorm(act(x + bias)) * weight + ln_bias.

    Args:
        grad, x: (T, E), of one dtype.
        bias, weight: (E,), in x's dtype.
        mean, rstd: (T,) float32, of the forward.
        act: "gelu_tanh", "gelu_erf" or "relu".

    Returns:
        dx (T, E); dbias, dweight, dln_bias (E,): all in x's dtype, sums in float32 and in one order everywhere.
    """
    grad, x = rows_contiguous(grad), rows_contiguous(x)
    n_rows, n_cols = x.shape
    dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, *(torch.zeros_like(bias) for _ in range(3))
    operands = (grad, x, bias.contiguous(), weight.contiguous(), mean, rstd)
    numbers = (n_rows, n_cols, grad.stride(0), x.stride(0), ACT_CODES[act])
    sums = start_layer_norm_bwd(
        _gelu_layer_norm_bwd_means_kernel, _gelu_layer_norm_bwd_kernel, operands, (dx,), numbers
    )
    return dx, *sums
