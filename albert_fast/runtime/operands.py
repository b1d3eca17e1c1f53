"""Checks the tensors of an operator's call, and holds their memory while a kernel reads it by address.

An operator lists its tensors as operands: (name, tensor or None, shape, dtype). Every call of a backend checks them, whether
it comes from the public function, torch's dispatcher or a gradient. The extension gets addresses and releases the GIL: `hold`
keeps the memory alive until the call has returned, whatever another thread does to the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

# The name for errors, the tensor (None if it was left out), and the shape and dtype that the kernel reads.
Operand = tuple[str, Tensor | None, tuple[int, ...], torch.dtype]


def check(op: str, device: torch.device, operands: Iterable[Operand]) -> None:
    """Raise for the first operand whose shape, dtype or device is not what its kernel reads.

    Raises:
        ValueError: a shape, dtype or device that does not fit. TypeError: no tensor.
    """
    for operand in operands:
        _, tensor, shape, dtype = operand
        if tensor is None:
            continue
        try:
            fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
        except (AttributeError, RuntimeError):  # not a tensor, or a nested one, which has no shape
            fits = False
        if not fits:
            _raise_misfit(op, device, operand)


class Memory:
    """Addresses of a call's operands, 0 for None. Their memory stays allocated while this object is referenced."""

    __slots__ = ("_held", "addresses")

    def __init__(self, addresses: list[int], held: list[torch.UntypedStorage]) -> None:
        self.addresses, self._held = addresses, held


def hold(op: str, device: torch.device, operands: Iterable[Operand]) -> Memory:
    """Check operands as `check` does, and hold their memory, made dense, for a call that reads it by address.

    Raises:
        ValueError: as `check`; a tensor whose memory was released or is smaller than its shape. TypeError: no strided tensor.
    """
    addresses: list[int] = []
    held: list[torch.UntypedStorage] = []
    for operand in operands:
        _, tensor, shape, dtype = operand
        if tensor is None:
            addresses.append(0)
            continue
        try:
            fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
            # A lazily negated view has its numbers in memory with the wrong sign.
            dense = tensor.resolve_neg().contiguous()
            storage = dense.untyped_storage()
        except (AttributeError, RuntimeError):
            _raise_misfit(op, device, operand)
        if not fits:
            _raise_misfit(op, device, operand)
        # Sizes from the shape and dtype that were checked: another thread may have replaced the tensor's memory since.
        _append(op, operand, addresses, held, storage, int(dense.storage_offset()) * dtype.itemsize, math.prod(shape))
    return Memory(addresses, held)


def hold_rows(op: str, device: torch.device, operands: Iterable[Operand]) -> tuple[Memory, list[int]]:
    """`hold` for (T, N) tensors whose rows may be strided; also returns the strides of the rows in elements."""
    addresses: list[int] = []
    held: list[torch.UntypedStorage] = []
    strides: list[int] = []
    for operand in operands:
        _, tensor, shape, dtype = operand
        check(op, device, (operand,))
        assert tensor is not None
        try:
            rows = tensor.resolve_neg()
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            storage, stride = rows.untyped_storage(), rows.stride(0)
        except RuntimeError:
            _raise_misfit(op, device, operand)
        extent = (shape[0] - 1) * stride + shape[1] if math.prod(shape) else 0
        _append(op, operand, addresses, held, storage, int(rows.storage_offset()) * dtype.itemsize, extent)
        strides.append(stride)
    return Memory(addresses, held), strides


def _append(
    op: str,
    operand: Operand,
    addresses: list[int],
    held: list[torch.UntypedStorage],
    storage: torch.UntypedStorage,
    begin: int,
    elements: int,
) -> None:
    if elements:
        _check_room(op, operand, storage, begin + elements * operand[3].itemsize)
    addresses.append(storage.data_ptr() + begin)
    held.append(storage)


def _check_room(op: str, operand: Operand, storage: torch.UntypedStorage, end: int) -> None:
    """ValueError if `storage` ends before byte `end`: FSDP, for example, releases the memory of tensors that are in use."""
    if storage.nbytes() < end or storage.data_ptr() == 0:
        name, _, shape, dtype = operand
        raise ValueError(
            f"{op}: the memory of {name} {tuple(shape)} in {dtype} was released: {end} bytes are read, its storage has "
            f"{storage.nbytes()}"
        )


def check_launch(op: str, backend: str, device: torch.device, operands: Iterable[Operand]) -> None:
    """`check`; and ValueError for a tensor whose memory was released, or a lazily negated one on a GPU's backend."""
    check(op, device, operands)
    for operand in operands:
        name, tensor, shape, dtype = operand
        if tensor is None:
            continue
        try:
            negated, storage, strides = tensor.is_neg(), tensor.untyped_storage(), tensor.stride()
        except RuntimeError:
            _raise_misfit(op, device, operand)
        if backend in ("triton", "cuda") and negated:
            raise ValueError(f"{op}: {name} is lazily negated: {name}.resolve_neg() has its numbers in memory")
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape):
            _check_room(op, operand, storage, (int(tensor.storage_offset()) + last + 1) * dtype.itemsize)


def _raise_misfit(op: str, device: torch.device, operand: Operand) -> NoReturn:
    name, tensor, shape, dtype = operand
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a nested one or one of layout {tensor.layout}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, other tensors on {device}; all must be on one device")
    raise ValueError(
        f"{op}: expected {name} of shape {tuple(shape)} in {dtype}, got {tuple(tensor.shape)} in {tensor.dtype}"
    )


def matrix(op: str, name: str, x: Tensor, width: str = "width") -> tuple[int, int]:
    """The sizes of the floating-point matrix `x`.

    Raises:
        TypeError: no tensor, or numbers that are not floating-point. ValueError: not two dimensions.
    """
    if not isinstance(x, Tensor) or x.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"{op}: expected {name} of shape (tokens, {width}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating-point, got {x.dtype}")
    return x.shape[0], x.shape[1]


def check_choice(op: str, name: str, value: str, known: Iterable[str]) -> None:
    """ValueError if `value` is not one of `known`."""
    if value not in known:
        raise ValueError(f"{op}: unknown {name} {value!r}; known: {', '.join(known)}")


def head_size(op: str, width: int, num_heads: int) -> int:
    """Columns of each head.

    Raises:
        ValueError: fewer than one head, no columns, or a width that is not a multiple of num_heads. TypeError: no integer.
    """
    if isinstance(num_heads, float):
        raise TypeError(f"{op}: num_heads must be an integer, got {num_heads!r}")
    if num_heads < 1 or width < 1:
        raise ValueError(f"{op}: num_heads and the number of columns must be at least 1, got {num_heads} and {width}")
    if width % num_heads:
        raise ValueError(f"{op}: {width} columns are not a multiple of num_heads = {num_heads}")
    return width // num_heads
