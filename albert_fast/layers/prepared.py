"""Finds out once, and checks at each call, whether a stack's layers are plain, and lists their weights.

A stack of twelve layers has 200 modules and tensors. To walk through them as a tree takes longer than to run two tokens, so they
are kept in flat lists, which are compared in C: every change to the tree, its parameters or its hooks is still noticed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import ops

_HOOKS = tuple(
    operator.itemgetter(name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)


class Prepared:
    """What is known of some layers; a copy of a model begins without it.

    plain: whether they compute what the encoder operators do: see `Layer.is_plain`. weights: those that `ops.encoder` reads, where
    all of them are plain Tensors or Parameters.
    """

    def __init__(self, layers: Sequence[Any] = (), groups: Sequence[nn.Module] = ()) -> None:
        modules = [*groups, *(module for layer in layers for module in layer.modules())]
        self._attributes = [module.__dict__ for module in modules]
        hooked = _hooked(self._attributes)
        self._layers = [] if hooked else list(layers)  # without layers it is never current: hooks may be removed
        self.plain = not hooked and bool(layers) and all(layer.is_plain() for layer in layers)
        self._weights: ops.EncoderWeights | None = None
        if hooked:
            return
        self._modules = modules
        self._types = list(map(type, modules))
        self._children = [module._modules for module in modules]
        self._parameters = [module._parameters for module in modules]
        self._tree, self._tensors = _values(self._children), _values(self._parameters)
        self._counts = list(map(len, self._children))

    def is_current(self, layers: Sequence[Any]) -> bool:
        """Whether nothing was replaced, added or hooked since, so that `plain` and `weights` hold."""
        return (
            bool(self._layers)
            and _same(layers, self._layers)
            and not _hooked(self._attributes)
            and list(map(type, self._modules)) == self._types
            and list(map(len, self._children)) == self._counts
            and _same(_values(self._children), self._tree)
            and _same(_values(self._parameters), self._tensors)
        )

    def weights(self) -> Sequence[Tensor]:
        """The weights of the layers, in the order of `ops.encoder`."""
        if self._weights is None:
            weights = [weight for layer in self._layers for weight in layer.weights()]
            if not all(type(weight) in (Tensor, nn.Parameter) for weight in weights):
                return weights
            self._weights = ops.EncoderWeights(weights)
        return self._weights

    def __deepcopy__(self, _memo: Any) -> Prepared:
        return Prepared()

    def __reduce__(self) -> Any:
        return Prepared, ()


def _hooked(attributes: list[dict[str, Any]]) -> bool:
    """Whether a module has hooks, or a forward of its own: `adapters.is_hooked` of all of them."""
    replaced = map(operator.contains, attributes, itertools.repeat("forward"))
    return any(any(map(hooks, attributes)) for hooks in _HOOKS) or any(replaced)


def _values(dictionaries: list[dict[str, Any]]) -> list[Any]:
    """The values of all dictionaries, one after another."""
    return list(itertools.chain.from_iterable(map(dict.values, dictionaries)))


def _same(found: Sequence[Any], known: Sequence[Any]) -> bool:
    return len(found) == len(known) and all(map(operator.is_, found, known))
