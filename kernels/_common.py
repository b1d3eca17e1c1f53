"""Building blocks that several Triton kernels use: activations, dropout, rounding, tiles of rows, sums of columns.

Gradients of vectors are sums over rows. They are taken without atomics, in an order that depends on the shape alone: a
backward starts a fixed number of programs (`row_groups`); each program walks over its rows, keeps the sums of its columns
in registers and writes them once; `column_sums` then adds the sums of all programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Codes of the activations, the same as in C++.
ACT_CODES = {"gelu_tanh": 0, "gelu_erf": 1, "relu": 2}
MAX_ROW = 16384
# A backward keeps three float32 sums for every element of a row: wider rows would spill and are split into blocks.
MAX_WHOLE_ROW_BWD = 4096
SPLIT_BLOCK_N = 1024
# Upper bound on programs per backward launch: about four per multiprocessor, so that all run at once. It is a constant, so that
# sums are the same on every chip. At 32,768 x 768 the programs' sums add 2 % to the bytes moved, and as much again is read
# from the L2 cache.
BWD_PROGRAMS = 512
# A product and a sum become one FMA. Set explicitly, because the default differs between versions of Triton.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
# 16 warps of 128 registers fill a multiprocessor. Without a limit ptxas spills registers to fit more programs than the grid has.
BWD_OPTIONS = {**COMPILER_OPTIONS, "maxnreg": 128}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The rows of attention's dropout: head * HEAD_STRIDE + packed query. ops/_dropout.py says why; it must be the same number.
HEAD_STRIDE = tl.constexpr(0x10001)


def row_tiles(n_cols: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for kernels whose programs hold whole rows of `n_cols` elements in registers.

    A thread holds 16 elements, or 32 in rows of 4096: two 16-byte loads in flight per operand, and float32 copies of the
    operands fit the registers under every compiler that is checked (32 at other widths spilled on sm_80 or sm_90, under
    Triton 3.6 or 3.7).

    Raises:
        ValueError: the rows are wider than MAX_ROW and do not fit one program.
    """
    if n_cols > MAX_ROW:
        raise ValueError(f"rows of {n_cols} elements: the Triton kernels take up to {MAX_ROW}; use backend='reference'")
    block_n = max(128, triton.next_power_of_2(n_cols))
    block_m = max(1, 2048 // block_n)
    return block_m, block_n, max(4, block_n // (512 if block_n > 4096 else 1024))


def bwd_row_tiles(n_cols: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for backward kernels: whole rows if BLOCK_N >= n_cols, otherwise blocks of columns.

    A thread holds 8 elements: with 16, each with three sums, too few programs share a multiprocessor.
    """
    block_n = max(128, triton.next_power_of_2(n_cols)) if n_cols <= MAX_WHOLE_ROW_BWD else SPLIT_BLOCK_N
    block_m = max(1, 1024 // block_n)
    return block_m, block_n, block_m * block_n // 256


def row_groups(n_rows: int, block_m: int, col_blocks: int) -> int:
    """P, the number of programs that share the rows of one block of columns; it depends on the shape, not on the chip."""
    return min(triton.cdiv(n_rows, block_m), max(1, BWD_PROGRAMS // col_blocks))


def bwd_stages(x: torch.Tensor) -> int:
    """The number of tiles in flight during a walk over rows: all but the first are being copied into shared memory.

    The bytes are the same in every dtype: 12 KiB per program with three operands.
    """
    return 3 if x.itemsize == 2 else 2


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` (T, N) with adjacent columns; a view whose rows are strided is returned unchanged."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Dropout(NamedTuple):
    """Dropout inside a kernel. Kernels take the four numbers separately, since Triton specialises every number of a tuple."""

    seed_lo: Any  # int32, the lower half of the seed; None: nothing is dropped, and all four fields are None
    seed_hi: Any  # int32, the upper half
    threshold: Any  # int32 holding floor(p * 2^32)
    scale: Any  # 1 / (1 - p)


def dropout_arguments(p: float, seed: int) -> tuple[int, int, int, float] | tuple[None, None, None, None]:
    """(seed_lo, seed_hi, threshold, scale) as kernels take them; four times None for p = 0.

    Integers are given as signed 32-bit numbers, so that their Triton type never varies.

    Raises:
        ValueError: p is outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    if p == 0.0:
        return None, None, None, None
    words = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, int(p * 2**32))
    low, high, threshold = (word - 2**32 if word >= 2**31 else word for word in words)
    return low, high, threshold, 1.0 / (1.0 - p)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 `x` rounded to the nearest value of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates instead of rounding.
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, acc, TF32: tl.constexpr):
    """a @ b + acc with float32 sums; float32 operands are multiplied exactly, or on tensor cores if TF32."""
    if INTERPRETED:
        # The interpreter stores bfloat16 as raw bits and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
        if TF32:
            a, b = _cut_to_tf32(a), _cut_to_tf32(b)
        # numpy's float32 products depend on the library, the chip and the tile's shape. Two kernels that compute the same
        # score agree on a GPU; they agree here too if the product is rounded once, from float64.
        return (tl.dot(a.to(tl.float64), b.to(tl.float64)) + acc).to(tl.float32)
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def _cut_to_tf32(x):
    """float32 `x` as a tensor core reads it: without the lower 13 bits of the mantissa."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation with code ACT, applied to float32 `x`; NaN stays NaN."""
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
def activation_grad(grad, x, ACT: tl.constexpr):
    """float32 grad * act'(x), where act is the activation with code ACT."""
    tl.static_assert(ACT == 0 or ACT == 1 or ACT == 2)
    if ACT == 0:
        # s = sigmoid(w) and s (1 - s) are computed from exp(-|w|), which neither cancels nor overflows. Constants as in `activate`.
        w = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = tl.exp(-tl.abs(w))
        t = 1.0 / (1.0 + e)
        slope = 1.5957691216057308 + 0.21406444881780074 * x * x
        result = grad * (tl.where(w < 0.0, e * t, t) + x * (e * t * t) * slope)
    elif ACT == 1:
        # Phi(x) + x phi(x): the standard normal distribution function and its density.
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        result = grad * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    else:
        # A selection, not a product, as in torch: an infinite gradient where x <= 0 gives 0.
        result = tl.where(x <= 0.0, 0.0, grad)
    return result


@triton.jit
def _mix_bits(x):
    """One round of a 32-bit hash."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_factor(
    dropout,  # Dropout, with numbers
    rows,  # integers that broadcast with `cols`; both count modulo 2^32
    cols,
):
    """What dropout multiplies elements (rows, cols) by: `scale` where hash32(seed, row, col) >= threshold, otherwise 0.

    Callers multiply by it instead of selecting, so that a dropped NaN or infinity becomes NaN, as in torch.
    """
    x = _mix_bits(dropout.seed_lo.to(tl.uint32, bitcast=True) ^ (rows.to(tl.uint32) * 0x9E3779B1))
    x = _mix_bits(x ^ (dropout.seed_hi.to(tl.uint32, bitcast=True) ^ (cols.to(tl.uint32) * 0x85EBCA77)))
    return tl.where(x >= dropout.threshold.to(tl.uint32, bitcast=True), dropout.scale, 0.0)


@triton.jit
def program_rows(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of a program that holds whole rows: rows (BLOCK_M,) int64, cols (BLOCK_N,), row_mask, mask (BLOCK_M, BLOCK_N)."""
    # 64 bits: row number times stride passes 2^31 elements in long batches of wide rows.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    return rows, cols, row_mask, row_mask[:, None] & (cols < n_cols)[None, :]


@triton.jit
def load_row_vector(ptr, cols, n_cols):
    """A vector (n_cols,) as float32 (1, BLOCK_N), with zeros beyond its end."""
    return tl.load(ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def group_rows(tile, n_rows, BLOCK_M: tl.constexpr):
    """The rows of tile number `tile` in a walk over rows: rows (BLOCK_M,) int64, row_mask (BLOCK_M,)."""
    # 64 bits, as in `program_rows`.
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    return rows, rows < n_rows


@triton.jit
def store_column_sums(
    partials_ptr,  # (P, N_SUMS, N) float32
    sums,  # (BLOCK_M, BLOCK_N) float32, this program's
    index: tl.constexpr,  # which of the N_SUMS
    cols,  # (BLOCK_N,)
    n_cols,  # N
    N_SUMS: tl.constexpr,
):
    """Add the rows of `sums` and store the result in the row of `partials` that belongs to this group, program_id(1)."""
    at = partials_ptr + (tl.program_id(1) * N_SUMS + index) * n_cols
    tl.store(at + cols, tl.sum(sums, axis=0), mask=cols < n_cols)


@triton.jit(do_not_specialize=["n_partials"])
def _column_sums_kernel(
    partials_ptr,  # (P, N_SUMS, N) float32
    first_ptr,  # (N,), the sums of number 0
    second_ptr,  # (N,), of number 1; if there are fewer than three, the last pointer is repeated
    third_ptr,  # (N,), of number 2
    n_partials,  # P
    n_cols,  # N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program adds one block of columns of one of the N_SUMS.
    number = tl.program_id(1)
    stride = tl.num_programs(1) * n_cols
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, n_partials, BLOCK_M):
        partials = first + tl.arange(0, BLOCK_M)
        mask = (partials < n_partials)[:, None] & (cols < n_cols)[None, :]
        at = partials_ptr + number * n_cols + partials[:, None] * stride + cols[None, :]
        sums += tl.load(at, mask=mask, other=0.0)
    total = round_to(tl.sum(sums, axis=0), first_ptr.dtype.element_ty)
    out_ptr = first_ptr
    if number == 1:
        out_ptr = second_ptr
    elif number == 2:
        out_ptr = third_ptr
    tl.store(out_ptr + cols, total, mask=cols < n_cols)


def column_sums(partials: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The sums over P of `partials` (P, K, N) float32, K <= 3: K tensors (N,) in `dtype`, added in the same order everywhere.

    It reads 4 P K N bytes, which are still in the L2 cache.
    """
    n_partials, n_sums, n_cols = partials.shape
    sums = [torch.empty(n_cols, dtype=dtype, device=partials.device) for _ in range(n_sums)]
    first, second, third = sums[0], sums[min(1, n_sums - 1)], sums[-1]
    # Rows of 128 bytes, and two steps for 512 programs: latency bounds the time here.
    tiles = {"BLOCK_M": 256, "BLOCK_N": 32, "num_warps": 8, **COMPILER_OPTIONS}
    grid = (triton.cdiv(n_cols, tiles["BLOCK_N"]), n_sums)
    with torch.cuda.device_of(partials):
        _column_sums_kernel[grid](partials, first, second, third, n_partials, n_cols, **tiles)
    return sums
