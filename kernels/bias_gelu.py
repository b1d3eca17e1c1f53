"""bias_gelu: act(x + bias), one pass over memory.

Moves 2 T I elements and nothing else: a program covers BLOCK_M rows of BLOCK_N columns, so that the bias is read once
for all of its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import ACT_CODES, COMPILER_OPTIONS, activate, round_to, rows_contiguous

# Every I of the released models is a multiple of 512 but the tiny one's 1248.
BLOCK_N, NUM_WARPS = 512, 4


@triton.jit(do_not_specialize=["n_rows"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (T, I), rows `stride_x_row` elements apart
    bias_ptr,  # (I,)
    out_ptr,  # (T, I), contiguous
    n_rows,  # T
    n_cols,  # I
    stride_x_row,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Neighbouring programs take neighbouring columns of the same rows.
    col_blocks = tl.cdiv(n_cols, BLOCK_N)
    row_block = tl.program_id(0) // col_blocks
    col_block = tl.program_id(0) % col_blocks
    # 64 bits: T * I passes 2^31 elements in large batches.
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]

    x = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    out = activate(x + bias[None, :], ACT)
    tl.store(out_ptr + rows[:, None] * n_cols + cols[None, :], round_to(out, out_ptr.dtype.element_ty), mask=mask)


def bias_gelu_fwd(x: torch.Tensor, bias: torch.Tensor, act: str) -> torch.Tensor:
    """act(x + bias), (T, I) in x's dtype.

    Args:
        x: (T, I).
        bias: (I,), in x's dtype.
        act: "gelu_tanh", "gelu_erf" or "relu".
    """
    x = rows_contiguous(x)
    n_rows, n_cols = x.shape
    out = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_m = 16 // x.itemsize  # four 16-byte loads in flight in every thread
    grid = (triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, BLOCK_N),)
    with torch.cuda.device_of(x):
        _bias_gelu_fwd_kernel[grid](
            x, bias.contiguous(), out, n_rows, n_cols, x.stride(0),
            ACT=ACT_CODES[act], BLOCK_M=block_m, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out
