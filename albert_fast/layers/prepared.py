"""Finds out once, and checks at each call, whether a stack's layers are plain, and lists their weights.

Like the modules (see `watched`), parameters and buffers are kept in flat lists, so that every change to them is noticed in
microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import ops
from .watched import Watched, same, values


class Prepared:
    """What is known of some layers; a copy of a model begins without it.

    plain: whether they compute what the encoder operators do: see `Layer.is_plain`.
    """

    def __init__(self, layers: Sequence[Any] = (), groups: Sequence[nn.Module] = ()) -> None:
        self._watched = Watched([*groups, *(module for layer in layers for module in layer.modules())])
        hooked = self._watched.is_hooked()
        self._layers = [] if hooked else list(layers)  # without layers it is never current: hooks may be removed
        self.plain = not hooked and bool(layers) and all(layer.is_plain() for layer in layers)
        self._held = [held for module in self._watched.modules for held in (module._parameters, module._buffers)]
        self._tensors = values(self._held)
        self._weights: ops.EncoderWeights | None = None
        self._quantized: ops.QuantizedWeights | None = None

    def is_current(self, layers: Sequence[Any]) -> bool:
        """Whether nothing was replaced, added or hooked since, so that `plain` and `weights` hold."""
        return (
            bool(self._layers)
            and same(layers, self._layers)
            and not self._watched.is_hooked()
            and self._watched.is_current()
            and same(values(self._held), self._tensors)
        )

    def weights(self) -> Sequence[Tensor]:
        """The weights of the layers, in the order of `ops.encoder`: EncoderWeights where all are plain Tensors or Parameters."""
        if self._weights is None:
            weights = [weight for layer in self._layers for weight in layer.weights()]
            if not _all_plain(weights):
                return weights
            self._weights = ops.EncoderWeights(weights)
        return self._weights

    def quantized(self) -> ops.QuantizedLayers:
        """The tensors of rounded layers: QuantizedWeights where all are plain Tensors or Parameters."""
        if self._quantized is None:
            layers = quantized_layers(self._layers)
            if not all(map(_all_plain, layers)):
                return layers
            self._quantized = ops.QuantizedWeights(*layers)
        return self._quantized

    def __deepcopy__(self, _memo: Any) -> Prepared:
        return Prepared()

    def __reduce__(self) -> Any:
        return Prepared, ()


def quantized_layers(layers: Sequence[Any]) -> ops.QuantizedLayers:
    """The tensors of rounded layers, as `ops.quantized_encoder` reads them."""
    vectors = [vector for layer in layers for vector in layer.vectors()]
    tensors = [linear.tensors() for layer in layers for linear in layer.products()]
    return ops.QuantizedLayers(vectors, *map(list, zip(*tensors, strict=True)))


def _all_plain(tensors: Sequence[Any]) -> bool:
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
