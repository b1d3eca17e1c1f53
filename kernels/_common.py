"""What several kernels share: activations, replayable dropout, the rows of a program, LayerNorm of rows, sums of columns.

A gradient's sums over rows are taken without atomics, in an order that follows from the shape alone: a backward starts a
fixed number of programs (`row_groups`), each of which walks over its rows, keeps the sums of its columns in registers and
writes them once; `column_sums` then adds the programs' rows of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Numbers of the activations, the same in C++.
ACT_CODES = {"gelu_tanh": 0, "gelu_erf": 1, "relu": 2}
MAX_ROW = 16384
# A backward keeps three float32 sums beside every element of a row: wider rows would spill and are split into blocks.
MAX_WHOLE_ROW_BWD = 4096
SPLIT_BLOCK_N = 1024
# Of a backward at most: four on each of 132 multiprocessors, all resident at once. A constant, so that sums are the same on
# every chip. At 32,768 x 768 their rows of sums add 2 % to the bytes moved, and as much again is read from the L2 cache.
BWD_PROGRAMS = 512
# Products and sums become one FMA; said aloud because the default differs between versions of Triton.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
# 16 warps of 128 registers fill a multiprocessor: told no limit, ptxas spills a few to fit in more than the grid has.
BWD_OPTIONS = {**COMPILER_OPTIONS, "maxnreg": 128}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def row_tiles(n_cols: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for kernels whose programs hold whole rows of `n_cols` elements in registers.

    16 elements a thread, 32 in rows of 4096: two 16-byte loads in flight per operand, and float32 copies of the operands
    fit the registers under every compiler that is checked (32 elsewhere spilt for sm_80 or sm_90, under Triton 3.6 or 3.7).

    Raises:
        ValueError: a row wider than MAX_ROW does not fit one program.
    """
    if n_cols > MAX_ROW:
        raise ValueError(f"rows of {n_cols} elements: the Triton kernels take up to {MAX_ROW}; use backend='reference'")
    block_n = max(128, triton.next_power_of_2(n_cols))
    block_m = max(1, 2048 // block_n)
    return block_m, block_n, max(4, block_n // (512 if block_n > 4096 else 1024))


def bwd_row_tiles(n_cols: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for backward kernels: whole rows where BLOCK_N >= n_cols, blocks of columns elsewhere.

    8 elements a thread: with 16, and three sums beside each of them, too few programs share a multiprocessor.
    """
    block_n = max(128, triton.next_power_of_2(n_cols)) if n_cols <= MAX_WHOLE_ROW_BWD else SPLIT_BLOCK_N
    block_m = max(1, 1024 // block_n)
    return block_m, block_n, block_m * block_n // 256


def row_groups(n_rows: int, block_m: int, col_blocks: int) -> int:
    """P, how many programs share the rows of each block of columns: fixed by the shape, not by the chip."""
    return min(triton.cdiv(n_rows, block_m), max(1, BWD_PROGRAMS // col_blocks))


def bwd_stages(x: torch.Tensor) -> int:
    """Tiles of a walk over rows at a time: those behind the first are on their way past the registers, into shared memory.

    As many bytes in every dtype: 12 KiB of a program with three operands.
    """
    return 3 if x.itemsize == 2 else 2


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
def product(a, b, acc, TF32: tl.constexpr):
    """a @ b + acc with float32 sums; float32 operands are multiplied exactly, or on tensor cores if TF32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as bare bits and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
        if TF32:
            a, b = _cut_to_tf32(a), _cut_to_tf32(b)
        # numpy's float32 products depend on the library, the chip and the tile's shape: two kernels that compute the same
        # score would not agree, as they do on a GPU. Rounded once from float64 they do, everywhere.
        return (tl.dot(a.to(tl.float64), b.to(tl.float64)) + acc).to(tl.float32)
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def _cut_to_tf32(x):
    """What a tensor core reads of float32 `x`: it is handed all bits and ignores the lower 13 of the mantissa."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


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
def activation_grad(grad, x, ACT: tl.constexpr):
    """float32 grad * act'(x), act being the activation numbered ACT."""
    tl.static_assert(ACT == 0 or ACT == 1 or ACT == 2)
    if ACT == 0:
        # s = sigmoid(w) and s (1 - s) from exp(-|w|), which neither cancels nor overflows; constants as in `activate`.
        w = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = tl.exp(-tl.abs(w))
        t = 1.0 / (1.0 + e)
        slope = 1.5957691216057308 + 0.21406444881780074 * x * x
        result = grad * (tl.where(w < 0.0, e * t, t) + x * (e * t * t) * slope)
    elif ACT == 1:
        # Phi(x) + x phi(x), the standard normal distribution and its density.
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        result = grad * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    else:
        # A choice, not a product, as in torch: an infinite gradient behind a closed gate is 0.
        result = tl.where(x <= 0.0, 0.0, grad)
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
def moments_overflow(mean, n_cols):
    """0, or NaN where torch's layer_norm has one on a CPU: where the mean's square passes float32, in rows of whole vectors."""
    return tl.where(n_cols % 16 == 0, 0.0 * (mean * mean), 0.0)


@triton.jit
def layer_norm_rows(z, mask, n_cols, eps):
    """(normalised z (BLOCK_M, BLOCK_N), mean (BLOCK_M,), rstd (BLOCK_M,)) of float32 rows; `z` is 0 outside `mask`."""
    mean = tl.sum(z, axis=1) / n_cols
    # The second pass runs over registers, so the variance need not be taken from cancelling sums of squares.
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
    rows,  # as `program_rows` gives these four
    cols,
    row_mask,
    mask,
    n_cols,  # N
    eps,
):
    """LayerNorm of whole rows and its statistics, into memory."""
    normalised, mean, rstd = layer_norm_rows(z, mask, n_cols, eps)
    out = normalised * load_row_vector(weight_ptr, cols, n_cols) + load_row_vector(ln_bias_ptr, cols, n_cols)
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


@triton.jit
def group_rows(tile, n_rows, BLOCK_M: tl.constexpr):
    """Of tile number `tile` in a walk over rows: rows (BLOCK_M,) int64, row_mask (BLOCK_M,)."""
    # 64 bits: as in `program_rows`.
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    return rows, rows < n_rows


@triton.jit
def normalise_again(z, grad, weight, mean_ptr, rstd_ptr, rows, row_mask, mask):
    """Of float32 rows before their LayerNorm: g = grad * weight and z_hat, both 0 outside `mask`, and rstd (BLOCK_M,)."""
    mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
    # Zeros whatever stands in the vectors, so that nothing of it reaches a sum.
    g = tl.where(mask, grad * weight, 0.0)
    return g, tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0), rstd


@triton.jit
def store_row_means(
    g_sum,  # (BLOCK_M, BLOCK_N) float32: g and g z_hat, summed over a row's blocks of columns
    gz_sum,
    means_ptr,  # (2, T) float32
    rows,
    row_mask,
    n_rows,  # T
    n_cols,
):
    """The two means of whole rows that `layer_norm_grad` takes off."""
    tl.store(means_ptr + rows, tl.sum(g_sum, axis=1) / n_cols, mask=row_mask)
    tl.store(means_ptr + n_rows + rows, tl.sum(gz_sum, axis=1) / n_cols, mask=row_mask)


@triton.jit
def layer_norm_grad(g, z_hat, rstd, means_ptr, rows, n_rows, n_cols, WHOLE_ROWS: tl.constexpr):
    """float32 gradient of the rows before LayerNorm, from what `normalise_again` gives; means (2, T) of split rows."""
    if WHOLE_ROWS:
        g_mean = tl.sum(g, axis=1) / n_cols
        gz_mean = tl.sum(g * z_hat, axis=1) / n_cols
    else:
        g_mean = tl.load(means_ptr + rows, mask=rows < n_rows, other=0.0)
        gz_mean = tl.load(means_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
    return (g - g_mean[:, None] - z_hat * gz_mean[:, None]) * rstd[:, None]


@triton.jit
def store_column_sums(
    partials_ptr,  # (P, N_SUMS, N) float32
    sums,  # (BLOCK_M, BLOCK_N) float32, of one program
    number: tl.constexpr,  # which of its N_SUMS
    cols,
    n_cols,  # N
    N_SUMS: tl.constexpr,
):
    """Add the rows of `sums` and write them where program_id(1), the group of rows, has its place."""
    at = partials_ptr + (tl.program_id(1) * N_SUMS + number) * n_cols
    tl.store(at + cols, tl.sum(sums, axis=0), mask=cols < n_cols)


@triton.jit(do_not_specialize=["n_partials"])
def _column_sums_kernel(
    partials_ptr,  # (P, N_SUMS, N) float32
    first_ptr,  # (N,), and so are the next two; the last is repeated where there are fewer than three
    second_ptr,
    third_ptr,
    n_partials,  # P
    n_cols,  # N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
    """The sums over P of `partials` (P, K, N) float32, K <= 3, each (N,) in `dtype`, added in one order everywhere.

    Reads 4 P K N bytes, which are still in the L2 cache.
    """
    n_partials, n_sums, n_cols = partials.shape
    sums = [torch.empty(n_cols, dtype=dtype, device=partials.device) for _ in range(n_sums)]
    block_m, block_n = 256, 32  # lines of 128 bytes, and two steps for 512 programs: time here is latency
    with torch.cuda.device_of(partials):
        _column_sums_kernel[(triton.cdiv(n_cols, block_n), n_sums)](
            partials, sums[0], sums[min(1, n_sums - 1)], sums[-1], n_partials, n_cols,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8, **COMPILER_OPTIONS,
        )  # fmt: skip
    return sums


def start_layer_norm_bwd(
    means_kernel: triton.JITFunction, kernel: triton.JITFunction, operands: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...], numbers: tuple[int | float, ...],
) -> list[torch.Tensor]:  # fmt: skip
    """Starts the two kernels of a LayerNorm's gradient and adds up the gradients of its vectors.

    Args:
        means_kernel: of (*operands, means (2, T) float32, *numbers), started where rows are split.
        kernel: of (*operands, means, *outputs, partials (P, 3, N) float32, *numbers).
        operands: the gradient (T, N) first. outputs: (T, N), written. numbers: T and N, then the kernels' own.

    Returns:
        The sums of the three vectors' gradients, each (N,) in the gradient's dtype.
    """
    grad = operands[0]
    n_rows, n_cols = grad.shape
    block_m, block_n, num_warps = bwd_row_tiles(n_cols)
    col_blocks = triton.cdiv(n_cols, block_n)
    groups = row_groups(n_rows, block_m, col_blocks)
    partials = torch.empty((groups, 3, n_cols), dtype=torch.float32, device=grad.device)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, **BWD_OPTIONS}
    means = partials  # in the place of what is not read where rows are whole
    with torch.cuda.device_of(grad):
        if col_blocks > 1:
            means = torch.empty((2, n_rows), dtype=torch.float32, device=grad.device)
            means_kernel[(triton.cdiv(n_rows, block_m),)](*operands, means, *numbers, **tiles)
        kernel[(col_blocks, groups)](
            *operands, means, *outputs, partials, *numbers,
            WHOLE_ROWS=col_blocks == 1, STAGES=bwd_stages(grad), **tiles,
        )  # fmt: skip
    return column_sums(partials, grad.dtype)
