"""quantized_encoder: all layers for inference, with int8 or float8 products, nine launches per layer.

Between two kernels activations are stored rounded for the next product, one byte per element with a step and a zero point
per row; those that are added or attended to are stored in bfloat16. Sums are exact int32 for int8, and float32 for float8.

Per token and without the weights a layer moves 38 H + 6 I bytes; in bfloat16, product by product with the same fusions,
36 H + 8 I. For I = 4 H these are 62 H and 68 H: the gain is the rate of the products, with half the bytes of weights and twice
the operations per cycle, minus the cost of a separate pass over attention's output (3 H).

| launch | reads | writes |
|---|---|---|
| query, key, value | H | 6 H |
| attention | 6 H | 2 H |
| rounding of its output | 2 H | H |
| its output's product | H | 2 H |
| add_layer_norm, rounding | 4 H | 3 H |
| FFN up | H | 2 I |
| activation, rounding | 2 I | I |
| FFN down | I | 2 H |
| add_layer_norm, rounding for the next layer | 4 H | 3 H |
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._common import COMPILER_OPTIONS, round_to
from ._matmul import matmul_tiles, n_tiles, tile_of_program, tile_product
from ._rounding import Rounded, add_layer_norm_rounded, bias_gelu_rounded, round_rows
from ._tuning import Tiles
from .attention import attention_fwd


@triton.jit(do_not_specialize=["n_rows"])
def _quantized_product_kernel(
    x_ptr,  # (T, D), contiguous, int8 or float8 e4m3
    steps_ptr,  # (T,) float32
    zeros_ptr,  # (T,) int32, or None for float8
    weight_ptr,  # (N, D), contiguous, in x's dtype, 0 beyond K
    scales_ptr,  # (N,) float32
    sums_ptr,  # (N,) float32: the sum of each channel's integers
    bias_ptr,  # (N,) float32, or None
    out_ptr,  # (T, N), contiguous
    n_rows,  # T
    n_cols,  # N
    depth,  # D, a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program takes one tile of BLOCK_M x BLOCK_N outputs.
    first_row, first_col = tile_of_program(n_rows, n_cols, BLOCK_M, BLOCK_N)
    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    acc = tile_product(x_ptr, weight_ptr, rows, cols, n_rows, n_cols, depth, depth, BLOCK_K, True)
    row_mask, col_mask = rows < n_rows, cols < n_cols
    if zeros_ptr is not None:
        # sum (q - zero) w = sum q w - zero sum w. This is exact: at most 255 x 127 x 16384, below 2^30.
        zeros = tl.load(zeros_ptr + rows, mask=row_mask, other=0)
        sums = tl.load(sums_ptr + cols, mask=col_mask, other=0.0).to(tl.int32)
        acc -= zeros[:, None] * sums[None, :]
    scales = tl.load(scales_ptr + cols, mask=col_mask, other=0.0)
    steps = tl.load(steps_ptr + rows, mask=row_mask, other=0.0)
    out = acc.to(tl.float32) * scales[None, :] * steps[:, None]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + cols, mask=col_mask, other=0.0)[None, :]
    out_at = out_ptr + rows[:, None] * n_cols + cols[None, :]
    tl.store(out_at, round_to(out, out_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


class Matrix(NamedTuple):
    """The weights of a product, and what its activations are multiplied by and shifted by before they are rounded.

    integers: (N, D) int8 or float8 e4m3, 0 beyond K. scales, sums: (N,) float32. rescales, shifts: (K,) float32.

    D, the depth, is K rounded up to a multiple of 128, so that rows begin at 16-byte words and no step of a product needs a mask:
    masked bytes would be loaded one by one.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor
    rescales: torch.Tensor
    shifts: torch.Tensor

    def channels(self, begin: int, end: int) -> Matrix:
        """The product's output channels `begin` to `end`."""
        integers, scales, sums = (t[begin:end] for t in (self.integers, self.scales, self.sums))
        return self._replace(integers=integers, scales=scales, sums=sums)


def quantized_product(x: Rounded, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product of rounded rows (T, D) with a matrix (N, D), (T, N) in bfloat16; bias: (N,) float32."""
    (n_rows, depth), n_cols = x.values.shape, len(matrix.integers)
    out = torch.empty((n_rows, n_cols), dtype=torch.bfloat16, device=x.values.device)
    if n_rows == 0:
        return out

    rows = (x.values, x.steps, x.zeros)
    weights = (matrix.integers, matrix.scales, matrix.sums)
    sizes = (n_rows, n_cols, depth)

    def launch(tiles: Tiles) -> None:
        grid = (n_tiles(n_rows, n_cols, tiles),)
        _quantized_product_kernel[grid](*rows, *weights, bias, out, *sizes, **tiles, **COMPILER_OPTIONS)

    key = functools.partial(_choice_key, n_rows, n_cols, depth, x.values.dtype)
    with torch.cuda.device_of(out):
        candidates = matmul_tiles(n_rows, n_cols, x.values.dtype)
        launch(_tuning.choose("quantized_product", key, candidates, launch))
    return out


def _choice_key(n_rows: int, n_cols: int, depth: int, dtype: torch.dtype) -> str:
    """What the fastest tiles depend on, apart from the chip; the number of rows is rounded up to a power of two."""
    return f"{dtype} T{triton.next_power_of_2(n_rows)} N{n_cols} K{depth}"


class LayerVectors(NamedTuple):
    """The vectors of one layer: biases in float32, weights and biases of the norms in bfloat16."""

    qkv_bias: torch.Tensor  # (3H,)
    dense_bias: torch.Tensor  # (H,)
    norm_weight: torch.Tensor  # (H,)
    norm_bias: torch.Tensor  # (H,)
    ffn_bias: torch.Tensor  # (I,)
    ffn_output_bias: torch.Tensor  # (H,)
    full_norm_weight: torch.Tensor  # (H,)
    full_norm_bias: torch.Tensor  # (H,)


class LayerProducts(NamedTuple):
    """The products of one layer, with the shapes (N, K) of their matrices."""

    qkv: Matrix  # (3H, H)
    dense: Matrix  # (H, H)
    ffn: Matrix  # (I, H)
    ffn_output: Matrix  # (H, I)


# The orders of a layer's vectors and products and of a product's tensors; ops/quantized_encoder.py compares them with its own.
VECTORS = LayerVectors._fields
PRODUCTS = LayerProducts._fields
PRODUCT_TENSORS = Matrix._fields


def _layers(
    vectors: Sequence[torch.Tensor], product_tensors: Sequence[Sequence[torch.Tensor]]
) -> list[tuple[LayerVectors, LayerProducts]]:
    """Each distinct layer's vectors and products, from the lists that `quantized_encoder_fwd` is given."""
    matrices = list(itertools.starmap(Matrix, zip(*product_tensors, strict=True)))
    own, products = len(VECTORS), len(PRODUCTS)
    return [
        (
            LayerVectors(*vectors[own * i : own * (i + 1)]),
            LayerProducts(*matrices[products * i : products * (i + 1)]),
        )
        for i in range(len(vectors) // own)
    ]


def quantized_encoder_fwd(
    hidden: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    integers: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    sums: Sequence[torch.Tensor],
    rescales: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    layer_indices: Sequence[int],
    cu_seqlens: torch.Tensor,
    wanted_rows: torch.Tensor | None,
    cu_wanted: torch.Tensor | None,
    sequence_order: torch.Tensor | None,
    max_seqlen: int,
    max_wanted: int,
    num_heads: int,
    softmax_scale: float,
    eps: float,
    act: str,
) -> torch.Tensor:
    """The hidden states after all layers.

    Args:
        hidden: (T, H) bfloat16.
        vectors: of each distinct layer in turn, the fields of `LayerVectors`.
        integers, scales, sums, rescales, shifts: of each distinct layer in turn, those of its `PRODUCTS`; see `Matrix`.
        layer_indices: which distinct layer runs at each step.
        cu_seqlens: (B + 1,) int32.
        wanted_rows, cu_wanted: (Tq,) int64 and (B + 1,) int32, the rows that the caller wants of the last layer; None: all.
        sequence_order: (B,) int32, the sequences, longest first, or None.
        max_seqlen, max_wanted: upper bounds on a sequence's tokens and on its wanted rows.
        num_heads, softmax_scale, eps, act: as for the operator.

    Returns:
        (T, H) or (Tq, H), bfloat16.

    Raises:
        ValueError: H or I above 16384, or a head size above 256.
    """
    width, dtype = hidden.shape[1], integers[0].dtype
    if wanted_rows is not None:
        # They are not checked before the launches, and an index outside would end the CUDA context.
        wanted_rows = wanted_rows.clamp(0, max(len(hidden) - 1, 0))
    layers = _layers(vectors, (integers, scales, sums, rescales, shifts))
    _, first = layers[layer_indices[0]]
    narrow, wide = first.qkv.integers.shape[1], first.ffn_output.integers.shape[1]
    rounded: Rounded | None = round_rows(hidden, first.qkv.rescales, first.qkv.shifts, dtype, narrow)
    for step, index in enumerate(layer_indices):
        assert rounded is not None  # the previous step rounded it
        (own, products), is_last = layers[index], step + 1 == len(layer_indices)
        if is_last and wanted_rows is not None and cu_wanted is not None:
            q = quantized_product(rounded.take(wanted_rows), products.qkv.channels(0, width), own.qkv_bias[:width])
            keys_values = quantized_product(rounded, products.qkv.channels(width, 3 * width), own.qkv_bias[width:])
            k, v = keys_values.split(width, dim=1)
            hidden, cu_queries, max_queries = hidden.index_select(0, wanted_rows), cu_wanted, max_wanted
        else:
            q, k, v = quantized_product(rounded, products.qkv, own.qkv_bias).split(width, dim=1)
            cu_queries, max_queries = cu_seqlens, max_seqlen
        batch = (cu_queries, cu_seqlens, sequence_order, max_queries, max_seqlen)
        context, _ = attention_fwd(q, k, v, *batch, num_heads, softmax_scale)
        dense, ffn, ffn_output = products.dense, products.ffn, products.ffn_output
        rounded = round_rows(context, dense.rescales, dense.shifts, dtype, narrow)
        product, norm = quantized_product(rounded, dense), (own.norm_weight, own.norm_bias)
        attended, rounded = add_layer_norm_rounded(
            product, own.dense_bias, hidden, *norm, eps, ffn.rescales, ffn.shifts, dtype, narrow
        )
        assert rounded is not None  # there was a rescale
        up = quantized_product(rounded, ffn)
        rounded = bias_gelu_rounded(up, own.ffn_bias, act, ffn_output.rescales, ffn_output.shifts, dtype, wide)
        down, norm = quantized_product(rounded, ffn_output), (own.full_norm_weight, own.full_norm_bias)
        next_qkv = None if is_last else layers[layer_indices[step + 1]][1].qkv
        rescale, shift = (None, None) if next_qkv is None else (next_qkv.rescales, next_qkv.shifts)
        hidden, rounded = add_layer_norm_rounded(
            down, own.ffn_output_bias, attended, *norm, eps, rescale, shift, dtype, narrow
        )
    return hidden
