"""x @ weight.T on tensor cores, one tile per program: the walk over K, for kernels that add an epilogue of their own.

A program computes BLOCK_M rows by BLOCK_N columns of the product of x (T, K) and weight (N, K), both read along K, so
that neither is transposed in memory. Instead of rows behind the last one, the last one is read again: so the walk needs a mask
only if K is not a multiple of BLOCK_K. The kernel that stores the tile masks it.

bfloat16, float16 and float32 give float32 sums (float32 products are exact, or TF32 if torch is asked for it), int8 gives
int32 sums and float8 e4m3 float32 sums. One program sums each element, in an order that depends on BLOCK_K alone.

Operands are loaded by asynchronous copies of 16-byte words (cp.async); `in_words` copies the rare rows that do not begin at
such a word. The copy engine of newer chips (TMA) would need this path as well, for older chips, and has little to save: a step
of 128 x 256 x 64 keeps Hopper's tensor cores busy for 1024 cycles. For sm_90 it compiles to 128 instructions a warp, most of
them for addresses and copies: 256 cycles of the schedulers, while the products run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import product

# Tiles that share a block of columns of weight while it is in the L2 cache.
_GROUP_M = tl.constexpr(8)
# The number on an H100. It is a constant, so that the same shape has the same tiles and sums on every chip.
_MULTIPROCESSORS = 132
# Two programs with this tile fit a multiprocessor of Hopper: the epilogue of one runs while the other multiplies. A larger
# tile multiplies faster but leaves the tensor cores idle in its epilogue: the tuner may choose it, but it is not a first guess.
_LARGEST_GUESS = 128 * 128

# Type of the operands, or "tf32" -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), from large to small. A larger tile reads
# less, (BLOCK_M + BLOCK_N) / (BLOCK_M BLOCK_N) elements per multiplication; a smaller one occupies more multiprocessors.
# None spills on sm_80, sm_90 or sm_100 if the epilogue takes one of the `halves` after the other.
_BYTES = ((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (64, 64, 128, 4, 4))
_HALVES = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))
_TILES: dict[torch.dtype | str, tuple[tuple[int, ...], ...]] = {
    torch.int8: ((128, 256, 64, 8, 4), *_BYTES),
    # With the large tile the second set of sums that `accumulate` keeps would spill.
    torch.float8_e4m3fn: _BYTES,
    torch.bfloat16: _HALVES,
    torch.float16: _HALVES,
    # Steps have as many bytes as in 16 bits. The large tile is left out: its stores, of twice the bytes, would spill.
    "tf32": ((128, 128, 32, 8, 3), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4)),
    # An exact float32 product runs on plain FMA, with its operands in registers: hence short steps along K.
    torch.float32: ((128, 128, 16, 8, 3), (64, 64, 16, 8, 3), (32, 32, 16, 4, 3)),
}


def matmul_tiles(n_rows: int, n_cols: int, dtype: torch.dtype, tf32: bool = False) -> list[dict[str, int]]:
    """Tile sizes and launch options for (n_rows, n_cols) products of operands of this type, as keywords, best guess first.

    The guess is the largest tile up to 128 x 128 of which there are enough for all multiprocessors; its neighbours follow.
    """
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    tiles = [dict(zip(names, sizes, strict=True)) for sizes in _TILES["tf32" if tf32 else dtype]]
    guesses = [
        number
        for number, tile in enumerate(tiles)
        if tile["BLOCK_M"] * tile["BLOCK_N"] <= _LARGEST_GUESS and n_tiles(n_rows, n_cols, tile) >= _MULTIPROCESSORS
    ]
    guess = min(guesses, default=len(tiles) - 1)
    return [tiles[number] for number in sorted(range(len(tiles)), key=lambda number: abs(number - guess))]


def in_words(x: torch.Tensor) -> torch.Tensor:
    """`x` (T, K) with rows of whole 16-byte words, K padded with zeros; `x` itself if its rows are such already.

    Smaller words take more addresses than there are registers, and no asynchronous copy moves single 16-bit numbers.
    """
    word = 16 // x.itemsize
    width = triton.cdiv(x.shape[1], word) * word
    strided = x.stride(1) != 1 or x.stride(0) % word or x.data_ptr() % 16
    if width == x.shape[1] and not strided:
        return x
    padded = x.new_zeros((x.shape[0], width))
    padded[:, : x.shape[1]] = x
    return padded


def n_tiles(n_rows: int, n_cols: int, tile: dict[str, int]) -> int:
    """The number of tiles, which is the number of programs of a launch."""
    return triton.cdiv(n_rows, tile["BLOCK_M"]) * triton.cdiv(n_cols, tile["BLOCK_N"])


@triton.jit
def tile_of_program(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, int64; first column) of program_id(0)'s tile: programs go down a few tiles of rows, then one to the right.

    So the tiles that run at the same time form a square, which reads the fewest rows of both operands.
    """
    row_blocks = tl.cdiv(n_rows, BLOCK_M)
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    group = tl.program_id(0) // (_GROUP_M * col_blocks)
    within = tl.program_id(0) % (_GROUP_M * col_blocks)
    height = tl.minimum(row_blocks - group * _GROUP_M, _GROUP_M)
    # 64 bits: row number times stride passes 2^31 elements in long batches of wide rows.
    row_block = (group * _GROUP_M + within % height).to(tl.int64)
    return row_block * BLOCK_M, within // height * BLOCK_N


@triton.jit
def tile_product(
    x_ptr,  # (T, K), rows `stride_x_row` elements apart; see `in_words`
    weight_ptr,  # (N, K), contiguous, of x's dtype; see `in_words`
    rows,  # (BLOCK_M,) int64
    cols,  # (BLOCK_N,)
    n_rows,  # T
    n_cols,  # N
    n_inner,  # K
    stride_x_row,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    TF32: tl.constexpr = False,  # whether float32 is multiplied as TF32
):
    """The tile's sums (BLOCK_M, BLOCK_N), float32 or int32; those beyond T and N are meaningless."""
    # These divisions change nothing; they tell the compiler that rows consist of whole words.
    word: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n_inner = n_inner // word * word
    stride_x_row = stride_x_row // word * word
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + tl.minimum(rows, n_rows - 1)[:, None] * stride_x_row + inner[None, :]
    weight_at = weight_ptr + tl.minimum(cols, n_cols - 1).to(tl.int64)[None, :] * n_inner + inner[:, None]
    dtype: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros([rows.shape[0], cols.shape[0]], dtype=dtype)
    for first in range(0, n_inner, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            inside = first + inner < n_inner
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
        acc = accumulate(x, weight, acc, TF32)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    return acc


@triton.jit
def accumulate(a, b, acc, TF32: tl.constexpr):
    """a (M, K) @ b (K, N) + acc, with int32 sums for int8 and float32 sums for all other types."""
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif a.dtype == tl.float8e4nv:
        # Hopper's tensor cores keep 14 bits of the sums of float8 products, so the sums are moved to float32 after every step.
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        acc = product(a, b, acc, TF32)
    return acc


@triton.jit
def halves(acc):
    """The left and the right half of a tile's columns, for an epilogue that takes one after the other.

    For the whole tile ptxas would interleave the activations of all elements and need more registers than there are.
    """
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
