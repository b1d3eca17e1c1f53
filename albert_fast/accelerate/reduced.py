"""A copy of a stack's layers in fewer bits, for inference; the model keeps its own parameters for all else."""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.layer import Layer
from ..quantization.rounding import ROUNDED
from ..runtime import dispatch
from ..runtime.derived import Snapshot
from .families import Family
from .view import StackView, Unsupported

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *FLOATS, *ROUNDED)
CHANGED = "the weights changed after they were copied in {}: call accelerate again"


@dataclass(frozen=True)
class _Known:
    """What was found out about some weights.

    view: of the model's layers; None before the first call. reason: why the copy does not serve them; None where it does.
    """

    weights: Snapshot
    view: weakref.ref[StackView] | None
    reason: str | None = None

    def holds(self, weights: Sequence[Tensor], view: StackView) -> bool:
        """Whether these are those weights. A new view means that modules were replaced, perhaps by adapters merged since."""
        return (self.view is None or self.view() is view) and self.weights.holds(weights)


class ReducedLayers:
    """The layers of a stack in bfloat16, float16, integers or float8, and what shows whether they are still those of the model.

    Args:
        layers: a view whose modules are copies.
    """

    def __init__(self, layers: StackView, precision: str, source: list[Tensor]) -> None:
        self.layers, self.precision = layers, precision
        self._known: _Known | None = _Known(Snapshot(source), None)
        self._digest = _digest(source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # addresses mean nothing elsewhere

    @property
    def dtype(self) -> torch.dtype:
        """The type of the hidden states."""
        norm: nn.LayerNorm = self.layers.distinct()[0].attention.LayerNorm
        return norm.weight.dtype

    def why_not(self, stack: nn.Module, view: StackView, hidden: Tensor) -> str | None:
        """Why the model's own parameters must run for states such as `hidden`, with `view` of the model's layers."""
        if stack.training or view.modes.any_training():
            return "the model is in training mode"
        prepared = view.prepared(view.distinct())
        if not prepared.plain:
            return f"a Linear was replaced after the layers were copied in {self.precision}"
        weights = prepared.weights()
        if torch.is_grad_enabled() and (hidden.requires_grad or any(weight.requires_grad for weight in weights)):
            return f"a gradient may be asked for, and {self.precision} layers have none: call it under torch.no_grad()"
        return self._changed(weights, view) or self._follow(hidden.device)

    def _changed(self, weights: Sequence[Tensor], view: StackView) -> str | None:
        """The reason where the weights are not those that were copied; it is found out once for each change."""
        known = self._known
        if known is None or not known.holds(weights, view):
            seen = Snapshot(weights)
            reason = None if _digest(weights) == self._digest else CHANGED.format(self.precision)
            known = self._known = _Known(seen, weakref.ref(view), reason)
        elif known.view is None:
            known = self._known = replace(known, view=weakref.ref(view))
        return known.reason

    def _follow(self, device: torch.device) -> str | None:
        """Move to the device where the model is now."""
        if next(self.layers.parameters()).device == device:
            return None
        if self.precision in ROUNDED:
            if (reason := dispatch.why_not_quantized(self.precision, device, "auto")) is not None:
                return reason
            self.layers.to(device, dispatch.quantized_dtype(self.precision, device.type))
        else:
            self.layers.to(device)
        return None


def source_of(view: StackView) -> list[Tensor]:
    """Every parameter of the layers that `view` holds."""
    return [weight for layer in view.distinct() for weight in layer.weights()]


def float_layers(stack: nn.Module, family: Family, precision: str) -> ReducedLayers:
    """The layers of `stack` in bfloat16 or float16."""
    view = plain_view(stack, family)
    source = source_of(view)
    copied = copy.deepcopy(view).to(FLOATS[precision]).requires_grad_(False)
    return ReducedLayers(copied, precision, source)


def plain_view(stack: nn.Module, family: Family) -> StackView:
    """A view of `stack` that nothing else uses, and that refers to nothing but the modules of the layers.

    Raises:
        Unsupported: layers with adapters or other replaced Linears, which cannot be copied.
    """
    view = StackView(stack, family)
    if not all(map(Layer.is_plain, view.distinct())):
        raise Unsupported("fewer bits need plain Linears: merge adapters, and remove parametrisations and hooks, first")
    view.modes.forget()
    return view


@torch.no_grad()
def _digest(weights: Sequence[Tensor]) -> bytes:
    """A hash of all weights' bytes; it does not depend on the device."""
    found = hashlib.blake2b()
    for weight in weights:
        found.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()
