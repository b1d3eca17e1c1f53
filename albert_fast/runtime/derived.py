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
    versions: tuple[tuple[int, int, int], ...]
    places: tuple[tuple[tuple[int], tuple[int]], ...]  # sizes and strides of the samples
    samples: tuple[Tensor, ...]

    def is_current(self, weights: Sequence[Tensor]) -> bool:
        # A write through `.data` does not change the version, so some elements are compared too.
        if self.versions != _versions(weights):
            return False
        return all(
            torch.equal(weight.as_strided(*where), sample)
            for weight, where, sample in zip(weights, self.places, self.samples, strict=True)
        )


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
            versions, places = _versions(weights), tuple(map(_place, weights))
            samples = tuple(w.as_strided(*where).clone() for w, where in zip(weights, places, strict=True))
            with torch.inference_mode(False), torch.no_grad():  # so that calls in any mode can use it
                found = _Kept(self._make(weights), versions, places, samples)
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


def _versions(weights: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    return tuple([(w.data_ptr(), w.numel(), 0 if w.is_inference() else w._version) for w in weights])


def _place(weight: Tensor) -> tuple[tuple[int], tuple[int]]:
    """Size and stride of a sample of a contiguous tensor: elements that are evenly spread over it."""
    count = weight.numel()
    step = max(1, count // _SAMPLES)
    return (-(-count // step),), (step,)
