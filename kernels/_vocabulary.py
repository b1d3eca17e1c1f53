"""Building blocks of linear_cross_entropy's kernels: tile sizes, shares of the vocabulary, products in chunks, probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common import product

MAX_WIDTH = 1024
_LOG2_E = tl.constexpr(1.4426950408889634)
# Gradients of logits are at most 1 in size and as small as 1 / V: times 2^15 they fit the normal numbers of float16.
UNIT = tl.constexpr(32768.0)
# The vocabulary is split until this many programs run, but into shares of at least _MIN_WORDS words. Both are constants that do
# not depend on the chip, because they decide the order of the sums.
_PROGRAMS, _MIN_WORDS = 512, 1024
# A program owns some rows (or words) and walks over words (or rows).
# (Bytes per element or "tf32", whether all columns are multiplied at once) -> (owned, walked at a time, columns
# multiplied at a time, num_warps, num_stages). Registers bound them: none spills on sm_80, sm_90 or sm_100.
# An exact float32 product runs on plain FMA, with all its operands in registers: hence small tiles and chunks.
_TILES: dict[tuple[int | str, bool], tuple[int, ...]] = {
    (2, True): (128, 64, 128, 8, 3),
    (2, False): (64, 64, 64, 4, 2),
    (4, False): (32, 32, 16, 8, 1),
    ("tf32", True): (64, 64, 128, 8, 2),
    ("tf32", False): (64, 64, 32, 8, 2),
}
_MAX_OUT = 128


def linear_cross_entropy_tiles(
    width: int, dtype: torch.dtype, tf32: bool = False, smoothed: bool = False
) -> dict[str, int]:
    """Tile sizes and launch options of the kernels that multiply, as keywords; tf32: whether float32 is multiplied as TF32.

    smoothed: whether the kernel also sums logits, for label smoothing.

    Raises:
        ValueError: more than 1024 columns.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"linear_cross_entropy: {width} columns; the Triton kernels take up to {MAX_WIDTH}")
    at_once = (tf32 or dtype.itemsize == 2) and width <= _MAX_OUT
    owned, walked, chunk, num_warps, num_stages = _TILES["tf32" if tf32 else dtype.itemsize, at_once]
    block_e = max(16, triton.next_power_of_2(width))
    # Without a limit ptxas spills a few registers at this width to fit one more program.
    limit = {"maxnreg": 128 if dtype.itemsize == 4 else 255} if block_e == 64 and not tf32 else {}
    if smoothed and block_e == 128 and dtype.itemsize == 2:  # likewise, on sm_100
        limit = {"maxnreg": 255}
    return {
        "TF32": tf32,
        "BLOCK_M": owned,
        "BLOCK_N": walked,
        "BLOCK_E": block_e,
        "CHUNK_E": min(chunk, block_e),
        "BLOCK_O": min(_MAX_OUT, block_e),
        "num_warps": num_warps,
        "num_stages": num_stages,
        **limit,
    }


def vocabulary_shares(n_rows: int, n_words: int, tiles: dict[str, int]) -> tuple[int, int, int]:
    """(blocks of rows, shares of the vocabulary, words per share); they depend on sizes alone."""
    row_blocks = triton.cdiv(n_rows, tiles["BLOCK_M"])
    words = max(triton.cdiv(n_words, triton.cdiv(_PROGRAMS, row_blocks)), min(_MIN_WORDS, n_words))
    words = triton.cdiv(words, tiles["BLOCK_N"]) * tiles["BLOCK_N"]
    return row_blocks, triton.cdiv(n_words, words), words


class LossInputs(NamedTuple):
    """What the forward reads; one argument of a kernel."""

    x_ptr: Any  # (N, WIDTH), rows `stride_x_row` elements apart
    weight_ptr: Any  # (V, WIDTH), contiguous
    bias_ptr: Any  # (V,)
    rows_ptr: Any  # (N,) int32, the labelled rows
    targets_ptr: Any  # (N,) int32, their labels
    count_ptr: Any  # (1,) int32, how many there are


class GradientInputs(NamedTuple):
    """What both kernels of the backward read; one argument of a kernel."""

    x_ptr: Any  # (slots, WIDTH), contiguous, the gathered rows
    weight_ptr: Any  # (V, WIDTH), contiguous
    bias_ptr: Any  # (V,)
    targets_ptr: Any  # (slots,) int32, the rows' labels
    count_ptr: Any  # (1,) int32, how many rows are labelled
    row_max_ptr: Any  # (slots,) float32, each row's largest logit
    factor_ptr: Any  # (slots,) float32, 2^15 / sum of exponentials


class VocabularyTile(NamedTuple):
    """Compile-time sizes of a kernel that multiplies rows and words."""

    WIDTH: Any  # E
    BLOCK_M: Any  # owned rows or words
    BLOCK_N: Any  # walked words or rows
    BLOCK_E: Any  # WIDTH padded to a power of two
    CHUNK_E: Any  # columns multiplied at a time; BLOCK_E, or a divisor of it
    TF32: Any  # whether float32 is multiplied as TF32


class OwnedRows(NamedTuple):
    """The rows (or words) that a program multiplies throughout its walk."""

    tile: Any  # (BLOCK_M, BLOCK_E) if CHUNK_E is BLOCK_E; otherwise unused: the rows are read again in chunks
    ptrs: Any  # (BLOCK_M,) addresses
    mask: Any  # (BLOCK_M,) whether a row exists; None: all do


@triton.jit
def load_columns(
    ptrs,  # (rows,) addresses of rows
    mask,  # (rows,) whether a row exists; None: all do
    cols,  # (columns,)
    TILE: tl.constexpr,  # VocabularyTile
):
    """Columns `cols` of rows, with zeros where there is no row and beyond WIDTH."""
    at = ptrs[:, None] + cols[None, :]
    if TILE.WIDTH != TILE.BLOCK_E:
        inside = (cols < TILE.WIDTH)[None, :]
        if mask is not None:
            inside = mask[:, None] & inside
        tile = tl.load(at, mask=inside, other=0.0)
    elif mask is not None:
        tile = tl.load(at, mask=mask[:, None], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_whole(ptrs, mask, TILE: tl.constexpr):
    """Whole rows, or, if they are read in chunks, a placeholder."""
    tile = ptrs
    if TILE.CHUNK_E == TILE.BLOCK_E:
        tile = load_columns(ptrs, mask, tl.arange(0, TILE.BLOCK_E), TILE)
    return tile


@triton.jit
def multiply(
    owned,  # OwnedRows
    walk_ptrs,  # (BLOCK_N,) addresses of walked rows
    walk_mask,  # (BLOCK_N,) whether a walked row exists; None: all do
    TILE: tl.constexpr,  # VocabularyTile
):
    """(products (BLOCK_M, BLOCK_N) float32 of owned rows with walked rows, the walked rows as `load_whole` gives them)."""
    acc = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_N], dtype=tl.float32)
    walked = load_whole(walk_ptrs, walk_mask, TILE)
    if TILE.CHUNK_E == TILE.BLOCK_E:
        acc = product(owned.tile, tl.trans(walked), acc, TILE.TF32)
    else:
        for first_col in range(0, TILE.BLOCK_E, TILE.CHUNK_E):
            cols = first_col + tl.arange(0, TILE.CHUNK_E)
            a = load_columns(owned.ptrs, owned.mask, cols, TILE)
            b = load_columns(walk_ptrs, walk_mask, cols, TILE)
            acc = product(a, tl.trans(b), acc, TILE.TF32)
    return acc, walked


@triton.jit
def out_columns(
    walked,  # as `multiply` returned them
    walk_ptrs,  # (BLOCK_N,) addresses of walked rows
    walk_mask,  # (BLOCK_N,) whether a walked row exists; None: all do
    cols,  # (columns,) of this program's gradient
    TILE: tl.constexpr,  # VocabularyTile
):
    """Columns `cols` of the walked rows; they are loaded already if one chunk holds all columns."""
    tile = walked
    if TILE.CHUNK_E != TILE.BLOCK_E:
        tile = load_columns(walk_ptrs, walk_mask, cols, TILE)
    return tile


@triton.jit
def finite_max(row_max):
    """What is subtracted from a row's logits: its maximum, or 0 if that is -inf, whose difference to itself is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def power(logits, row_max):
    """exp(logits - row_max), at most 1."""
    # The difference is taken first: in one FMA with log2(e), huge logits would differ from their own maximum.
    difference = (logits - finite_max(row_max)) * _LOG2_E
    # A kernel that sums the same logit in another order may find it above the maximum.
    return tl.exp2(tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def logit_gradients(logits, row_max, factor, uniform, is_label, on_label):
    """(softmax - smoothed label) * 2^15, float32.

    factor: 2^15 / sum of exponentials. uniform: what label smoothing takes from every logit. on_label: what the label's logit
    loses; both times 2^15.
    """
    p = power(logits, row_max) * factor - uniform
    # Subtracted before rounding to a lower dtype, in which a probability near 1 would cancel to 0.
    return tl.where(is_label, p - on_label, p)
