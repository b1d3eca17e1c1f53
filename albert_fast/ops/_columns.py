"""Adjacent columns of one buffer: the parts of a fused projection (T, 3H), whose gradients need not be copied together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..runtime.registration import is_traced


def are_adjacent(tensors: tuple[Tensor, ...]) -> bool:
    """Whether (T, N) tensors are adjacent columns of one buffer, in this order."""
    first = tensors[0]
    return (
        first.stride(1) == 1
        and first.stride(0) >= len(tensors) * first.shape[1]
        and all(
            t.shape == first.shape
            and t.dtype == first.dtype
            and t.stride() == first.stride()
            and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and t.storage_offset() == first.storage_offset() + number * first.shape[1]
            for number, t in enumerate(tensors)
        )
    )


def empty_adjacent(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` uninitialised tensors of the shape (T, N) of `like`, adjacent columns of one buffer."""
    rows, width = like.shape
    return torch.empty((rows, count * width), dtype=like.dtype, device=like.device).split(width, dim=1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, width: int) -> tuple[Tensor, ...]:
        return x.split(width, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        first = grads[0]
        if not are_adjacent(grads):
            return torch.cat(grads, dim=1), None
        return first.as_strided((len(first), len(grads) * first.shape[1]), first.stride()), None


def split_columns(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """x (T, n * width) as n views (T, width), like `x.split(width, dim=1)`.

    torch's split concatenates the gradients of its parts, which reads and writes (T, n * width) once more in every layer.
    Here they are not copied if they are adjacent columns of one buffer already, as `attention` writes them.
    """
    # A compiler plans buffers itself, and a tensor subclass may have no address.
    if is_traced() or type(x) not in (Tensor, Parameter) or not (torch.is_grad_enabled() and x.requires_grad):
        return x.split(width, dim=1)
    parts: tuple[Tensor, ...] = _Split.apply(x, width)
    return parts
