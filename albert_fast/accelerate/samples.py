"""Rounds the layers of a transformers model to integers, calibrated on texts or batches that the model itself embeds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters import project
from ..layers.packing import Packing
from ..quantization.calibration import quantize
from ..runtime import dispatch
from .families import Family
from .plans import at_the_stack
from .reduced import ReducedLayers, plain_view, source_of
from .view import StackView

_BATCH = 16
_SIZES = ("vocab_size", "max_position_embeddings")


class _Embedder:
    """Adapts a transformers model to `calibration.Encoder`: sizes, the layers, and the layers' input for ids."""

    def __init__(self, owner: nn.Module, stack: nn.Module, family: Family, view: StackView) -> None:
        self._owner, self._stack, self._family, self.encoder = owner, stack, family, view
        config: Any = owner.config
        # Roberta counts positions from behind the pad token.
        padding = getattr(getattr(owner, "embeddings", None), "padding_idx", None)
        self._longest = config.max_position_embeddings - (0 if padding is None else padding + 1)
        self.config = SimpleNamespace(vocab_size=config.vocab_size, longest=self._longest)

    def check_length(self, columns: int) -> None:
        """ValueError for a sequence that is too long."""
        if columns > self._longest:
            raise ValueError(f"calibration: a sequence of {columns} tokens, the model takes {self._longest}: cut it")

    def embed_ids(self, packing: Packing, ids: Tensor) -> Tensor:
        """The first layer's input (T, H) for ids (B, S)."""

        def look(*args: Any, **kwargs: Any) -> Any:
            return args[0] if args else next(kwargs[name] for name in self._family.hidden_names if name in kwargs)

        packed = packing.gather(at_the_stack(self._owner, self._stack, {"input_ids": ids}, look))
        return packed if self._family.first is None else project(getattr(self._stack, self._family.first), packed)


def rounded_layers(
    owner: nn.Module | None, stack: nn.Module, family: Family, precision: str, calibration: Any, tokenizer: Any
) -> ReducedLayers:
    """The layers of `stack` in "int8", "int16" or "fp8".

    Args:
        owner: the model around the stack, which turns ids into the stack's input; None where there is none.
        calibration: texts, or batches as `quantization.calibration.Calibration`; None: int8 is fitted to random ids.
        tokenizer: for texts; None where the model has none.

    Raises:
        BackendUnavailableError: this device cannot. TypeError, ValueError: a calibration that cannot be used; an owner
        that takes no ids.
    """
    if owner is None or not _takes_ids(owner):
        raise ValueError(
            f"precision={precision!r}: calibration needs the model of transformers around the layers, which turns ids into "
            f"their input: {type(stack).__name__} is {'alone' if owner is None else f'in a {type(owner).__name__}'}"
        )
    view = plain_view(stack, family)
    source = source_of(view)
    device = source[0].device
    dispatch.check_quantized(precision, device, "auto")
    fast, reason = dispatch.quantized_kernels(precision, device.type, "auto")
    if not fast:
        warnings.warn(f"albert_fast: precision={precision!r} runs {reason}", stacklevel=4)
    for layer in view.distinct():  # the others are replaced by rounded ones
        for holder, name in ((layer, "full_layer_layer_norm"), (layer.attention, "LayerNorm")):
            setattr(holder, name, copy.deepcopy(getattr(holder, name)).requires_grad_(False))
    embedder = _Embedder(owner, stack, family, view)
    with _in_eval(owner), torch.no_grad():
        quantize(embedder, precision, _batches(calibration, tokenizer, embedder), "auto")
    view.to(dispatch.quantized_dtype(precision, device.type))
    return ReducedLayers(view, precision, source)


def _takes_ids(owner: nn.Module) -> bool:
    """Whether `owner` has the sizes that calibration reads, and can be called with ids."""
    config = getattr(owner, "config", None)
    parameters = signature(owner.forward).parameters.values()
    takes = any(parameter.name == "input_ids" or parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters)
    return takes and all(isinstance(getattr(config, name, None), int) for name in _SIZES)


def _batches(calibration: Any, tokenizer: Any, embedder: _Embedder) -> Any:
    """Texts as batches; batches as they are."""
    if isinstance(calibration, str):
        raise TypeError("calibration: expected a list of texts, got one text")
    if calibration is None or isinstance(calibration, (Tensor, dict)) or not isinstance(calibration, Iterable):
        return calibration  # `quantize` says what is wrong
    listed = calibration if isinstance(calibration, tuple) else list(calibration)
    if not listed or not all(isinstance(text, str) for text in listed):
        return listed
    if tokenizer is None:
        raise TypeError("calibration: this model has no tokenizer for texts: give a list of what its tokenizer returns")
    longest = min(embedder.config.longest, getattr(tokenizer, "model_max_length", None) or 10**9)
    return [
        dict(tokenizer(listed[i : i + _BATCH], padding=True, truncation=True, max_length=longest, return_tensors="pt"))
        for i in range(0, len(listed), _BATCH)
    ]


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
