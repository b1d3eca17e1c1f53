"""quantized_encoder: all layers of an inference on int8 or float8 products, nine launches a layer.

Between two kernels activations lie in memory rounded for the next product, one byte an element with a step and a zero point
for each row, or in bfloat16 where they are added or attended to. Sums are exact int32, or float32 of float8.

A layer moves, in bytes for each token beside the weights: 38 H + 6 I; in bfloat16, product by product with the same fusions,
36 H + 8 I. For I = 4 H these are 62 H and 68 H: the gain is the products' rate, at half the bytes of weights and twice the
operations a cycle, less what a separate pass over attention's output costs (3 H).

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
from dataclasses import dataclass

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
    sums_ptr,  # (N,) float32: the integers of each channel, added up
    bias_ptr,  # (N,) float32, or None
    out_ptr,  # (T, N), contiguous
    n_rows,  # T
    n_cols,  # N
    depth,  # D, a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, first_col = tile_of_program(n_rows, n_cols, BLOCK_M, BLOCK_N)
    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    acc = tile_product(x_ptr, weight_ptr, rows, cols, n_rows, n_cols, depth, depth, BLOCK_K, True)
    row_mask, col_mask = rows < n_rows, cols < n_cols
    if zeros_ptr is not None:
        # sum (q - zero) w = sum q w - zero sum w, exact: at most 255 x 127 x 16384, below 2^30.
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


@dataclass(frozen=True)
class Matrix:
    """A product's weights: values (N, D) int8 or float8 e4m3, 0 beyond K, scales and sums (N,) float32; rescale and shift
    (K,) of its activations.

    D, the depth, is the next multiple of 128 from K on: so that rows begin at 16 bytes, and no step of a product is partial.
    Bytes behind a mask would be loaded one by one.
    """

    values: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor
    rescale: torch.Tensor
    shift: torch.Tensor

    def channels(self, begin: int, end: int) -> Matrix:
        values, scales, sums = (t[begin:end] for t in (self.values, self.scales, self.sums))
        return Matrix(values, scales, sums, self.rescale, self.shift)


def quantized_product(x: Rounded, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product of rounded rows (T, D) with a matrix (N, D), (T, N) in bfloat16; bias: (N,) float32."""
    (n_rows, depth), n_cols = x.values.shape, len(matrix.values)
    out = torch.empty((n_rows, n_cols), dtype=torch.bfloat16, device=x.values.device)
    if n_rows == 0:
        return out

    def launch(tiles: Tiles) -> None:
        _quantized_product_kernel[(n_tiles(n_rows, n_cols, tiles),)](
            x.values, x.steps, x.zeros, matrix.values, matrix.scales, matrix.sums, bias, out, n_rows, n_cols, depth,
            **tiles, **COMPILER_OPTIONS,
        )  # fmt: skip

    key = functools.partial(_choice_key, n_rows, n_cols, depth, x.values.dtype)
    with torch.cuda.device_of(out):
        candidates = matmul_tiles(n_rows, n_cols, x.values.dtype)
        launch(_tuning.choose("quantized_product", key, candidates, launch))
    return out


def _choice_key(n_rows: int, n_cols: int, depth: int, dtype: torch.dtype) -> str:
    """What the fastest tiles depend on, beside the chip; rows by their powers of two."""
    return f"{dtype} T{triton.next_power_of_2(n_rows)} N{n_cols} K{depth}"


@dataclass(frozen=True)
class _Layer:
    """The four products of a layer and its vectors: biases (3H,), (H,), (I,), (H,) and norms (H,)."""

    vectors: Sequence[torch.Tensor]
    qkv: Matrix
    dense: Matrix
    ffn: Matrix
    ffn_output: Matrix


def quantized_encoder_fwd(
    hidden: torch.Tensor, vectors: Sequence[torch.Tensor], integers: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor], sums: Sequence[torch.Tensor], rescales: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor], order: Sequence[int], cu_seqlens: torch.Tensor, rows: torch.Tensor | None,
    cu_rows: torch.Tensor | None, schedule: torch.Tensor | None, max_seqlen: int, max_rows: int, num_heads: int,
    softmax_scale: float, eps: float, act: str,
) -> torch.Tensor:  # fmt: skip
    """The hidden states after the layers of `order`.

    Args:
        hidden: (T, H) bfloat16.
        vectors: of each distinct layer eight: the bias of query, key and value (3H,), of the attention's output (H,),
            weight and bias of its norm (H,), of the FFN's products (I,), (H,), weight and bias of the last norm (H,).
            Biases are float32, norms bfloat16.
        integers, scales, sums, rescales, shifts: of each distinct layer four, the fields of `Matrix`.
        cu_seqlens: (B + 1,) int32. rows, cu_rows: (Tq,) int64 and (B + 1,) int32, what is asked of the last layer; None: all.
        schedule: (B,) int32, the sequences, longest first, or None. max_seqlen, max_rows: bounds of a sequence's tokens
            and of its rows that are asked for.
        num_heads, softmax_scale, eps, act: as of the operator.

    Returns:
        (T, H) or (Tq, H), bfloat16.

    Raises:
        ValueError: H or I above 16384, a head size above 256.
    """
    width, dtype = hidden.shape[1], integers[0].dtype
    if rows is not None:
        # An index outside would end the CUDA context, and nobody has looked at them yet.
        rows = rows.clamp(0, max(len(hidden) - 1, 0))
    lists = zip(integers, scales, sums, rescales, shifts, strict=True)
    matrices = list(itertools.starmap(Matrix, lists))
    layers = [_Layer(vectors[8 * i : 8 * i + 8], *matrices[4 * i : 4 * i + 4]) for i in range(len(vectors) // 8)]
    first = layers[order[0]].qkv
    narrow, wide = first.values.shape[1], layers[0].ffn_output.values.shape[1]
    rounded: Rounded | None = round_rows(hidden, first.rescale, first.shift, dtype, narrow)
    for step, number in enumerate(order):
        assert rounded is not None  # by the layer before it
        layer, is_last = layers[number], step + 1 == len(order)
        qkv_bias, dense_bias, norm, norm_bias, ffn_bias, output_bias, full_norm, full_norm_bias = layer.vectors
        if is_last and rows is not None and cu_rows is not None:
            q = quantized_product(rounded.take(rows), layer.qkv.channels(0, width), qkv_bias[:width])
            keys_values = quantized_product(rounded, layer.qkv.channels(width, 3 * width), qkv_bias[width:])
            k, v = keys_values.split(width, dim=1)
            hidden, cu_queries, max_queries = hidden.index_select(0, rows), cu_rows, max_rows
        else:
            q, k, v = quantized_product(rounded, layer.qkv, qkv_bias).split(width, dim=1)
            cu_queries, max_queries = cu_seqlens, max_seqlen
        context, _ = attention_fwd(
            q, k, v, cu_queries, cu_seqlens, schedule, max_queries, max_seqlen, num_heads, softmax_scale
        )
        rounded = round_rows(context, layer.dense.rescale, layer.dense.shift, dtype, narrow)
        product = quantized_product(rounded, layer.dense)
        attended, rounded = add_layer_norm_rounded(
            product, dense_bias, hidden, norm, norm_bias, eps, layer.ffn.rescale, layer.ffn.shift, dtype, narrow
        )
        assert rounded is not None  # since there was a factor
        up = quantized_product(rounded, layer.ffn)
        rounded = bias_gelu_rounded(up, ffn_bias, act, layer.ffn_output.rescale, layer.ffn_output.shift, dtype, wide)
        down = quantized_product(rounded, layer.ffn_output)
        following = None if is_last else layers[order[step + 1]].qkv
        hidden, rounded = add_layer_norm_rounded(
            down, output_bias, attended, full_norm, full_norm_bias, eps,
            None if following is None else following.rescale, None if following is None else following.shift, dtype,
            narrow,
        )  # fmt: skip
    return hidden
