"""What the models return: dataclasses that also read as the tuple of their fields that are set, as in Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree


@dataclass
class ModelOutput:
    """Base: `out.logits`, `out["logits"]`, `out[0]`, `tuple(out)`, `out.keys()`."""

    def keys(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, key) for key in self.keys())

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


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
class QuestionAnsweringOutput(ModelOutput):
    """loss (); start_logits and end_logits (B, S), the dtype's lowest value at padded positions."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


for _output in (BaseModelOutput, LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput):
    # torch.export and nn.DataParallel look inside results only where they are known containers.
    _pytree.register_dataclass(_output)

__all__ = ["BaseModelOutput", "LogitsOutput", "ModelOutput", "PreTrainingOutput", "QuestionAnsweringOutput"]
