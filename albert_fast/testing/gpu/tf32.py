"""TF32 in tests: torch asked for it, and torch's own products made of factors that are cut as tensor cores cut them."""

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
    """Inside, float32 products on a GPU are TF32, for torch and for us, or exact."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if asked else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def cut_to_tf32(x: Tensor) -> Tensor:
    """float32 `x` without the lower 13 bits of its mantissa, which a tensor core ignores."""
    return (x.view(torch.int32) & -0x2000).view(torch.float32)


class TF32Products(TorchDispatchMode):
    """Inside, torch's float32 products, in a backward too, have their factors cut: the yardstick of a kernel's errors.

    On a GPU also: nobody says whether cuBLAS cuts or rounds, which errs half as much; what is cut already it leaves.
    """

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            added = len(args) - 2  # what addmm and baddbmm add to the product is no factor
            factors = (cut_to_tf32(x) if x.dtype == torch.float32 else x for x in args[added:])
            args = (*args[:added], *factors)
        return func(*args, **(kwargs or {}))
