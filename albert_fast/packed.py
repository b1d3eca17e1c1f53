"""Copies of weights in the layout of the C++ products, made on first use and again when the weights change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_SAMPLES = 64


@dataclass(frozen=True)
class _Packed:
    """A packed copy, and what tells whether the weights are still those that it was made from."""

    memory: Tensor
    versions: tuple[tuple[int, int], ...]
    samples: tuple[Tensor, ...]

    def is_current(self, weights: Sequence[Tensor]) -> bool:
        # Writes through `.data` leave the version as it is; some elements are compared for those.
        return self.versions == _versions(weights) and all(map(torch.equal, map(_sample, weights), self.samples))


def _versions(weights: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)


def _sample(weight: Tensor) -> Tensor:
    return weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLES)]


class PackedWeights:
    """Packed copies by the first of the weights that each is made from, for as long as that weight lives."""

    def __init__(self) -> None:
        self._copies = WeakIdKeyDictionary()

    def get(self, weights: Sequence[Tensor], pack: Callable[[], Tensor]) -> Tensor:
        """The packed copy of `weights`; `pack` makes it where there is none, or where the weights have changed."""
        found: _Packed | None = self._copies.get(weights[0])
        if found is None or not found.is_current(weights):
            # Noted before the copy is made: a write in between must look like a change.
            versions, samples = _versions(weights), tuple(_sample(w).clone() for w in weights)
            found = _Packed(pack(), versions, samples)
            self._copies[weights[0]] = found
        return found.memory

    def forget(self, weight: Tensor) -> None:
        """Let go of the copy whose first weight is `weight`."""
        self._copies.pop(weight, None)
