"""TF32 in tests: asks torch for it, and makes torch's own products truncate their operands as tensor cores do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))


@contextmanager
def tf32_asked_for(asked: bool = True) -> Iterator[None]:
    """Inside, torch and our kernels multiply float32 on a GPU as TF32, or exactly if `asked` is False."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if asked else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def truncated_to_tf32(x: Tensor) -> Tensor:
    """float32 `x` without the lower 13 bits of its mantissa, which a tensor core ignores."""
    return (x.view(torch.int32) & -0x2000).view(torch.float32)


class TF32Products(TorchDispatchMode):
    """Inside, torch's float32 products truncate their operands to TF32, in a backward too: the yardstick for a kernel's errors.

    This matters on a GPU, too: it is not documented whether cuBLAS truncates or rounds, and rounding errs half as much. Values
    that are already truncated do not change.
    """

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            added = len(args) - 2  # addmm and baddbmm first take what they add to the product
            factors = (truncated_to_tf32(x) if x.dtype == torch.float32 else x for x in args[added:])
            args = (*args[:added], *factors)
        return func(*args, **(kwargs or {}))
