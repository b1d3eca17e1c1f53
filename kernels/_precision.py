"""Decides how float32 operands are multiplied: exactly, or as TF32 if torch is asked for it. Only this file reads the setting."""

from __future__ import annotations

import torch


def tf32_asked_for() -> bool:
    """Whether torch's setting lets float32 products on a GPU round their operands to TF32, 10 bits of mantissa.

    This is the setting that cuBLAS obeys. There are several ways to set it: `torch.set_float32_matmul_precision`,
    `torch.backends.cuda.matmul.allow_tf32`, or `fp32_precision` of `torch.backends`, of `.cudnn` (which applies to all of
    CUDA) or of `.cuda.matmul`. The getter used here knows all of them; the getters of the first two raise if another was set.

    An operator reads the setting when it runs, inside torch.compile and torch.export too, and its backward reads it again: as in
    cuBLAS, a gradient uses the setting of the time when it is computed.
    """
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def multiplies_tf32(dtype: torch.dtype) -> bool:
    """Whether operands of `dtype` are multiplied as TF32 now; only float32 can be."""
    return dtype == torch.float32 and tf32_asked_for()


def numbers_name(dtype: torch.dtype, tf32: bool) -> str:
    """The name of a product's operands in the tuner's keys: "bfloat16", "float32", "tf32"."""
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")
