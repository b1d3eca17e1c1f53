"""What the configurations of all encoder families share: checks, names of classes, config.json in and out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..layers.spec import LayerSpec
from ..runtime.files import read_json_object
from . import config_checks
from .config_attributes import ConfigAttributes

# Names in config.json -> the activation that our kernels implement.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "relu": "relu",
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


PAIR_POOLINGS = ("cls", "aligned")


def pools_pairs(config: Any) -> bool:
    """Whether a classifier pools the aligned representation of a pair: `pair_pooling` of config.json, a key of this library.

    Raises:
        ValueError: another value than "cls", the default, and "aligned".
    """
    stated = getattr(config, "pair_pooling", "cls")
    if stated not in PAIR_POOLINGS:
        raise ValueError(f"config: pair_pooling is {stated!r}; known: {', '.join(map(repr, PAIR_POOLINGS))}")
    return bool(stated == "aligned")


Config = TypeVar("Config", bound="EncoderConfig")


class EncoderConfig(ConfigAttributes):
    """Base of the families' configurations: dataclasses with the fields of config.json, Hugging Face's names and defaults.

    The attributes below exist in every family, some under another name in config.json (`attribute_map`).

    Raises:
        ValueError: a field of another type or out of its range, heads that do not divide `hidden_size`, an unknown
            activation or problem type, more layers than `config_checks` allows; the message names field and value.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    initializer_range: float
    layer_norm_eps: float
    pad_token_id: int | None
    tie_word_embeddings: bool
    num_labels: int
    id2label: dict[int, str] | None
    label2id: dict[str, int] | None
    problem_type: str | None
    output_hidden_states: bool
    output_attentions: bool
    return_dict: bool
    extra: dict[str, Any]

    def __post_init__(self) -> None:
        id2label = None if self.id2label is None else config_checks.class_names(self.id2label)
        label2id = None if self.label2id is None else config_checks.class_numbers(self.label2id)
        config_checks.check(self)
        name = "hidden_act" if "hidden_act" in self.__dataclass_fields__ else "activation"
        config_checks.check_choice(name, self.hidden_act, ACTIVATIONS)
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"config: problem_type {self.problem_type!r} is none of {PROBLEM_TYPES}")
        self.extra = dict(self.extra)  # a copy of the configuration has a dict of its own
        self._name_labels(id2label)
        if label2id is not None:
            self.label2id = label2id

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def layer_spec(self) -> LayerSpec:
        """The sizes and options of a layer."""
        raise NotImplementedError

    @property
    def word_embedding_size(self) -> int:
        """The width of the word embeddings."""
        return self.hidden_size

    @property
    def longest(self) -> int:
        """The number of tokens that there are positions for."""
        return self.max_position_embeddings

    @property
    def kernel_activation(self) -> str:
        """The kernels' name of `hidden_act`: "gelu_tanh", "gelu_erf" or "relu"."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def head_dropout(self) -> float:
        """The dropout probability before a head's classifier."""
        raise NotImplementedError

    def label(self, index: int) -> str:
        """The name of class `index`, as Hugging Face names classes without one."""
        return self.id2label[index] if self.id2label is not None and index in self.id2label else f"LABEL_{index}"

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """From the contents of a config.json. `to_dict` gives them back without loss."""
        model_type = values.get("model_type", cls.model_type)
        cls.check_model_type(model_type)
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}  # type: ignore[arg-type]
        values = {cls.attribute_map.get(key, key): value for key, value in values.items() if key != "model_type"}
        extra = {key: value for key, value in values.items() if key not in known}
        fields = {key: value for key, value in values.items() if key in known}
        return cls(**fields, extra=extra, model_type=model_type)  # type: ignore[call-arg]

    @classmethod
    def from_json_file(cls: type[Config], path: str | Path) -> Config:
        values = read_json_object(Path(path))
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, readable by Hugging Face's configuration of this family."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.name not in ("extra", "num_labels")
        }
        values["id2label"] = {str(key): label for key, label in (self.id2label or {}).items()}
        # Hugging Face counts classes by their names; two unnamed classes are its default.
        if (self.id2label, self.label2id) == ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}):
            del values["id2label"], values["label2id"]
        for name in ("ffn_output_dropout", "output_hidden_states", "output_attentions", "return_dict"):
            if values.get(name) is (name == "return_dict"):  # the default
                del values[name]
        return {**self.extra, "model_type": self.model_type, **values}

    def replace(self: Config, **changes: Any) -> Config:
        """A copy with some fields, or other keys that it has, changed; names of labels that no longer fit are dropped.

        Raises:
            TypeError: a name that is neither a field nor a key; suggests the closest field.
        """
        changes = {self.attribute_map.get(name, name): value for name, value in changes.items()}
        fields = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        extra = {name: changes.pop(name) for name in list(changes) if name not in fields and self.has_key(name)}
        if unknown := sorted(changes.keys() - fields):
            close = difflib.get_close_matches(unknown[0], fields, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"config has no field {', '.join(unknown)}{hint}")
        if "num_labels" in changes and "id2label" not in changes and changes["num_labels"] != self.num_labels:
            changes |= {"id2label": None, "label2id": None}
        elif "id2label" in changes and "label2id" not in changes:
            changes["label2id"] = None
        copy = dataclasses.replace(self, **changes)  # type: ignore[type-var]
        copy.__dict__["model_type"] = self.model_type
        for name, value in extra.items():
            setattr(copy, name, value)
        copy.name_or_path = self.name_or_path
        return copy
