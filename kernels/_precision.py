"""How float32 operands are multiplied: exactly, or as TF32 where torch is asked for it. Read here and nowhere else."""

from __future__ import annotations

import torch


def tf32_asked_for() -> bool:
    """Whether torch's setting lets float32 products on a GPU round their operands to TF32, 10 bits of mantissa.

    The one that cuBLAS obeys, whichever way it was set: `torch.set_float32_matmul_precision`,
    `torch.backends.cuda.matmul.allow_tf32`, or `fp32_precision` of `torch.backends`, of `.cudnn` (which stands for all of
    CUDA) or of `.cuda.matmul`. This getter knows all of them; those of the first two raise where another was set.

    An operator asks when it runs, inside torch.compile and torch.export too, and its backward asks again: as in cuBLAS, a
    gradient is computed by the setting of its own time.
    """
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def multiplies_tf32(dtype: torch.dtype) -> bool:
    """Whether operands of `dtype` are multiplied as TF32 now; only float32 ever is."""
    return dtype == torch.float32 and tf32_asked_for()


def numbers_name(dtype: torch.dtype, tf32: bool) -> str:
    """The operands of a product in the tuner's keys: "bfloat16", "float32", "tf32"."""
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")
