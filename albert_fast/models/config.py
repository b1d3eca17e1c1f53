"""ALBERT's configuration: the fields, names and defaults of Hugging Face's `AlbertConfig`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..layers.spec import LayerSpec
from ..runtime.files import read_json_object
from . import config_checks
from .config_attributes import ConfigAttributes, keeps_other_keys

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


@keeps_other_keys
@dataclass
class ALBERTConfig(ConfigAttributes):
    """The fields of config.json (Lan et al. 2019, section 3 and table 1); defaults are Hugging Face's (the xxlarge sizes).

    `ffn_output_dropout` is ours: Google's code drops out the FFN's output, Hugging Face's defines that dropout and never
    applies it; off by default, as in Hugging Face. Other keywords are accepted as transformers accepts them: they are kept
    in `extra`, can be read and set as attributes, and are written back.

    Raises:
        ValueError: a field of another type or out of its range, heads that do not divide `hidden_size`, an unknown
            activation or problem type, more layers than `config_checks` allows; the message names field and value.
    """

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout_prob: float | None = 0.1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    ffn_output_dropout: bool = False
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        id2label = None if self.id2label is None else config_checks.class_names(self.id2label)
        label2id = None if self.label2id is None else config_checks.class_numbers(self.label2id)
        config_checks.check(self)
        config_checks.check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
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
        return LayerSpec(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.layer_norm_eps,
            self.activation,
            self.attention_probs_dropout_prob,
            self.hidden_dropout_prob,
            self.hidden_dropout_prob if self.ffn_output_dropout else 0.0,
        )

    def group_indices(self) -> list[int]:
        """The group of layers that runs at each step."""
        return [self.group_of_layer(step) for step in range(self.num_hidden_layers)]

    @property
    def activation(self) -> str:
        """The kernels' name of `hidden_act`: "gelu_tanh", "gelu_erf" or "relu"."""
        return ACTIVATIONS[self.hidden_act]

    def group_of_layer(self, layer: int) -> int:
        """The group that computes `layer`: Hugging Face's rule, float rounding included (Google's differs in 36 cases)."""
        return int(layer / (self.num_hidden_layers / self.num_hidden_groups))

    @property
    def head_dropout(self) -> float:
        """The dropout probability before a head's classifier."""
        p = self.classifier_dropout_prob
        return self.hidden_dropout_prob if p is None else p

    def label(self, index: int) -> str:
        """The name of class `index`, as Hugging Face names classes without one."""
        return self.id2label[index] if self.id2label is not None and index in self.id2label else f"LABEL_{index}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ALBERTConfig:
        """From the contents of a config.json. `to_dict` gives them back without loss."""
        cls.check_model_type(values.get("model_type", cls.model_type))
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in known and key != "model_type"}
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | Path) -> ALBERTConfig:
        values = read_json_object(Path(path))
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, readable by Hugging Face's AlbertConfig."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("extra", "num_labels")
        }
        values["id2label"] = {str(key): label for key, label in (self.id2label or {}).items()}
        # Hugging Face counts classes by their names; two unnamed classes are its default.
        if (self.id2label, self.label2id) == ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}):
            del values["id2label"], values["label2id"]
        for name in ("ffn_output_dropout", "output_hidden_states", "output_attentions", "return_dict"):
            if values[name] is (name == "return_dict"):  # the default
                del values[name]
        return {**self.extra, "model_type": self.model_type, **values}

    def replace(self, **changes: Any) -> ALBERTConfig:
        """A copy with some fields, or other keys that it has, changed; names of labels that no longer fit are dropped.

        Raises:
            TypeError: a name that is neither a field nor a key; suggests the closest field.
        """
        fields = {f.name for f in dataclasses.fields(self)}
        extra = {name: changes.pop(name) for name in list(changes) if name not in fields and self.has_key(name)}
        if unknown := sorted(changes.keys() - fields):
            close = difflib.get_close_matches(unknown[0], fields, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"config has no field {', '.join(unknown)}{hint}")
        if "num_labels" in changes and "id2label" not in changes and changes["num_labels"] != self.num_labels:
            changes |= {"id2label": None, "label2id": None}
        elif "id2label" in changes and "label2id" not in changes:
            changes["label2id"] = None
        copy = dataclasses.replace(self, **changes)
        for name, value in extra.items():
            setattr(copy, name, value)
        copy.name_or_path = self.name_or_path
        return copy
