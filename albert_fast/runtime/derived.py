"""Keeps copies of weights in another layout until the weights change: packed matrices; query, key and value as one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")
Versions = tuple[tuple[int, int, int], ...]
_SAMPLES = 64


@dataclass(frozen=True)
class _Kept(Generic[Made]):
    """A result made from weights, and what shows whether the weights are unchanged."""

    made: Made
    versions: Versions
    places: tuple[tuple[tuple[int], tuple[int]], ...]  # sizes and strides of the samples
    samples: tuple[Tensor, ...]

    def is_current(self, weights: Sequence[Tensor]) -> bool:
        # A write through `.data` does not change the version, so some elements are compared too.
        if self.versions != versions_of(weights):
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
            versions, places = versions_of(weights), tuple(_place(w.numel()) for w in weights)
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


def versions_of(weights: Sequence[Tensor]) -> Versions:
    """(address, elements, version) of every weight. A write through `.data` changes none of them."""
    return tuple([(w.data_ptr(), w.numel(), 0 if w.is_inference() else w._version) for w in weights])


@torch.no_grad()
def samples_of(weights: Sequence[Tensor]) -> Tensor:
    """Some elements of every weight, one weight after another, (N,): all on one device, in few kernels."""
    return torch.cat([w.as_strided(*_place(w.numel())) if w.is_contiguous() else w.flatten() for w in weights])


@cache
def _place(count: int) -> tuple[tuple[int], tuple[int]]:
    """Size and stride of a sample of a contiguous tensor of `count` elements: some that are evenly spread over it.

    The stride is odd, so that the elements of a matrix are not all in one column.
    """
    step = max(1, count // _SAMPLES) | 1
    return (-(-count // step),), (step,)
