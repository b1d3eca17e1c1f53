"""linear_gelu: act(x @ weight.T + bias), the FFN's first product with its activation, by the fastest of three routes.

1. cuBLASLt with bias and activation in its epilogue: the tanh form of GELU. Only for inference, because it does not keep the
   sums before the activation, which a gradient needs; and only in 16 bits, because the accuracy of its tanh is not documented.
   (It also has a relu; what that does with NaN is not documented.)
2. cuBLASLt with the bias in its epilogue, then the kernel of bias_gelu: any activation, and the sums are in memory anyway.
3. The Triton kernel below, with any activation in its epilogue, and for a gradient the sums as a second output.

The sums are kept with the bias added, so that they are rounded once: relu's gradient depends only on the sign of a sum, and
rounding a product before its bias is added would lose the sign of a small one.

An estimate for the FFN of ALBERT-base, 32,768 x 768 x 3072 in bfloat16, from the rates of an H100's copies (3.0 TB/s) and
large products (790 TFLOP/s); it is not a measurement. The product is 155 GFLOP: 196 us. Route 2 reads and writes
the 201 MB of its output once more: 134 us on top. Route 1 adds only its epilogue, so only a better product can beat it.
Route 3 has the same traffic as route 1 and beats route 2 if its product reaches more than 60 % of cuBLAS's rate. Shared
memory bounds it: a step of 128 x 128 x 64 writes 32 KB and its two warpgroups read 48 KB, 640 cycles at 128 bytes a cycle;
the tensor cores need 512: 80 % of their rate. In float32 the product takes 2.3 ms and the pass 0.27 ms: a product on plain
FMA would have to come within 10 % of cuBLAS's rate to win that back. As TF32 the product takes 0.39 ms, half the rate on twice
the bytes: the same proportions as in 16 bits.

Without tuning the choice is: 1 where it is allowed; 2 for a gradient and in exact float32; 3 for the erf form and relu in 16
bits, and for every activation in TF32.
On a CPU, in Triton's interpreter, only 3 is used: there torch's function for 1 has the erf form of GELU.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import _tuning
from ._common import ACT_CODES, COMPILER_OPTIONS, activate, round_to, rows_contiguous
from ._matmul import halves, in_words, matmul_tiles, n_tiles, tile_of_program, tile_product
from ._precision import multiplies_tf32, numbers_name
from .bias_gelu import bias_gelu_fwd

# The routes through libraries, in the form in which the tuner stores them in its file, next to tiles of the Triton kernel.
CUBLASLT_EPILOGUE = {"cublaslt_epilogue": 1}
CUBLASLT_THEN_BIAS_GELU = {"cublaslt_then_bias_gelu": 1}


@triton.jit(do_not_specialize=["n_rows"])
def _linear_gelu_fwd_kernel(
    x_ptr,  # (T, K), rows `stride_x_row` elements apart
    weight_ptr,  # (N, K), contiguous
    bias_ptr,  # (N,)
    out_ptr,  # (T, N), contiguous
    sums_ptr,  # (T, N), contiguous: x @ weight.T + bias; None if no gradient is wanted
    n_rows,  # T
    n_cols,  # N
    n_inner,  # K
    stride_x_row,
    ACT: tl.constexpr,  # a value of ACT_CODES
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    TF32: tl.constexpr,  # whether float32 is multiplied as TF32
):
    # A program takes one tile of BLOCK_M x BLOCK_N outputs.
    first_row, first_col = tile_of_program(n_rows, n_cols, BLOCK_M, BLOCK_N)
    rows, all_cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    acc = tile_product(x_ptr, weight_ptr, rows, all_cols, n_rows, n_cols, n_inner, stride_x_row, BLOCK_K, EVEN_K, TF32)
    left, right = halves(acc)
    cols = first_col + tl.arange(0, BLOCK_N // 2)
    _store_activated(left, bias_ptr, out_ptr, sums_ptr, rows, cols, n_rows, n_cols, ACT)
    _store_activated(right, bias_ptr, out_ptr, sums_ptr, rows, cols + BLOCK_N // 2, n_rows, n_cols, ACT)


@triton.jit
def _store_activated(
    acc,  # (BLOCK_M, columns) float32
    bias_ptr,  # (N,)
    out_ptr,  # (T, N), contiguous
    sums_ptr,  # (T, N), contiguous, or None
    rows,  # (BLOCK_M,) int64
    cols,  # (columns,)
    n_rows,  # T
    n_cols,  # N
    ACT: tl.constexpr,  # a value of ACT_CODES
):
    """Store act(acc + bias), and acc + bias if it is kept."""
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    at = rows[:, None] * n_cols + cols[None, :]
    sums = acc + tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    if sums_ptr is not None:
        tl.store(sums_ptr + at, round_to(sums, sums_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at, round_to(activate(sums, ACT), out_ptr.dtype.element_ty), mask=mask)


def has_tiles(n_cols: int) -> bool:
    """Whether the kernel supports this number of columns.

    Rows of the output that do not begin at whole words would be stored number by number, and the largest tile would spill.
    """
    return n_cols % 16 == 0


def linear_gelu_routes(
    n_rows: int, n_cols: int, dtype: torch.dtype, act: str, keep_sums: bool, tf32: bool = False
) -> list[_tuning.Tiles]:
    """The routes that can compute (n_rows, n_cols) outputs on a GPU, best guess first: library routes, and tiles of the kernel."""
    tiles = matmul_tiles(n_rows, n_cols, dtype, tf32) if has_tiles(n_cols) else []
    if keep_sums or (dtype == torch.float32 and not tf32):
        return [CUBLASLT_THEN_BIAS_GELU, *tiles]
    if act == "gelu_tanh" and not tf32:
        return [CUBLASLT_EPILOGUE, CUBLASLT_THEN_BIAS_GELU, *tiles]
    return [*tiles, CUBLASLT_THEN_BIAS_GELU]


def linear_gelu_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, act: str, keep_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(x @ weight.T + bias), (T, N) in x's dtype, and the argument of act, (T, N) in x's dtype, or None if it is not kept.

    Args:
        x: (T, K); rows may be strided.
        weight: (N, K), in x's dtype.
        bias: (N,), in x's dtype.
        act: "gelu_tanh", "gelu_erf" or "relu".
        keep_sums: whether to return the argument of act, which a gradient needs.
    """
    x, weight, bias = rows_contiguous(x), weight.contiguous(), bias.contiguous()
    (n_rows, n_inner), n_cols = x.shape, len(weight)
    if n_rows * n_cols == 0:
        out = x.new_empty((n_rows, n_cols))
        return out, torch.empty_like(out) if keep_sums else None
    tf32 = multiplies_tf32(x.dtype)
    start = functools.partial(start_route, x, weight, bias, act, keep_sums, tf32=tf32)
    if not x.is_cuda:
        return start(matmul_tiles(n_rows, n_cols, x.dtype, tf32)[0])

    def key() -> str:
        name = f"{act} {numbers_name(x.dtype, tf32)}"
        return f"{name} T{triton.next_power_of_2(n_rows)} K{n_inner} N{n_cols}" + (" sums" if keep_sums else "")

    with torch.cuda.device_of(x):
        routes = linear_gelu_routes(n_rows, n_cols, x.dtype, act, keep_sums, tf32)
        return start(_tuning.choose("linear_gelu_fwd", key, routes, start))


def start_route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    act: str,
    keep_sums: bool,
    route: _tuning.Tiles,
    tf32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`linear_gelu_fwd` by one of `linear_gelu_routes`, for T, N > 0 and contiguous weight, bias and rows of x.

    tf32: whether the kernel multiplies float32 as TF32; the library routes read torch's setting themselves.
    """
    if route == CUBLASLT_EPILOGUE:
        # On CUDA this is the tanh form, even if torch does not call cuBLASLt for it.
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True), None
    if route == CUBLASLT_THEN_BIAS_GELU:
        sums = torch.addmm(bias, x, weight.t())
        return bias_gelu_fwd(sums, None, act), sums if keep_sums else None
    x, weight = in_words(x), in_words(weight)
    (n_rows, n_inner), n_cols = x.shape, len(weight)
    out = x.new_empty((n_rows, n_cols))
    kept = torch.empty_like(out) if keep_sums else None
    sizes = (n_rows, n_cols, n_inner, x.stride(0))
    constants = {"ACT": ACT_CODES[act], "EVEN_K": n_inner % route["BLOCK_K"] == 0, "TF32": tf32, **route}
    grid = (n_tiles(n_rows, n_cols, route),)
    _linear_gelu_fwd_kernel[grid](x, weight, bias, out, kept, *sizes, **constants, **COMPILER_OPTIONS)
    return out, kept
