"""ALBERT's configuration: the fields, names and defaults of Hugging Face's `AlbertConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..checkpoints.families import ALBERT
from ..layers.spec import LayerSpec
from .config_attributes import keeps_other_keys
from .encoder_config import EncoderConfig


@keeps_other_keys
@dataclass
class ALBERTConfig(EncoderConfig):
    """The fields of config.json (Lan et al. 2019, section 3 and table 1); defaults are Hugging Face's (the xxlarge sizes).

    `ffn_output_dropout` is ours: Google's code drops out the FFN's output, Hugging Face's defines that dropout and never
    applies it; off by default, as in Hugging Face. Other keywords are accepted as transformers accepts them: they are kept
    in `extra`, can be read and set as attributes, and are written back.

    Raises:
        ValueError: a field of another type or out of its range, heads that do not divide `hidden_size`, an unknown
            activation or problem type, more layers than `config_checks` allows; the message names field and value.
    """

    model_type: ClassVar[str] = ALBERT.model_type

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

    def layer_spec(self) -> LayerSpec:
        """The sizes and options of a layer."""
        return LayerSpec(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.layer_norm_eps,
            self.kernel_activation,
            self.attention_probs_dropout_prob,
            self.hidden_dropout_prob,
            self.hidden_dropout_prob if self.ffn_output_dropout else 0.0,
        )

    def group_indices(self) -> list[int]:
        """The group of layers that runs at each step."""
        return [self.group_of_layer(step) for step in range(self.num_hidden_layers)]

    def group_of_layer(self, layer: int) -> int:
        """The group that computes `layer`: Hugging Face's rule, float rounding included (Google's differs in 36 cases)."""
        return int(layer / (self.num_hidden_layers / self.num_hidden_groups))

    @property
    def head_dropout(self) -> float:
        """The dropout probability before a head's classifier."""
        p = self.classifier_dropout_prob
        return self.hidden_dropout_prob if p is None else p

    @property
    def activation(self) -> str:
        """Another name of `kernel_activation`."""
        return self.kernel_activation

    @property
    def word_embedding_size(self) -> int:
        return self.embedding_size
