"""LayerNorm of rows inside Triton kernels, and the backward that add_layer_norm and gelu_layer_norm share.

The two operators differ in one step: how they compute a row before its LayerNorm. For its backward an operator gives two
Triton functions: `BEFORE_NORM` recomputes such rows, `INPUT_GRADIENT` turns the gradient of these rows into that of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    BWD_OPTIONS,
    bwd_row_tiles,
    bwd_stages,
    column_sums,
    group_rows,
    load_row_vector,
    round_to,
    row_groups,
    store_column_sums,
)


@triton.jit
def moments_overflow(mean, n_cols):
    """0, or NaN where torch's layer_norm gives NaN on a CPU: if the square of the mean overflows, in rows of whole vectors."""
    return tl.where(n_cols % 16 == 0, 0.0 * (mean * mean), 0.0)


@triton.jit
def layer_norm_rows(z, mask, n_cols, eps):
    """(normalised z (BLOCK_M, BLOCK_N), mean (BLOCK_M,), rstd (BLOCK_M,)) of float32 rows; `z` is 0 outside `mask`."""
    mean = tl.sum(z, axis=1) / n_cols
    # The second pass runs over registers, so the variance need not come from sums of squares, which cancel.
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + moments_overflow(mean, n_cols) + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def store_layer_norm(
    z,  # (BLOCK_M, BLOCK_N) float32, 0 outside `mask`
    weight_ptr,  # (N,)
    ln_bias_ptr,  # (N,)
    out_ptr,  # (T, N), contiguous
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    rows,  # this and the next three: as `program_rows` returns them
    cols,
    row_mask,
    mask,
    n_cols,  # N
    eps,
):
    """Store LayerNorm of whole rows, their means and their reciprocal standard deviations."""
    normalised, mean, rstd = layer_norm_rows(z, mask, n_cols, eps)
    out = normalised * load_row_vector(weight_ptr, cols, n_cols) + load_row_vector(ln_bias_ptr, cols, n_cols)
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


class NormInputs(NamedTuple):
    """What the backward kernels of both operators read; one argument of a kernel."""

    grad_ptr: Any  # (T, N), gradient of the output, rows `stride_grad_row` elements apart
    x_ptr: Any  # (T, N), rows `stride_x_row` elements apart
    bias_ptr: Any  # (N,), added to x
    weight_ptr: Any  # (N,), of LayerNorm
    mean_ptr: Any  # (T,) float32, of the forward
    rstd_ptr: Any  # (T,) float32, of the forward
    stride_grad_row: Any
    stride_x_row: Any


@triton.jit
def _load_and_normalise(
    inputs,  # NormInputs
    own,  # what BEFORE_NORM needs
    bias,  # (1, BLOCK_N) float32
    weight,  # (1, BLOCK_N) float32
    rows,  # (BLOCK_M,) int64
    row_mask,  # (BLOCK_M,)
    cols,  # (BLOCK_N,)
    n_cols,  # N
    BEFORE_NORM: tl.constexpr,
):
    """One tile of rows again: mask, then float32 grad, g = grad * weight, z_hat, rstd (BLOCK_M,), and what BEFORE_NORM saved.

    z_hat are the normalised rows; g and z_hat are 0 outside the mask.
    """
    mask = row_mask[:, None] & (cols < n_cols)[None, :]
    grad_at = inputs.grad_ptr + rows[:, None] * inputs.stride_grad_row + cols[None, :]
    grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
    x_at = inputs.x_ptr + rows[:, None] * inputs.stride_x_row + cols[None, :]
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    z, saved = BEFORE_NORM(x + bias, own, rows, cols, mask)

    mean = tl.load(inputs.mean_ptr + rows, mask=row_mask, other=0.0)
    rstd = tl.load(inputs.rstd_ptr + rows, mask=row_mask, other=0.0)
    # Set to 0, so that NaN or infinity in the vectors cannot reach a sum from outside the mask.
    g = tl.where(mask, grad * weight, 0.0)
    z_hat = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
    return mask, grad, g, z_hat, rstd, saved


@triton.jit
def layer_norm_bwd_means(
    inputs,  # NormInputs
    own,  # what BEFORE_NORM needs
    means_ptr,  # (2, T) float32, written: the means of g and of g * z_hat of each row
    n_rows,  # T
    n_cols,  # N
    BEFORE_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The two means that LayerNorm's gradient subtracts; a program takes BLOCK_M rows, BLOCK_N columns at a time."""
    rows, row_mask = group_rows(tl.program_id(0), n_rows, BLOCK_M)
    g_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    gz_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_col in range(0, n_cols, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        bias = load_row_vector(inputs.bias_ptr, cols, n_cols)
        weight = load_row_vector(inputs.weight_ptr, cols, n_cols)
        _, _, g, z_hat, _, _ = _load_and_normalise(inputs, own, bias, weight, rows, row_mask, cols, n_cols, BEFORE_NORM)
        g_sum += g
        gz_sum += g * z_hat
    tl.store(means_ptr + rows, tl.sum(g_sum, axis=1) / n_cols, mask=row_mask)
    tl.store(means_ptr + n_rows + rows, tl.sum(gz_sum, axis=1) / n_cols, mask=row_mask)


@triton.jit
def layer_norm_bwd(
    inputs,  # NormInputs
    own,  # what BEFORE_NORM and INPUT_GRADIENT need
    means_ptr,  # (2, T) float32, as `layer_norm_bwd_means` writes them; not read if WHOLE_ROWS
    dx_ptr,  # (T, N), contiguous, written
    partials_ptr,  # (P, 3, N) float32, written: this group's part of the gradients of bias, weight and ln_bias
    n_rows,  # T
    n_cols,  # N
    BEFORE_NORM: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,  # BLOCK_N >= N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    """The gradient of x, and the sums of the vectors' gradients; a program takes a block of columns of every P-th tile of rows."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = load_row_vector(inputs.bias_ptr, cols, n_cols)
    weight = load_row_vector(inputs.weight_ptr, cols, n_cols)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    dln_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(1), n_tiles, tl.num_programs(1), num_stages=STAGES):
        rows, row_mask = group_rows(tile, n_rows, BLOCK_M)
        mask, grad, g, z_hat, rstd, saved = _load_and_normalise(
            inputs, own, bias, weight, rows, row_mask, cols, n_cols, BEFORE_NORM
        )
        if WHOLE_ROWS:
            g_mean = tl.sum(g, axis=1) / n_cols
            gz_mean = tl.sum(g * z_hat, axis=1) / n_cols
        else:
            g_mean = tl.load(means_ptr + rows, mask=row_mask, other=0.0)
            gz_mean = tl.load(means_ptr + n_rows + rows, mask=row_mask, other=0.0)
        # Ba et al. 2016, equation 3, differentiated.
        dz = (g - g_mean[:, None] - z_hat * gz_mean[:, None]) * rstd[:, None]
        at = rows[:, None] * n_cols + cols[None, :]
        dx = INPUT_GRADIENT(dz, saved, own, at, mask)
        dbias += dx
        dweight += grad * z_hat
        dln_bias += grad
        tl.store(dx_ptr + at, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
    store_column_sums(partials_ptr, dbias, 0, cols, n_cols, 3)
    store_column_sums(partials_ptr, dweight, 1, cols, n_cols, 3)
    store_column_sums(partials_ptr, dln_bias, 2, cols, n_cols, 3)


def start_layer_norm_bwd(
    means_kernel: triton.JITFunction,
    kernel: triton.JITFunction,
    inputs: NormInputs,
    outputs: tuple[torch.Tensor, ...],
    own: tuple[torch.Tensor | float | None, ...],
) -> list[torch.Tensor]:
    """Start the kernels of an operator's backward and add up the gradients of its three vectors.

    Args:
        means_kernel: kernel of (inputs, means (2, T) float32, T, N, *own), started only if rows are split into blocks.
        kernel: kernel of (inputs, means, *outputs, partials (P, 3, N) float32, T, N, *own).
        inputs: tensors and strides.
        outputs: (T, N) each, written.
        own: the operator's own arguments.

    Returns:
        The gradients of bias, weight and ln_bias, each (N,) in the gradient's dtype.
    """
    grad = inputs.grad_ptr
    n_rows, n_cols = grad.shape
    block_m, block_n, num_warps = bwd_row_tiles(n_cols)
    col_blocks = triton.cdiv(n_cols, block_n)
    groups = row_groups(n_rows, block_m, col_blocks)
    partials = torch.empty((groups, 3, n_cols), dtype=torch.float32, device=grad.device)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **BWD_OPTIONS}
    walk = {"WHOLE_ROWS": col_blocks == 1, "STAGES": bwd_stages(grad)}
    means = partials  # a placeholder; the kernel does not read it if rows are whole
    with torch.cuda.device_of(grad):
        if col_blocks > 1:
            means = torch.empty((2, n_rows), dtype=torch.float32, device=grad.device)
            means_kernel[(triton.cdiv(n_rows, block_m),)](inputs, means, n_rows, n_cols, *own, **tiles)
        kernel[(col_blocks, groups)](inputs, means, *outputs, partials, n_rows, n_cols, *own, **walk, **tiles)
    return column_sums(partials, grad.dtype)
