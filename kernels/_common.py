"""What several kernels share: activations, replayable dropout, the rows of a program, LayerNorm of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Numbers of the activations, the same in C++.
ACT_CODES = {"gelu_tanh": 0, "gelu_erf": 1, "relu": 2}
MAX_ROW = 16384
# Products and sums become one FMA; said aloud because the default differs between versions of Triton.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def row_tiles(n_cols: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for kernels whose programs hold whole rows of `n_cols` elements in registers.

    16 elements a thread, up to 32 for wide rows: two 16-byte loads in flight per operand, and float32 copies of the
    operands fit the registers under every compiler that is checked (32 everywhere spilt in float32 for sm_80).

    Raises:
        ValueError: a row wider than MAX_ROW does not fit one program.
    """
    if n_cols > MAX_ROW:
        raise ValueError(f"rows of {n_cols} elements: the Triton kernels take up to {MAX_ROW}; use backend='reference'")
    block_n = max(128, triton.next_power_of_2(n_cols))
    block_m = max(1, 2048 // block_n)
    return block_m, block_n, min(16, max(4, block_m * block_n // 1024))


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` (T, N) with adjacent columns; a view with strided rows passes as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dropout_arguments(p: float, seed: int) -> tuple[int, int, int, float]:
    """(seed_lo, seed_hi, threshold, scale): the words as signed 32-bit numbers, so that their type never varies.

    Raises:
        ValueError: a probability outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    words = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, int(p * 2**32))
    low, high, threshold = (word - 2**32 if word >= 2**31 else word for word in words)
    return low, high, threshold, 1.0 / (1.0 - p)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 `x` rounded to the nearest value of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter would cut the lower bits off.
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation numbered ACT of float32 `x`; NaN stays NaN."""
    tl.static_assert(ACT == 0 or ACT == 1 or ACT == 2)
    if ACT == 0:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), which does not cancel for negative u; 2 sqrt(2 / pi) = 1.59576912.
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == 1:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        result = tl.where(x < 0.0, 0.0, x)
    return result


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_keep(seed_lo, seed_hi, threshold, rows, cols):
    """Whether elements (rows, cols), broadcast together, survive: hash32(seed, row, col) >= threshold.

    `rows` and `cols` may be of any integer type and count modulo 2^32; `seed_lo`, `seed_hi`, `threshold` are the int32
    of `dropout_arguments`.
    """
    x = _mix(seed_lo.to(tl.uint32, bitcast=True) ^ (rows.to(tl.uint32) * 0x9E3779B1))
    x = _mix(x ^ (seed_hi.to(tl.uint32, bitcast=True) ^ (cols.to(tl.uint32) * 0x85EBCA77)))
    return x >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def program_rows(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a program that holds whole rows: rows (BLOCK_M,) int64, cols (BLOCK_N,), row_mask, mask (BLOCK_M, BLOCK_N)."""
    # 64 bits: a row's number times its stride passes 2^31 elements in long batches of wide rows.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    return rows, cols, row_mask, row_mask[:, None] & (cols < n_cols)[None, :]


@triton.jit
def load_row_vector(ptr, cols, n_cols):
    """A vector (n_cols,) as float32 (1, BLOCK_N), zeros beyond its end."""
    return tl.load(ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def layer_norm_rows(z, mask, n_cols, eps):
    """(normalised z (BLOCK_M, BLOCK_N), mean (BLOCK_M,), rstd (BLOCK_M,)) of float32 rows; `z` is 0 outside `mask`."""
    mean = tl.sum(z, axis=1) / n_cols
    # The second pass runs over registers, so the variance need not be taken from cancelling sums of squares.
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    return centred * rstd[:, None], mean, rstd
