"""The layers of a transformers model as our `Layer`s, which hold the very modules of that model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.attention import Attention
from ..layers.layer import Layer
from ..layers.spec import LayerSpec
from ..layers.stack import LayerGroup, LayerStack
from .families import DROPOUTS, NORMS, PRODUCTS, Family, act_name, at


class Unsupported(Exception):
    """Our layers do not compute what a stack computes; the message says why."""


class ViewGroup(LayerGroup):
    """Layers that run one after another: one, but for ALBERT's inner groups."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(layers)

    def layers(self) -> list[Layer]:
        return list(self.inner)  # type: ignore[arg-type]


class StackView(LayerStack):
    """A stack of layers whose Linears and LayerNorms are those of `stack`, a module of transformers.

    It is not a part of that module. Moved or trained parameters are seen, because the modules are the same ones; when a
    module is replaced, a new view is made.

    Raises:
        Unsupported: a layer that ours do not compute.
    """

    def __init__(self, stack: nn.Module, family: Family) -> None:
        groups = [_layers_of(group, family) for group in _modules_at(stack, family.groups)]
        sources = [layer for group in groups for layer in group]
        sizes, specs = {len(group) for group in groups}, {_spec(layer, family) for layer in sources}
        if len(sizes) != 1 or len(specs) != 1:
            raise Unsupported("its layers differ in size or activation" if sources else "it has no layers")
        spec = specs.pop()
        super().__init__(spec, _group_indices(stack, family, len(groups)), sizes.pop())
        adapted = [ViewGroup([_adapted(layer, family, spec) for layer in group]) for group in groups]
        self.own_groups = nn.ModuleList(adapted)
        self._distinct = [layer for group in adapted for layer in group.layers()]
        self.modes = Modes(sources, family)
        for module in (self, *adapted, *self._distinct, *(layer.attention for layer in self._distinct)):
            module.training = False  # not `eval`, which would reach the model's own modules

    def groups(self) -> list[ViewGroup]:
        return list(self.own_groups)  # type: ignore[arg-type]

    def distinct(self) -> list[Layer]:
        return self._distinct

    def take_modes(self, training: bool) -> None:
        """Take over the modes and dropout probabilities of the model's own modules, which may change between calls."""
        training = training or self.modes.any_training()
        if not training and not self.training:
            return
        self.training = training
        for layer, (probs, hidden, ffn) in zip(self._distinct, self.modes.probabilities(), strict=True):
            attention = layer.attention
            layer.training = attention.training = training
            attention.probs_dropout_p, attention.dropout_p, layer.dropout_p = probs, hidden, ffn


class Modes:
    """Reads from the model's own layers what may change between calls: dropout, and whether the backward recomputes."""

    def __init__(self, layers: list[nn.Module], family: Family) -> None:
        self._layers = layers
        self._dropouts = [
            [at(layer, family.parts[name]) if name in family.parts else None for name in DROPOUTS] for layer in layers
        ]

    def forget(self) -> None:
        """Refer to no layer any more, for a view that only runs in eval mode."""
        self._layers, self._dropouts = [], []

    def any_training(self) -> bool:
        return any(module is not None and module.training for dropouts in self._dropouts for module in dropouts)

    def drops_all(self) -> bool:
        """Whether a dropout leaves nothing; operators scale by 1 / (1 - p)."""
        return any(probability >= 1 for one in self.probabilities() for probability in one)

    def probabilities(self) -> list[list[float]]:
        """For each layer, those of the dropouts in DROPOUTS that are to be applied."""
        return [
            [0.0 if module is None or not module.training else float(module.p) for module in dropouts]
            for dropouts in self._dropouts
        ]

    def recomputes(self, stack: nn.Module) -> bool:
        """Whether `gradient_checkpointing_enable` was called; it marks the stack or the layers."""
        return any(getattr(module, "gradient_checkpointing", False) for module in (stack, *self._layers))


def _modules_at(module: nn.Module, path: str) -> list[nn.Module]:
    return list(at(module, path))


def _layers_of(group: nn.Module, family: Family) -> list[nn.Module]:
    if family.inner is None:
        return [group]
    _check_wrapper(group, {family.inner}, "a group of layers", family)
    return _modules_at(group, family.inner)


def _group_indices(stack: nn.Module, family: Family, groups: int) -> list[int]:
    """The group that runs at each step, as the stack's forward counts."""
    if family.inner is None:
        return list(range(groups))
    config: Any = stack.config
    steps: int = config.num_hidden_layers
    return [int(step / (steps / groups)) for step in range(steps)]


def _spec(layer: nn.Module, family: Family) -> LayerSpec:
    """Sizes of a layer of the model.

    Raises:
        Unsupported: our layer does not compute what it computes.
    """
    if getattr(layer, "is_decoder", False) or hasattr(layer, "crossattention"):
        raise Unsupported("it is a decoder (config.is_decoder): its attention is causal, or reads other states")
    for path, names in _children(family).items():
        module = at(layer, path) if path else layer
        kind = getattr(module, "position_embedding_type", None) or "absolute"
        if kind != "absolute":
            raise Unsupported(f"position_embedding_type={kind!r} adds to the attention scores")
        _check_wrapper(module, names, path or "a layer", family)
    parts = {name: at(layer, family.parts[name]) for name in (*PRODUCTS, *NORMS)}
    for name in PRODUCTS:
        if not all(isinstance(getattr(parts[name], size, None), int) for size in ("in_features", "out_features")):
            raise Unsupported(f"{family.parts[name]} is a {type(parts[name]).__name__}, not a Linear")
    for name in NORMS:
        if type(parts[name]) is not nn.LayerNorm or parts[name].bias is None:
            raise Unsupported(f"{family.parts[name]} is a {type(parts[name]).__name__}, not a LayerNorm with a bias")
    width, inner, heads = parts["ffn"].in_features, parts["ffn"].out_features, at(layer, family.heads)
    if any(parts[name].out_features != width for name in ("query", "key", "value")):
        raise Unsupported("attention is narrower than the layer: heads were pruned")
    if width % heads:
        raise Unsupported(f"{heads} heads do not divide {width} columns")
    activation = at(layer, family.act)
    if (act := act_name(activation)) is None:
        shown = getattr(activation, "__name__", type(activation).__name__)
        raise Unsupported(f"no kernel computes the activation {shown}")
    epsilons = {parts[name].eps for name in NORMS}
    if len(epsilons) != 1:
        raise Unsupported("the two LayerNorms of a layer differ in epsilon")
    return LayerSpec(width, inner, heads, epsilons.pop(), act)


def _children(family: Family) -> dict[str, set[str]]:
    """The names of the parts that our layer knows, of every module on a path to one, by that module's path."""
    found: dict[str, set[str]] = {}
    for path in (*family.parts.values(), family.act, *family.ignored):
        names = path.split(".")
        for depth, name in enumerate(names):
            found.setdefault(".".join(names[:depth]), set()).add(name)
    return found


def _check_wrapper(module: nn.Module, names: set[str], where: str, family: Family) -> None:
    """Unsupported where `module` has a part that our layer would not run, or a forward that is not transformers' own."""
    if unknown := sorted(set(module._modules) - names):
        raise Unsupported(f"{where} has a part that is not known: {unknown[0]}")
    if type(module).forward.__module__ != family.module:
        raise Unsupported(f"{where} was replaced by a {type(module).__name__}")


def _adapted(source: nn.Module, family: Family, spec: LayerSpec) -> Layer:
    """A Layer that holds the modules of `source`."""
    with torch.device("meta"):  # its own parameters are thrown away
        layer = Layer(spec)
    attention: Attention = layer.attention
    for name in (*PRODUCTS, *NORMS):
        owner = layer if name in layer._modules else attention
        owner._modules[name] = at(source, family.parts[name])
    return layer
