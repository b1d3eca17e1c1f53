"""x @ weight.T on tensor cores, one tile a program: the walk over K that kernels with an epilogue of their own share.

A program computes BLOCK_M rows by BLOCK_N columns of the product of x (T, K) and weight (N, K), both read along K, so that
neither is transposed in memory. Rows behind the last one are read as the last one again: no mask stands in the walk but
where K is no multiple of BLOCK_K, and whoever stores the tile masks it.

bfloat16, float16 and float32 give float32 sums (float32 products are exact ones, never TF32), int8 gives int32 sums and
float8 e4m3 float32 sums. Every element is summed by one program, in an order that follows from BLOCK_K alone.

The operands come by asynchronous copies of 16 bytes (cp.async), which take rows of any stride. The copy engine of newer
chips (TMA) takes strides of whole 16 bytes alone, would need this path beside its own, and has little to save: a step of
128 x 256 x 64 keeps Hopper's tensor cores busy for 1024 cycles, and for sm_90 it compiles to 128 instructions a warp, of
which addresses and copies are most: 256 cycles of its schedulers, beside the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import product

# Tiles that share a block of columns of weight while it is in the L2 cache.
GROUP_M = 8
# The H100's 132 multiprocessors, a constant so that the same shape has the same tiles, and sums, on every chip.
_MULTIPROCESSORS = 132

# Bytes an element -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), from large to small. A larger tile reads less
# per product: (BLOCK_M + BLOCK_N) / (BLOCK_M BLOCK_N) elements a multiplication; a smaller one fills more multiprocessors.
_TILES = {
    1: ((128, 128, 128, 8, 4), (64, 128, 128, 4, 4), (64, 64, 128, 4, 4)),
    2: ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    # A float32 product runs on plain FMA, with its operands in registers: hence small tiles and short steps along K.
    4: ((64, 64, 16, 8, 3), (32, 32, 16, 4, 3)),
}  # fmt: skip


def matmul_tiles(n_rows: int, n_cols: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Tile sizes and launch options for (n_rows, n_cols) products of such operands, as keywords, best guess first.

    The largest tile that still gives every multiprocessor one, then its neighbours in size.
    """
    tiles = [_keywords(*sizes) for sizes in _TILES[dtype.itemsize]]
    filling = [n for n, tile in enumerate(tiles) if n_tiles(n_rows, n_cols, tile) >= _MULTIPROCESSORS]
    best = min(filling, default=len(tiles) - 1)
    return sorted(tiles, key=lambda tile: abs(tiles.index(tile) - best))


def _keywords(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def n_tiles(n_rows: int, n_cols: int, tile: dict[str, int]) -> int:
    """Programs of a launch."""
    return triton.cdiv(n_rows, tile["BLOCK_M"]) * triton.cdiv(n_cols, tile["BLOCK_N"])


@triton.jit
def tile_of_program(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """rows (BLOCK_M,) int64 and cols (BLOCK_N,) of program_id(0): down GROUP_M tiles of rows, then one to the right.

    So the tiles that run at a time form a square, which reads the fewest rows of both operands.
    """
    row_blocks = tl.cdiv(n_rows, BLOCK_M)
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * col_blocks)
    within = tl.program_id(0) % (GROUP_M * col_blocks)
    height = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
    row_block = group * GROUP_M + within % height
    # 64 bits: a row's number times its stride passes 2^31 elements in long batches of wide rows.
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, within // height * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def tile_product(
    x_ptr,  # (T, K), rows `stride_x_row` elements apart
    weight_ptr,  # (N, K), contiguous, of x's dtype
    rows,  # (BLOCK_M,) int64
    cols,  # (BLOCK_N,)
    n_rows,  # T
    n_cols,  # N
    n_inner,  # K
    stride_x_row,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
):
    """The tile's sums (BLOCK_M, BLOCK_N), float32 or int32; beyond T and N, numbers without a meaning."""
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
        acc = accumulate(x, weight, acc)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    return acc


@triton.jit
def accumulate(a, b, acc):
    """a (M, K) @ b (K, N) + acc: int32 sums of int8, float32 sums of all else."""
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif a.dtype == tl.float8e4nv:
        # Hopper's tensor cores keep 14 bits of a float8 product's sums: they are moved to float32 after every step.
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        acc = product(a, b, acc)
    return acc
