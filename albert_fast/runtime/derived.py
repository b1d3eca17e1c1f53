"""Keeps copies of weights in another layout until the weights change: packed matrices; query, key and value as one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")
_SAMPLES = 64


@dataclass(frozen=True)
class _Kept(Generic[Made]):
    """A result made from weights, and what shows whether the weights are unchanged."""

    made: Made
    versions: tuple[tuple[int, int], ...]
    samples: tuple[Tensor, ...]

    def is_current(self, weights: Sequence[Tensor]) -> bool:
        # A write through `.data` does not change the version, so some elements are compared too.
        return self.versions == _versions(weights) and all(map(torch.equal, map(_sample, weights), self.samples))


_ALL: weakref.WeakSet[Derived[Any]] = weakref.WeakSet()


class Derived(Generic[Made]):
    """Caches `make(weights)`: calls it for new weights, and again after the weights have changed.

    The weights are contiguous tensors of any shape on a CPU, where comparing some of their elements costs microseconds.
    A result lives as long as the first of its weights.
    """

    def __init__(self, make: Callable[[Sequence[Tensor]], Made]) -> None:
        self._make = make
        self._kept = WeakIdKeyDictionary()
        _ALL.add(self)

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, weights: Sequence[Tensor]) -> Made:
        found: _Kept[Made] | None = self._kept.get(weights[0])
        if found is None or not found.is_current(weights):
            # Recorded before the weights are read: after a write in between, the next call makes the copy again.
            versions, samples = _versions(weights), tuple(_sample(weight).clone() for weight in weights)
            with torch.inference_mode(False), torch.no_grad():  # so that calls in any mode can use it
                found = _Kept(self._make(weights), versions, samples)
            self._kept[weights[0]] = found
        return found.made

    def forget(self, weights: Sequence[Tensor]) -> None:
        """Drop the copy; the next call makes it again."""
        self._kept.pop(weights[0], None)


def forget(weights: Iterable[Tensor]) -> None:
    """Drop every copy whose first weight is one of these; the next calls make them again."""
    for weight in weights:
        for derived in _ALL:
            derived.forget([weight])


def _versions(weights: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)


def _sample(weight: Tensor) -> Tensor:
    count = weight.numel()
    step = max(1, count // _SAMPLES)
    return weight.as_strided((-(-count // step),), (step,))
