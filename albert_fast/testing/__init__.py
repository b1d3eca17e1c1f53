"""Tools for tests, benchmarks and the compile check: operator cases, tolerances, poisoned memory, the folder of real data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .case import OpCase
from .cases import ALL_CASES
from .tolerances import assert_close_calibrated

__all__ = ["ALL_CASES", "OpCase", "assert_close_calibrated", "data_dir", "poison_empty", "require_data"]


def data_dir() -> Path:
    """The folder of real data: $ALBERT_FAST_DATA, or shared/data next to the checkout; it may be missing."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return Path(os.environ.get("ALBERT_FAST_DATA", default))


def require_data(name: str) -> Path:
    """The path of `name` in `data_dir()`; if it is missing, the test is skipped with the reason."""
    import pytest

    path = data_dir() / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set ALBERT_FAST_DATA to the folder of real data")
    return path


# Bytes on either side of poisoned memory, and their value.
_MARGIN, _UNTOUCHED = 4096, 0xA5


@contextmanager
def poison_empty() -> Iterator[None]:
    """Inside, torch.empty and its relatives return NaN (floats) or the lowest number (integers), so that an element that a
    kernel forgets to write cannot pass for a result. Writes outside of these tensors are found, too.

    Raises:
        AssertionError: at the end of the block, if something was written in front of such a tensor or behind it.
    """
    whole: list[torch.Tensor] = []
    empty = torch.empty

    def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = create(*args, **kwargs)
            if type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda") and not tensor.is_pinned():
                size = tensor.untyped_storage().nbytes()
                whole.append(empty(size + 2 * _MARGIN, dtype=torch.uint8, device=tensor.device).fill_(_UNTOUCHED))
                at = _MARGIN // tensor.itemsize, tensor.size(), tensor.stride()
                tensor.set_(whole[-1].untyped_storage(), *at)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).min) if tensor.dtype != torch.bool else tensor

        return call

    with (
        mock.patch("torch.empty", poisoned(torch.empty)),
        mock.patch("torch.empty_like", poisoned(torch.empty_like)),
        mock.patch("torch.Tensor.new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield
    for memory in whole:
        assert bool((memory[:_MARGIN] == _UNTOUCHED).all()), "something was written in front of a tensor"
        assert bool((memory[-_MARGIN:] == _UNTOUCHED).all()), "something was written behind a tensor"
