"""Checks and holds the operands that a caller gives again in call after call: all at once, many times faster than one by one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operands import Operand, hold


class Checked(NamedTuple):
    """Operands that fit: their tensors' state then, the operands, and their addresses."""

    state: tuple[Any, ...] | None
    operands: list[Operand]
    addresses: list[int]


class KeptOperands:
    """Tensors that a caller keeps from call to call.

    The first call checks every tensor as `hold` does. Later ones compare what may change in a tensor: address, size of its
    memory, shape, strides, dtype and sign. Only where one differs are they checked one by one again. Between calls this
    object keeps no memory alive but that of the tensors. The tensors are Tensors or Parameters, of no subclass.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self.checked: Checked | None = None

    def hold(
        self, op: str, device: torch.device, expected: tuple[Any, ...], operands: Callable[[], list[Operand]]
    ) -> tuple[Any, Checked]:
        """What keeps the memory alive while it is referenced, and what was found out about the tensors.

        Args:
            expected: whatever the shapes and dtypes in `operands` depend on. operands: lists the tensors as operands.

        Raises:
            As `operands.hold`.
        """
        storages, state = _state(self._tensors, (device, *expected))
        if (checked := self.checked) is not None and state is not None and checked.state == state:
            return storages, checked
        listed = operands()
        memory = hold(op, device, listed)
        checked = Checked(state, listed, memory.addresses)
        # Addresses of dense copies, which `hold` makes of other tensors, are for this call alone.
        self.checked = checked if state is not None and memory.addresses == state[0] else None
        return memory, checked


_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")


def _state(tensors: list[Tensor], expected: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...] | None]:
    """The storages of the tensors, and all that can change in them apart from their numbers; None where one has none."""
    try:
        storages = list(map(Tensor.untyped_storage, tensors))
        return storages, (
            list(map(Tensor.data_ptr, tensors)),
            list(map(torch.UntypedStorage.nbytes, storages)),
            list(map(_SHAPE, tensors)),
            list(map(Tensor.stride, tensors)),
            list(map(_DTYPE, tensors)),
            list(map(Tensor.is_neg, tensors)),
            expected,
        )
    except (AttributeError, RuntimeError):  # a nested or sparse tensor: `hold` names it
        return [], None
