"""Keeps copies of weights in another layout until the weights change: packed matrices; query, key and value as one."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")
_SAMPLES = 64
_VERSION = operator.attrgetter("_version")


class Snapshot:
    """Tells later, without reading all of them, whether some weights are still what they were when it was made.

    Whoever copies weights makes it before the copy: a write between the two then shows as a change.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._state = _state(weights)
        self._sizes, self._strides = zip(*[_place(weight.numel()) for weight in weights], strict=True)
        self._samples = self._sampled(weights)

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are those weights, unchanged."""
        if self._state != _state(weights):
            return False
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return True  # a graph cannot wait for numbers
        # A write through `.data` does not change the version, so some elements are compared too.
        return torch.equal(self._samples, self._sampled(weights))

    def _sampled(self, weights: Sequence[Tensor]) -> Tensor:
        """Some elements of every weight, one weight after another, (N,): all on one device, in few kernels."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._sampled(weights)
        if all(self._state[-1]):
            return torch.cat(list(map(Tensor.as_strided, weights, self._sizes, self._strides)))
        places = zip(weights, self._sizes, self._strides, strict=True)
        return torch.cat([w.as_strided(*place) if w.is_contiguous() else w.flatten() for w, *place in places])


def _state(weights: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Addresses, numbers of elements, versions, and whether each weight is contiguous. A write through `.data` changes none."""
    try:
        versions = list(map(_VERSION, weights))
    except RuntimeError:  # a tensor that was made in inference mode has none
        versions = [0 if weight.is_inference() else weight._version for weight in weights]
    addresses, counts = list(map(Tensor.data_ptr, weights)), list(map(Tensor.numel, weights))
    return addresses, counts, versions, list(map(Tensor.is_contiguous, weights))


class _Kept(NamedTuple, Generic[Made]):
    """A result made from weights, and the weights then."""

    made: Made
    weights: Snapshot


_ALL: weakref.WeakSet[Derived[Any]] = weakref.WeakSet()


class _Compared(threading.local):
    """In this thread, the results whose weights were compared in the present block of `weights_stay`; None outside of one.

    By their identities, with the objects, which keep their identities while they are held.
    """

    found: dict[tuple[int, ...], Any] | None = None


_COMPARED = _Compared()


def _key(found: Any, weights: Sequence[Tensor]) -> tuple[int, ...]:
    return (id(found), *map(id, weights))


@contextmanager
def weights_stay() -> Iterator[None]:
    """In this block, no weight changes that this thread uses: each copy is compared with its weights once, not at each call.

    A decoder uses each weight once for every token, and to compare takes as long as a product of few rows.
    """
    outer = _COMPARED.found
    _COMPARED.found = {} if outer is None else outer
    try:
        yield
    finally:
        _COMPARED.found = outer


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
        compared = _COMPARED.found
        if compared is not None and found is not None and _key(found, weights) in compared:
            return found.made
        if found is None or not found.weights.holds(weights):
            snapshot = Snapshot(weights)
            with torch.inference_mode(False), torch.no_grad():  # so that calls in any mode can use it
                found = _Kept(self._make(weights), snapshot)
            self._kept[weights[0]] = found
        if compared is not None:
            compared[_key(found, weights)] = found, weights
        return found.made

    def forget(self, weights: Sequence[Tensor]) -> None:
        """Drop the copy; the next call makes it again."""
        self._kept.pop(weights[0], None)


def forget(weights: Iterable[Tensor]) -> None:
    """Drop every copy whose first weight is one of these; the next calls make them again."""
    for weight in weights:
        for derived in _ALL:
            derived.forget([weight])


@cache
def _place(count: int) -> tuple[tuple[int], tuple[int]]:
    """Size and stride of a sample of a contiguous tensor of `count` elements: some that are evenly spread over it.

    The stride is odd, so that the elements of a matrix are not all in one column.
    """
    step = max(1, count // _SAMPLES) | 1
    return (-(-count // step),), (step,)
