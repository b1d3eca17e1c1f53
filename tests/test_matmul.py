"""The tile product of kernels/_matmul.py for every type of operand, in a kernel that does nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from albert_fast.kernels._matmul import halves, in_words, matmul_tiles, n_tiles, tile_of_program, tile_product

from albert_fast.testing.parity import device_of

DEVICE = device_of("triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int8, torch.float8_e4m3fn)


@triton.jit
def _product_kernel(
    x_ptr,  # (T, K), rows `stride_x_row` elements apart
    weight_ptr,  # (N, K), contiguous
    out_ptr,  # (T, N), contiguous, of the sums' type
    n_rows,  # T
    n_cols,  # N
    n_inner,  # K
    stride_x_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    first_row, first_col = tile_of_program(n_rows, n_cols, BLOCK_M, BLOCK_N)
    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    acc = tile_product(x_ptr, weight_ptr, rows, cols, n_rows, n_cols, n_inner, stride_x_row, BLOCK_K, EVEN_K)
    left, right = halves(acc)
    at = out_ptr + rows[:, None] * n_cols + (first_col + tl.arange(0, BLOCK_N // 2))[None, :]
    row_mask, half = (rows < n_rows)[:, None], BLOCK_N // 2
    tl.store(at, left, mask=row_mask & (first_col + tl.arange(0, BLOCK_N // 2) < n_cols)[None, :])
    tl.store(at + half, right, mask=row_mask & (first_col + half + tl.arange(0, BLOCK_N // 2) < n_cols)[None, :])


def operands(shape, dtype):
    """x (T, K), whose rows are strided, and weight (N, K)."""
    n_rows, width, n_cols = shape
    sizes = ((n_rows, width + 16), (n_cols, width))
    if dtype == torch.int8:
        wide, weight = (torch.randint(-128, 128, size, dtype=dtype) for size in sizes)
    else:
        wide, weight = (torch.randn(size).to(dtype) for size in sizes)
    return wide.to(DEVICE)[:, :width], weight.to(DEVICE)


def product(x, weight, tile):
    x, weight = in_words(x), in_words(weight)
    (n_rows, width), n_cols = x.shape, len(weight)
    sums = torch.int32 if x.dtype == torch.int8 else torch.float32
    out = torch.zeros((n_rows, n_cols), dtype=sums, device=DEVICE)
    even = width % tile["BLOCK_K"] == 0
    _product_kernel[(n_tiles(n_rows, n_cols, tile),)](
        x, weight, out, n_rows, n_cols, width, x.stride(0), EVEN_K=even, **tile
    )
    return out


# A number alone; rows that are no whole words; more tiles of rows than a group has, the last one short.
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 53, 31), (300, 64, 80), (70, 256, 144)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_of_operand(shape, dtype):
    if dtype == torch.float8_e4m3fn and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this chip has no float8")
    x, weight = operands(shape, dtype)
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    out, exact = product(x, weight, tile), x.double() @ weight.double().t()
    if dtype == torch.int8:
        assert torch.equal(out.double(), exact)
    else:
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)


def test_every_tile_is_some_programs():
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    for n_rows in (1, 16, 129, 272):  # one tile of rows, a group and one more, two groups and one more
        x, weight = torch.ones(n_rows, 16, device=DEVICE), torch.ones(33, 16, device=DEVICE)
        assert (product(x, weight, tile) == 16).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_whole_words_are_taken_as_they_are(dtype):
    x, _ = operands((5, 64, 3), dtype)
    assert in_words(x) is x
    word = 16 // dtype.itemsize
    for other in (x[:, 1 : 1 + word], x[:, : word - 1], x.t()[:word]):
        padded = in_words(other)
        assert padded.stride() == (padded.shape[1], 1)
        assert padded.shape[1] % word == 0
        assert torch.equal(padded[:, : other.shape[1]].float(), other.float())
        assert (padded[:, other.shape[1] :].float() == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_guess_is_the_largest_tile_that_fills_the_chip(dtype):
    sizes = [tile["BLOCK_M"] * tile["BLOCK_N"] for tile in matmul_tiles(2**20, 4096, dtype)]
    assert sizes[0] == 128 * 128
    for n_rows in (1, 128, 2048, 2**20):
        tiles = matmul_tiles(n_rows, 3072, dtype)
        assert sorted(t["BLOCK_M"] * t["BLOCK_N"] for t in tiles) == sorted(sizes), "the same candidates for any shape"
        larger = [
            t for t in tiles if tiles[0]["BLOCK_M"] * tiles[0]["BLOCK_N"] < t["BLOCK_M"] * t["BLOCK_N"] <= 128 * 128
        ]
        assert all(n_tiles(n_rows, 3072, t) < 132 for t in larger)
