"""What the passes of linear_cross_entropy share: tiles, shares of the vocabulary, products in chunks, probabilities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import product

MAX_WIDTH = 1024
_LOG2_E = tl.constexpr(1.4426950408889634)
# Gradients of logits are at most 1 in size and as small as 1 / V: times 2^15 they fit the normal numbers of float16.
UNIT = tl.constexpr(32768.0)
# The vocabulary is split until so many programs run, but into shares of no fewer words. Fixed numbers and not the
# chip's: they decide the order of the sums.
_PROGRAMS, _MIN_WORDS = 512, 1024
# (Bytes an element or "tf32", whether all columns are multiplied at once) -> (owned rows or words, walked words or rows, columns
# multiplied at a time, num_warps, num_stages). Bounded by registers: no spill on any of sm_80, sm_90, sm_100.
# An exact float32 product runs on plain FMA, with all its operands in registers: hence small tiles and chunks.
_TILES: dict[tuple[int | str, bool], tuple[int, ...]] = {
    (2, True): (128, 64, 128, 8, 3),
    (2, False): (64, 64, 64, 4, 2),
    (4, False): (32, 32, 16, 8, 1),
    ("tf32", True): (64, 64, 128, 8, 2),
    ("tf32", False): (64, 64, 32, 8, 2),
}
_MAX_OUT = 128


def linear_cross_entropy_tiles(width: int, dtype: torch.dtype, tf32: bool = False) -> dict[str, int]:
    """Tile sizes and launch options of the kernels that multiply, as keywords; tf32: whether float32 is multiplied so.

    Raises:
        ValueError: more than 1024 columns.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"linear_cross_entropy: {width} columns; the Triton kernels take up to {MAX_WIDTH}")
    at_once = (tf32 or dtype.itemsize == 2) and width <= _MAX_OUT
    owned, walked, chunk, num_warps, num_stages = _TILES["tf32" if tf32 else dtype.itemsize, at_once]
    block_e = max(16, triton.next_power_of_2(width))
    # Told no limit, ptxas spills a few registers of this width to fit one program more.
    limit = {"maxnreg": 128 if dtype.itemsize == 4 else 255} if block_e == 64 and not tf32 else {}
    return {
        "TF32": tf32, "BLOCK_M": owned, "BLOCK_N": walked, "BLOCK_E": block_e, "CHUNK_E": min(chunk, block_e),
        "BLOCK_O": min(_MAX_OUT, block_e), "num_warps": num_warps, "num_stages": num_stages, **limit,
    }  # fmt: skip


def vocabulary_shares(n_rows: int, n_words: int, tiles: dict[str, int]) -> tuple[int, int, int]:
    """(blocks of rows, shares of the vocabulary, words of a share): from sizes alone."""
    row_blocks = triton.cdiv(n_rows, tiles["BLOCK_M"])
    words = max(triton.cdiv(n_words, triton.cdiv(_PROGRAMS, row_blocks)), min(_MIN_WORDS, n_words))
    words = triton.cdiv(words, tiles["BLOCK_N"]) * tiles["BLOCK_N"]
    return row_blocks, triton.cdiv(n_words, words), words


@triton.jit
def load_tile(rows, mask, cols, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """Columns `cols` of the rows that begin at `rows`, zeros outside `mask` (None: all are there) and beyond WIDTH."""
    at = rows[:, None] + cols[None, :]
    if WIDTH != BLOCK_E:
        inside = (cols < WIDTH)[None, :]
        if mask is not None:
            inside = mask[:, None] & inside
        tile = tl.load(at, mask=inside, other=0.0)
    elif mask is not None:
        tile = tl.load(at, mask=mask[:, None], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_owned(rows, mask, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK_E: tl.constexpr):
    """What a program multiplies throughout its walk; its rows' addresses where they are read again in chunks."""
    owned = rows
    if CHUNK_E == BLOCK_E:
        owned = load_tile(rows, mask, tl.arange(0, BLOCK_E), WIDTH, BLOCK_E)
    return owned


@triton.jit
def multiply(
    owned, own_rows, own_mask, walk_rows, walk_mask, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK_E: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """(products (BLOCK_M, BLOCK_N) of owned rows and walked rows, the walked rows as loaded)."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    walked = walk_rows
    if CHUNK_E == BLOCK_E:
        walked = load_tile(walk_rows, walk_mask, tl.arange(0, BLOCK_E), WIDTH, BLOCK_E)
        acc = product(owned, tl.trans(walked), acc, TF32)
    else:
        for first_col in range(0, BLOCK_E, CHUNK_E):
            cols = first_col + tl.arange(0, CHUNK_E)
            a = load_tile(own_rows, own_mask, cols, WIDTH, BLOCK_E)
            b = load_tile(walk_rows, walk_mask, cols, WIDTH, BLOCK_E)
            acc = product(a, tl.trans(b), acc, TF32)
    return acc, walked


@triton.jit
def out_columns(walked, walk_rows, walk_mask, cols, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK_E: tl.constexpr):
    """The walked rows' columns that this program's gradient has; they are loaded already where one chunk is all."""
    tile = walked
    if CHUNK_E != BLOCK_E:
        tile = load_tile(walk_rows, walk_mask, cols, WIDTH, BLOCK_E)
    return tile


@triton.jit
def power(logits, row_max):
    """exp(logits - row_max), at most 1."""
    # A maximum of -inf is not subtracted: logits of -inf alone would make a NaN of all that follow.
    # The difference comes first: in one FMA with log2(e), huge logits would differ from their own maximum.
    difference = (logits - tl.where(row_max == float("-inf"), 0.0, row_max)) * _LOG2_E
    # A kernel that sums the same logit in another order may find it above the maximum.
    return tl.exp2(tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def logit_gradients(logits, row_max, factor, is_label):
    """(softmax - one-hot label) * 2^15, float32, with the factor 2^15 / sum of exponentials."""
    p = power(logits, row_max) * factor
    # Before any rounding to a lower dtype, where a probability near 1 would cancel to nothing.
    return tl.where(is_label, p - UNIT, p)
