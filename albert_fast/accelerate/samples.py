"""Rounds the layers of a transformers model to integers, calibrated on texts or batches that the model itself embeds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters import project
from ..layers.packing import Packing
from ..quantization.calibration import calibration_batches, quantize
from ..runtime import dispatch
from ..runtime.modes import mode
from ..runtime.user_warnings import warn_user
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
        self._longest = positions(owner)
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
        calibration: texts, pairs of texts, or batches as `quantization.calibration.Calibration`; None: int8 is fitted to
            random ids.
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
        warn_user(f"albert_fast: precision={precision!r} runs {reason}")
    for layer in view.distinct():  # the others are replaced by rounded ones
        for holder, name in ((layer, "full_layer_layer_norm"), (layer.attention, "LayerNorm")):
            setattr(holder, name, copy.deepcopy(getattr(holder, name)).requires_grad_(False))
    embedder = _Embedder(owner, stack, family, view)
    with mode(owner, training=False), torch.no_grad():
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
    """Texts or pairs of texts as batches; batches as they are."""
    if isinstance(calibration, str):
        raise TypeError("calibration: expected a list of texts, got one text")
    if calibration is None:
        return None
    several = isinstance(calibration, Iterable) and not isinstance(calibration, (Tensor, Mapping, tuple))
    listed = list(calibration) if several else calibration
    if not isinstance(listed, (list, tuple)) or not any(isinstance(text, str) or _is_pair(text) for text in listed):
        try:
            return list(calibration_batches(listed))
        except TypeError as error:
            raise TypeError(f"{error}. Where the model has a tokenizer, also texts or pairs of two texts") from None
    if tokenizer is None:
        raise TypeError("calibration: this model has no tokenizer for texts: give a list of what its tokenizer returns")
    return [
        _tokenized(listed[i : i + _BATCH], tokenizer, embedder.config.longest, "calibration")
        for i in range(0, len(listed), _BATCH)
    ]


def _is_pair(text: Any) -> bool:
    return isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(one, str) for one in text)


def _tokenized(texts: Sequence[Any], tokenizer: Any, longest: int, what: str) -> dict[str, Tensor]:
    """A batch of texts, or of pairs of them, cut to `longest` tokens.

    Raises:
        TypeError: neither; the message says so of `what`.
    """
    pairs = [_is_pair(text) for text in texts]
    if any(pairs) != all(pairs) or not all(
        pair or isinstance(text, str) for text, pair in zip(texts, pairs, strict=True)
    ):
        kinds = " and ".join(sorted({type(text).__name__ for text in texts}))
        raise TypeError(f"{what}: expected texts, or pairs of two texts, in one list; got {kinds}")
    columns: Any = [list(column) for column in zip(*texts, strict=True)] if all(pairs) else [list(texts)]
    longest = min(longest, getattr(tokenizer, "model_max_length", None) or 10**9)
    return dict(tokenizer(*columns, padding=True, truncation=True, max_length=longest, return_tensors="pt"))


def call_arguments(owner: nn.Module, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments by which `explain` calls `owner`, a model of transformers.

    Args:
        given: as `explain` got them; `input_ids` may be ids (B, S), a text, a list of texts or of pairs of them.

    Raises:
        TypeError: anything else, or texts where `tokenizer` is None.
    """
    found = given["input_ids"]
    if isinstance(found, Tensor) or (found is None and isinstance(given.get("inputs_embeds"), Tensor)):
        return given
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, (list, tuple)) or not found or not (isinstance(found[0], str) or _is_pair(found[0])):
        raise TypeError(f"explain: expected texts, or what the model's tokenizer returns, got {type(found).__name__}")
    if tokenizer is None:
        raise TypeError(
            "explain: this model has no tokenizer for texts: give what its tokenizer returns, explain(model, **batch)"
        )
    device, longest = next(owner.parameters()).device, positions(owner)
    batch = _tokenized(found, tokenizer, longest, "explain")
    return {**given, **{name: value.to(device) for name, value in batch.items()}}


def positions(owner: nn.Module) -> int:
    """Tokens of the longest sequence that a model of transformers takes."""
    config: Any = owner.config
    # Roberta counts positions from behind the pad token.
    padding = getattr(getattr(owner, "embeddings", None), "padding_idx", None)
    return int(config.max_position_embeddings - (0 if padding is None else padding + 1))
