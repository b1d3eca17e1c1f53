"""A stack whose layers all have weights of their own, under a family's names; and the containers that give parts such names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from torch import Tensor, nn

from ..runtime.registration import is_traced
from .adapters import is_hooked
from .layer import Layer
from .packing import Packing
from .run import Run
from .spec import LayerSpec
from .stack import LayerGroup, LayerStack
from .wanted import WantedRows


class Named(nn.Module):
    """Holds modules under the names that a family's checkpoints have; it computes nothing, and is never called."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *_: Any) -> NoReturn:
        raise RuntimeError("this module only names its parts: call the layer or the model")


class SingleLayer(LayerGroup):
    """A layer as a group of one."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        # Not registered: the layer's place among the modules is in its stack.
        self.__dict__["layer"] = layer

    def layers(self) -> Sequence[Layer]:
        return [self.__dict__["layer"]]


class SingleLayers(LayerStack):
    """Layers in `layer`, a ModuleList that may be cut or changed at any time.

    Args:
        spec: of every layer.
        kinds: the class of each.
    """

    def __init__(self, spec: LayerSpec, kinds: Sequence[type[Layer]]) -> None:
        super().__init__(spec, range(len(kinds)))
        self.layer = nn.ModuleList(kind(spec) for kind in kinds)
        self.__dict__["made"] = []  # the groups, not registered either

    def groups(self) -> Sequence[LayerGroup]:
        layers: list[Any] = list(self.layer._modules.values())
        made = self.__dict__["made"]
        if len(made) != len(layers) or any(
            group.__dict__["layer"] is not layer for group, layer in zip(made, layers, strict=True)
        ):
            made = [SingleLayer(layer) for layer in layers]
            self.__dict__["made"] = made
            self.group_indices, self.layer_indices = tuple(range(len(layers))), list(range(len(layers)))
        return made

    def _by_operators(self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run) -> Tensor:
        if not is_traced():
            for layer in self.layer:
                for name, module in layer.named_modules():
                    if isinstance(module, Named) and is_hooked(module):
                        _warn_of_hooks(name)
        return super()._by_operators(hidden, packing, wanted, run)


@cache
def _warn_of_hooks(name: str) -> None:
    warnings.warn(
        f"albert_fast: hooks on a layer's {name} do not run: it only names its parts, which fused operators read",
        stacklevel=3,
    )
