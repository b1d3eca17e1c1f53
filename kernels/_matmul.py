"""x @ weight.T on tensor cores, one tile a program: the walk over K that kernels with an epilogue of their own share.

A program computes BLOCK_M rows by BLOCK_N columns of the product of x (T, K) and weight (N, K), both read along K, so
that neither is transposed in memory. Rows behind the last one are read as the last one again: no mask stands in the
walk but where K is no multiple of BLOCK_K, and whoever stores the tile masks it.

bfloat16, float16 and float32 give float32 sums (float32 products are exact, or TF32 where that is asked for), int8 gives
int32 sums and float8 e4m3 float32 sums. Every element is summed by one program, in an order that follows from BLOCK_K alone.

The operands come by asynchronous copies of words of 16 bytes (cp.async); `in_words` copies the rare rows that do not
begin at one. The copy engine of newer chips (TMA) would need this path beside its own, for older ones, and has little
to save: a step of 128 x 256 x 64 keeps Hopper's tensor cores busy for 1024 cycles, and for sm_90 it compiles to 128
instructions a warp, of which addresses and copies are most: 256 cycles of its schedulers, beside the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import product

# Tiles that share a block of columns of weight while it is in the L2 cache.
_GROUP_M = tl.constexpr(8)
# Of the H100; a constant, so that the same shape has the same tiles, and sums, on every chip.
_MULTIPROCESSORS = 132
# Two programs of it fit a multiprocessor of Hopper: the epilogue of one runs beside the products of the other. A larger
# tile multiplies faster and leaves the tensor cores idle in its epilogue: a candidate of the tuner, and no first guess.
_LARGEST_GUESS = 128 * 128

# Type of the operands, or "tf32" -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), from large to small: a larger tile reads
# less, (BLOCK_M + BLOCK_N) / (BLOCK_M BLOCK_N) elements a multiplication, a smaller one fills more multiprocessors.
# None spills on sm_80, sm_90 or sm_100 with an epilogue that goes by `halves`.
_BYTES = ((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (64, 64, 128, 4, 4))
_HALVES = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))
_TILES: dict[torch.dtype | str, tuple[tuple[int, ...], ...]] = {
    torch.int8: ((128, 256, 64, 8, 4), *_BYTES),
    # In the large tile the second set of sums that `accumulate` keeps would spill.
    torch.float8_e4m3fn: _BYTES,
    torch.bfloat16: _HALVES,
    torch.float16: _HALVES,
    # Steps of as many bytes as in 16 bits; behind the large tile of those, stores of twice the bytes would spill.
    "tf32": ((128, 128, 32, 8, 3), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4)),
    # An exact float32 product runs on plain FMA, with its operands in registers: hence short steps along K.
    torch.float32: ((128, 128, 16, 8, 3), (64, 64, 16, 8, 3), (32, 32, 16, 4, 3)),
}


def matmul_tiles(n_rows: int, n_cols: int, dtype: torch.dtype, tf32: bool = False) -> list[dict[str, int]]:
    """Tile sizes and launch options for (n_rows, n_cols) products of such operands, as keywords, best guess first.

    The guess is the largest tile, up to 128 x 128, that still gives every multiprocessor one; its neighbours follow.
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
    """`x` (T, K) with every row of whole 16-byte words, K padded with zeros; `x` itself where that is so already.

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
    """Programs of a launch."""
    return triton.cdiv(n_rows, tile["BLOCK_M"]) * triton.cdiv(n_cols, tile["BLOCK_N"])


@triton.jit
def tile_of_program(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, int64; first column) of program_id(0)'s tile: down a few tiles of rows, then one to the right.

    So the tiles that run at a time form a square, which reads the fewest rows of both operands.
    """
    row_blocks = tl.cdiv(n_rows, BLOCK_M)
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    group = tl.program_id(0) // (_GROUP_M * col_blocks)
    within = tl.program_id(0) % (_GROUP_M * col_blocks)
    height = tl.minimum(row_blocks - group * _GROUP_M, _GROUP_M)
    # 64 bits: a row's number times its stride passes 2^31 elements in long batches of wide rows.
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
    TF32: tl.constexpr = False,  # whether float32 is multiplied so
):
    """The tile's sums (BLOCK_M, BLOCK_N), float32 or int32; beyond T and N, numbers without a meaning."""
    # Said so that the compiler knows: rows are of whole words.
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
    """a (M, K) @ b (K, N) + acc: int32 sums of int8, float32 sums of all else."""
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif a.dtype == tl.float8e4nv:
        # Hopper's tensor cores keep 14 bits of a float8 product's sums: they are moved to float32 after every step.
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        acc = product(a, b, acc, TF32)
    return acc


@triton.jit
def halves(acc):
    """The left and the right half of a tile's columns, for an epilogue that takes one after the other.

    Over the whole tile ptxas would interleave the activations of all elements: more registers than there are.
    """
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
