"""gelu_layer_norm: LayerNorm(act(x + bias)), the middle of the MLM head, one pass over memory.

Moves 2 T E elements and 8 T bytes of statistics. Rows are short (E = 128), so a program holds many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import (
    ACT_CODES,
    COMPILER_OPTIONS,
    activate,
    layer_norm_rows,
    load_row_vector,
    program_rows,
    round_to,
    row_tiles,
    rows_contiguous,
)


@triton.jit(do_not_specialize=["n_rows"])
def _gelu_layer_norm_fwd_kernel(
    x_ptr,  # (T, E), rows `stride_x_row` elements apart
    bias_ptr,  # (E,)
    weight_ptr,  # (E,)
    ln_bias_ptr,  # (E,)
    out_ptr,  # (T, E), contiguous
    mean_ptr,  # (T,) float32
    rstd_ptr,  # (T,) float32
    n_rows,  # T
    n_cols,  # E
    stride_x_row,
    eps,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, row_mask, mask = program_rows(n_rows, n_cols, BLOCK_M, BLOCK_N)

    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    # act(0) = 0, so what lies outside the mask adds nothing to the sums.
    z = activate(x + load_row_vector(bias_ptr, cols, n_cols), ACT)

    normalised, mean, rstd = layer_norm_rows(z, mask, n_cols, eps)
    out = normalised * load_row_vector(weight_ptr, cols, n_cols) + load_row_vector(ln_bias_ptr, cols, n_cols)
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


def gelu_layer_norm_fwd(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, ln_bias: torch.Tensor, eps: float, act: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm(act(x + bias)) * weight + ln_bias.

    Args:
        x: (T, E).
        bias, weight, ln_bias: (E,), in x's dtype.
        eps: added to the variance.
        act: "gelu_tanh", "gelu_erf" or "relu".

    Returns:
        out (T, E) in x's dtype; mean (T,) and rstd (T,) float32 of the normalised rows.

    Raises:
        ValueError: E above 16384.
    """
    x = rows_contiguous(x)
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block_m, block_n, num_warps = row_tiles(n_cols)
    if n_rows == 0:
        return out, mean, rstd
    with torch.cuda.device_of(x):
        _gelu_layer_norm_fwd_kernel[(triton.cdiv(n_rows, block_m),)](
            x, bias.contiguous(), weight.contiguous(), ln_bias.contiguous(), out, mean, rstd, n_rows, n_cols, x.stride(0),
            eps, ACT=ACT_CODES[act], BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out, mean, rstd
