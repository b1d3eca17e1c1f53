"""The models' results: dataclasses that are also dictionaries and tuples of their set fields, as in Hugging Face."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree


class ModelOutput(OrderedDict[str, Any]):
    """Base: `out.logits`, `out["logits"]`, `out[0]`, `out.to_tuple()`, `"loss" in out`, `out.items()`, `**out`.

    A field that is None is an attribute only: keys, indices and length leave it out. Assigning to a key or to a field
    sets both. The first field may also be a mapping or (key, value) pairs, which torch's and accelerate's tools pass
    to rebuild an output. Like transformers' outputs it iterates over its keys.

    Raises:
        TypeError: an entry is removed, or added by `update` or `setdefault`.
    """

    def __post_init__(self) -> None:
        first, *others = dataclasses.fields(self)  # type: ignore[arg-type]
        given = self.__dict__[first.name]
        alone = not isinstance(given, Tensor) and all(self.__dict__[other.name] is None for other in others)
        if alone and (entries := _entries(given)) is not None:
            object.__setattr__(self, first.name, None)
            if first.name in self:
                super().__delitem__(first.name)  # Python 3.10's pop would call our own, which refuses
            for key, value in entries:
                self[key] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            if value is not None:
                super().__setitem__(name, value)
            elif name in self:
                super().__delitem__(name)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        if value is not None or key not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            super().__setitem__(key, value)
            super().__setattr__(key, value)
        else:
            setattr(self, key, value)

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), dict(self.items()))

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are set, in order."""
        return tuple(self.values())

    def __delitem__(self, key: str) -> NoReturn:
        self._refuse("lose an entry")

    def pop(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("lose an entry")

    def popitem(self, last: bool = True) -> NoReturn:
        self._refuse("lose an entry")

    def clear(self) -> NoReturn:
        self._refuse("lose an entry")

    def setdefault(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("take a default: assign to the key")

    def update(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("be updated: assign to its keys")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot {what}; dict(out) is a dictionary of your own")


def _entries(given: Any) -> list[tuple[str, Any]] | None:
    """(key, value) pairs where `given` is a mapping or holds such pairs, else None."""
    if isinstance(given, dict):
        return list(given.items())
    # A tuple of tensors is a value; only lists and generators of pairs are entries.
    if given is None or isinstance(given, (str, tuple)) or not isinstance(given, Iterable):
        return None
    pairs = list(given)
    named = all(isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
    return [(key, value) for key, value in pairs] if pairs and named else None


def _rebuilt(kind: type[ModelOutput], entries: dict[str, Any]) -> ModelOutput:
    output = kind()
    for key, value in entries.items():
        output[key] = value
    return output


@dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state (B, S, H), or (T, H) packed; pooler_output (B, H); hidden_states: a tuple of 1 + L x inner tensors
    like last_hidden_state; attentions: a tuple of L x inner tensors (B, heads, S, S)."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class LogitsOutput(ModelOutput):
    """loss (); logits: (B, num_labels), (B, S, num_labels), (B, S, V) or (B, choices) by head; None if not asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """loss (); prediction_logits (B, S, V); sop_logits (B, num_labels)."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BERTPreTrainingOutput(ModelOutput):
    """loss (); prediction_logits (B, S, V); seq_relationship_logits (B, 2)."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """loss (); start_logits and end_logits (B, S), the dtype's lowest value at padded positions."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqOutput(ModelOutput):
    """loss (); logits (B, T, V), or (Tt, V) packed; encoder_last_hidden_state (B, S, H)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


def _register(kind: type[ModelOutput]) -> None:
    """Let torch.export, DistributedDataParallel and torch.func look inside results of a class."""
    _pytree.register_pytree_node(
        kind,
        lambda output: (list(output.values()), list(output.keys())),
        lambda values, keys: _rebuilt(kind, dict(zip(keys, values, strict=True))),
        serialized_type_name=f"{kind.__module__}.{kind.__name__}",
        flatten_with_keys_fn=lambda output: (
            [(_pytree.MappingKey(key), value) for key, value in output.items()],
            list(output.keys()),
        ),
    )


for _output in (
    BaseModelOutput,
    LogitsOutput,
    PreTrainingOutput,
    BERTPreTrainingOutput,
    QuestionAnsweringOutput,
    Seq2SeqOutput,
):
    _register(_output)

__all__ = [
    "BERTPreTrainingOutput",
    "BaseModelOutput",
    "LogitsOutput",
    "ModelOutput",
    "PreTrainingOutput",
    "QuestionAnsweringOutput",
    "Seq2SeqOutput",
]
