"""Rounds rows of activations to 8 bits for a product, in a kernel of its own or in the kernel that computes them.

A row y = x * rescale + shift becomes step * (q - zero): int8 q, with 255 steps between the row's least and largest element, or
float8 e4m3 q whose largest is 448, without a zero point. Every row has one float32 step and one int32 zero. A row with a NaN or
an infinity has NaN as its step, so that none of its values can pass for a number.

Bytes moved for T rows: `round_rows` 3 T K, `add_layer_norm_rounded` 7 T H (it reads two operands in bfloat16 and writes the sum
in bfloat16 and rounded), `bias_gelu_rounded` 3 T I, and 8 T each. Values are rounded from float32 registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._common import (
    ACT_CODES,
    COMPILER_OPTIONS,
    INTERPRETED,
    activate,
    load_row_vector,
    program_rows,
    round_to,
    row_tiles,
    rows_contiguous,
)
from ._layer_norm import layer_norm_rows
from .bias_gelu import bias_gelu_fwd

# A program that computes an activation and rounds spills with wider rows; these take two kernels, and 4 T I more bytes.
FUSED_ROW = 8192


@dataclass(frozen=True)
class Rounded:
    """Rounded rows: values (T, D) int8 or float8 e4m3, where D is K padded; steps (T,) float32; zeros (T,) int32, for int8 only."""

    values: torch.Tensor
    steps: torch.Tensor
    zeros: torch.Tensor | None

    @classmethod
    def empty(cls, n_rows: int, depth: int, dtype: torch.dtype, device: torch.device) -> Rounded:
        return cls(
            torch.empty((n_rows, depth), dtype=dtype, device=device),
            torch.empty(n_rows, dtype=torch.float32, device=device),
            torch.empty(n_rows, dtype=torch.int32, device=device) if dtype == torch.int8 else None,
        )

    def take(self, rows: torch.Tensor) -> Rounded:
        """The rows with these indices (Tq,)."""
        # Gathered as bytes: on some devices torch cannot gather float8 numbers.
        values = self.values.view(torch.int8).index_select(0, rows).view(self.values.dtype)
        zeros = None if self.zeros is None else self.zeros.index_select(0, rows)
        return Rounded(values, self.steps.index_select(0, rows), zeros)


@triton.jit
def _to_integer(x):
    """float32 |x| < 2^22 rounded to the nearest integer, ties to even."""
    # Adding 1.5 x 2^23 leaves no bit for a fraction.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_float8(x):
    """float32 |x| <= 448 (up to its own rounding) rounded to the nearest float8 e4m3, ties to even."""
    if INTERPRETED:
        # The interpreter truncates: so keep 3 bits of the mantissa, and multiples of 2^-9 among denormals.
        bits = x.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, _to_integer(x * 512.0) * 0.001953125, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def store_rounded(
    y,  # (BLOCK_M, BLOCK_N) float32
    rescale_ptr,  # (K,) float32
    shift_ptr,  # (K,) float32
    values_ptr,  # (T, D), contiguous, int8 or float8 e4m3
    steps_ptr,  # (T,) float32
    zeros_ptr,  # (T,) int32, or None for float8
    rows,  # this and the next two: as `program_rows` returns them
    cols,
    row_mask,
    n_cols,  # K
    depth,  # D, between K and BLOCK_N
):
    """Round whole rows y * rescale + shift; store them, their steps and their zero points. Columns beyond K get the rounded 0."""
    # Beyond K, y, rescale and shift are 0.
    y = y * load_row_vector(rescale_ptr, cols, n_cols) + load_row_vector(shift_ptr, cols, n_cols)
    damage = tl.sum(y * 0.0, axis=1)
    # NaN and infinity have no integer.
    y = tl.where(tl.abs(y) < float("inf"), y, 0.0)
    high = tl.maximum(tl.max(y, axis=1), 0.0)
    low = tl.minimum(tl.min(y, axis=1), 0.0)
    if zeros_ptr is None:
        extent, levels = tl.maximum(high, -low), 448.0
    else:
        # Half of each: the extent of a finite row may exceed float32's largest number.
        extent, levels = high * 0.5 - low * 0.5, 127.5
    inverse = levels / tl.where(extent > 0.0, extent, 1.0)
    # 0 for rows of zeros, and of denormals whose step has no inverse.
    inverse = tl.where((extent > 0.0) & (inverse < float("inf")), inverse, 0.0)
    if zeros_ptr is None:
        values = _to_float8(y * inverse[:, None])
    else:
        zero = _to_integer(-low * inverse)
        levelled = _to_integer(y * inverse[:, None] + zero[:, None])
        # The CPU's integers run from 0 to 255, those of tensor cores from -128 to 127.
        values = (tl.minimum(tl.maximum(levelled, 0.0), 255.0) - 128.0).to(tl.int8)
        tl.store(zeros_ptr + rows, zero.to(tl.int32) - 128, mask=row_mask)
    # Beyond K the weights are 0, so any value is right there, but memory that was never written might hold NaN.
    tl.store(
        values_ptr + rows[:, None] * depth + cols[None, :], values, mask=row_mask[:, None] & (cols < depth)[None, :]
    )
    tl.store(steps_ptr + rows, tl.where(inverse > 0.0, extent / levels, 0.0) + damage, mask=row_mask)


@triton.jit(do_not_specialize=["n_rows"])
def _round_rows_kernel(
    x_ptr,  # (T, K), rows `stride_x_row` elements apart
    rescale_ptr,  # (K,) float32
    shift_ptr,  # (K,) float32
    values_ptr,  # (T, D), contiguous, int8 or float8 e4m3
    steps_ptr,  # (T,) float32
    zeros_ptr,  # (T,) int32, or None for float8
    n_rows,  # T
    n_cols,  # K
    depth,  # D
    stride_x_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes BLOCK_M whole rows.
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    store_rounded(x, rescale_ptr, shift_ptr, values_ptr, steps_ptr, zeros_ptr, rows, cols, row_mask, n_cols, depth)


def round_rows(x: torch.Tensor, rescale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype, depth: int) -> Rounded:
    """x * rescale + shift, rounded.

    Args:
        x: (T, K).
        rescale, shift: (K,) float32.
        dtype: torch.int8 or torch.float8_e4m3fn.
        depth: D, K padded to at most the next multiple of 128.

    Raises:
        ValueError: K above 16384.
    """
    x = rows_contiguous(x)
    n_rows, n_cols = x.shape
    block_m, block_n, num_warps = row_tiles(n_cols)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **COMPILER_OPTIONS}
    out = Rounded.empty(n_rows, depth, dtype, x.device)
    outputs = (out.values, out.steps, out.zeros)
    grid = (triton.cdiv(n_rows, block_m),)
    if n_rows:
        with torch.cuda.device_of(x):
            _round_rows_kernel[grid](x, rescale, shift, *outputs, n_rows, n_cols, depth, x.stride(0), **tiles)
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _add_layer_norm_rounded_kernel(
    x_ptr,  # (T, H), contiguous
    bias_ptr,  # (H,) float32
    residual_ptr,  # (T, H), rows `stride_residual_row` elements apart
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,)
    out_ptr,  # (T, H), contiguous
    rescale_ptr,  # (H,) float32; None: nothing is rounded, and the next four are None, too
    shift_ptr,  # (H,) float32
    values_ptr,  # (T, D), contiguous, int8 or float8 e4m3
    steps_ptr,  # (T,) float32
    zeros_ptr,  # (T,) int32, or None for float8
    n_rows,  # T
    n_cols,  # H
    depth,  # D
    stride_residual_row,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes BLOCK_M whole rows.
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + rows[:, None] * stride_residual_row + cols[None, :], mask=mask, other=0.0)
    z = tl.where(mask, x + load_row_vector(bias_ptr, cols, n_cols) + residual.to(tl.float32), 0.0)
    normalised, _, _ = layer_norm_rows(z, mask, n_cols, eps)
    out = normalised * load_row_vector(weight_ptr, cols, n_cols) + load_row_vector(ln_bias_ptr, cols, n_cols)
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)
    if rescale_ptr is not None:
        store_rounded(
            out, rescale_ptr, shift_ptr, values_ptr, steps_ptr, zeros_ptr, rows, cols, row_mask, n_cols, depth
        )


def add_layer_norm_rounded(
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    rescale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtype: torch.dtype,
    depth: int,
) -> tuple[torch.Tensor, Rounded | None]:
    """out = LayerNorm(x + bias + residual) * weight + ln_bias, (T, H) in x's dtype, and out * rescale + shift, rounded.

    Args:
        x: (T, H), contiguous.
        bias: (H,) float32.
        residual: (T, H), in x's dtype.
        weight, ln_bias: (H,).
        eps: added to the variance.
        rescale, shift: (H,) float32; None: nothing is rounded.
        dtype, depth: as for `round_rows`.

    Raises:
        ValueError: H above 16384.
    """
    residual = rows_contiguous(residual)
    n_rows, n_cols = x.shape
    block_m, block_n, num_warps = row_tiles(n_cols)
    out = torch.empty_like(x)
    rounded = None if rescale is None else Rounded.empty(n_rows, depth, dtype, x.device)
    outputs = (None, None, None) if rounded is None else (rounded.values, rounded.steps, rounded.zeros)
    tensors = (x, bias, residual, weight, ln_bias, out, rescale, shift, *outputs)
    sizes = (n_rows, n_cols, depth, residual.stride(0), eps)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **COMPILER_OPTIONS}
    if n_rows:
        with torch.cuda.device_of(x):
            _add_layer_norm_rounded_kernel[(triton.cdiv(n_rows, block_m),)](*tensors, *sizes, **tiles)
    return out, rounded


@triton.jit(do_not_specialize=["n_rows"])
def _bias_gelu_rounded_kernel(
    x_ptr,  # (T, I), contiguous
    bias_ptr,  # (I,) float32
    rescale_ptr,  # (I,) float32
    shift_ptr,  # (I,) float32
    values_ptr,  # (T, D), contiguous, int8 or float8 e4m3
    steps_ptr,  # (T,) float32
    zeros_ptr,  # (T,) int32, or None for float8
    n_rows,  # T
    n_cols,  # I
    depth,  # D
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program takes BLOCK_M whole rows.
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = activate(x + load_row_vector(bias_ptr, cols, n_cols), ACT)
    store_rounded(y, rescale_ptr, shift_ptr, values_ptr, steps_ptr, zeros_ptr, rows, cols, row_mask, n_cols, depth)


def bias_gelu_rounded(
    x: torch.Tensor,
    bias: torch.Tensor,
    act: str,
    rescale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype,
    depth: int,
) -> Rounded:
    """act(x + bias) * rescale + shift, rounded.

    Args:
        x: (T, I), contiguous.
        bias, rescale, shift: (I,) float32.
        act: "gelu_tanh", "gelu_erf" or "relu".
        dtype, depth: as for `round_rows`.

    Raises:
        ValueError: I above 16384.
    """
    n_rows, n_cols = x.shape
    if n_cols > FUSED_ROW:
        return round_rows(bias_gelu_fwd(x, bias, act), rescale, shift, dtype, depth)
    block_m, block_n, num_warps = row_tiles(n_cols)
    tiles = {"ACT": ACT_CODES[act], "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **COMPILER_OPTIONS}
    out = Rounded.empty(n_rows, depth, dtype, x.device)
    outputs = (out.values, out.steps, out.zeros)
    grid = (triton.cdiv(n_rows, block_m),)
    if n_rows:
        with torch.cuda.device_of(x):
            _bias_gelu_rounded_kernel[grid](x, bias, rescale, shift, *outputs, n_rows, n_cols, depth, **tiles)
    return out
