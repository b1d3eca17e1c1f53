"""BERT (Devlin et al. 2018): its configuration, names, modules and heads on the machinery that all families share.

Same modules, same parameters and same numbers as Hugging Face's `Bert*` classes. RoBERTa and ELECTRA have the same layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints.families import BERT
from ..layers.adapters import project
from ..layers.attention import Attention
from ..layers.embeddings import Embeddings
from ..layers.inputs import Inputs, PackedInputs
from ..layers.layer import PLAIN_PARTS, Layer
from ..layers.single_layers import Named, SingleLayers
from ..layers.spec import LayerSpec
from .config_attributes import keeps_other_keys
from .encoder_config import EncoderConfig
from .encoder_model import EncoderModel
from .head_model import HeadModel, LMParts, MLMModel
from .losses import cross_entropy
from .outputs import BERTPreTrainingOutput
from .task_models import (
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


class BERTLikeConfig(EncoderConfig):
    """What BERT's, RoBERTa's and ELECTRA's configurations share beside their fields."""

    type_vocab_size: int
    classifier_dropout: float | None

    def check_others(self) -> None:
        for name, known in (
            ("is_decoder", False),
            ("add_cross_attention", False),
            ("position_embedding_type", "absolute"),
        ):
            if self.extra.get(name, known) not in (known, None):
                raise ValueError(f"config: {name} = {self.extra[name]!r} is not supported; known: {known!r}")

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
            self.hidden_dropout_prob,
        )

    @property
    def head_dropout(self) -> float:
        p = self.classifier_dropout
        return self.hidden_dropout_prob if p is None else p


@keeps_other_keys
@dataclass
class BERTConfig(BERTLikeConfig):
    """The fields of config.json; defaults are Hugging Face's (BERT-base uncased).

    Other keywords are accepted as transformers accepts them: they are kept in `extra`, can be read and set as attributes, and
    are written back.

    Raises:
        ValueError: as `EncoderConfig`; a decoder, cross-attention, relative positions.
    """

    model_type: ClassVar[str] = BERT.model_type

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict, repr=False)


class BERTAttention(Attention):
    """Query, key and value in `self`, the output projection and its LayerNorm in `output`."""

    def build(self, spec: LayerSpec) -> None:
        width = spec.hidden_size
        self.add_module("self", Named({name: nn.Linear(width, width) for name in ("query", "key", "value")}))
        norm = nn.LayerNorm(width, eps=spec.layer_norm_eps)
        self.output = Named({"dense": nn.Linear(width, width), "LayerNorm": norm})

    query = property(lambda self: self._modules["self"].query)
    key = property(lambda self: self._modules["self"].key)
    value = property(lambda self: self._modules["self"].value)
    dense = property(lambda self: self.output.dense)
    LayerNorm = property(lambda self: self.output.LayerNorm)


class BERTLayer(Layer):
    """A layer under Hugging Face's names: attention, intermediate, output."""

    plain_types: ClassVar[tuple[type[nn.Module], ...]]

    def build(self, spec: LayerSpec) -> None:
        width, middle = spec.hidden_size, spec.intermediate_size
        self.attention = BERTAttention(spec)
        self.intermediate = Named({"dense": nn.Linear(width, middle)})
        norm = nn.LayerNorm(width, eps=spec.layer_norm_eps)
        self.output = Named({"dense": nn.Linear(middle, width), "LayerNorm": norm})

    up = property(lambda self: self.intermediate.dense)
    down = property(lambda self: self.output.dense)
    norm = property(lambda self: self.output.LayerNorm)

    def place_ffn(self, up: nn.Module, down: nn.Module) -> None:
        self.intermediate.dense, self.output.dense = up, down


BERTLayer.plain_types = (BERTLayer, BERTAttention, Named, *PLAIN_PARTS)


class BERTModel(EncoderModel):
    """BERT's encoder on fused operators.

    Args:
        config: a BERTConfig.
        add_pooling_layer: whether `pooler_output` is computed.
        backend: "auto", or one backend's name for every operator that has it.
    """

    family = BERT
    config_class: ClassVar[type[EncoderConfig]] = BERTConfig
    base_model_prefix = BERT.attribute

    def __init__(self, config: Any, add_pooling_layer: bool = True, *, backend: str = "auto") -> None:
        super().__init__(config, backend)
        self.embeddings = self.make_embeddings(config)
        self.encoder = SingleLayers(config.layer_spec(), [BERTLayer] * config.num_hidden_layers)
        width = config.hidden_size
        self.pooler = Named({"dense": nn.Linear(width, width)}) if add_pooling_layer else None
        self.init_weights()

    def make_embeddings(self, config: Any) -> Embeddings:
        """The embedding tables."""
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        return Embeddings(
            rows, config.hidden_size, config.layer_norm_eps, config.pad_token_id, config.hidden_dropout_prob
        )

    def embedded(self, tokens: PackedInputs, types: Tensor) -> Tensor:
        out: Tensor = self.embeddings(tokens, types, self.execution_state.backend)
        return out

    def pooling(self) -> nn.Module | None:
        linear: nn.Module | None = None if self.pooler is None else self.pooler.dense
        return linear


class BERTFamily(HeadModel):
    """The encoder in `bert`."""

    family = BERT
    config_class: ClassVar[type[EncoderConfig]] = BERTConfig
    base_model_prefix = BERT.attribute
    prefix = BERT.prefix
    encoder_class: ClassVar[Any] = BERTModel


class BERTPredictions(nn.Module):
    """(N, H) -> dense and gelu_layer_norm (N, H) -> decoder, tied to the word embeddings: scores (N, V)."""

    def __init__(self, config: BERTConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        width = config.hidden_size
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Named({"dense": nn.Linear(width, width), "LayerNorm": norm})
        self.decoder = nn.Linear(width, config.vocab_size)
        self.act = config.kernel_activation
        if config.tie_word_embeddings:
            self.decoder.weight, self.decoder.bias = word_embeddings.weight, self.bias

    def parts(self) -> LMParts:
        transform: Any = self.transform
        return LMParts(transform.dense, transform.LayerNorm, self.decoder, self.act, "cls.predictions")

    def forward(self, hidden: Tensor, backend: str) -> Tensor:
        return self.parts().scores(hidden, backend)


class BERTForMaskedLM(BERTFamily, ForMaskedLM):
    """The encoder and a masked-language head (section 3.1)."""

    def add_head(self, config: BERTConfig) -> None:
        words = self.base_model.embeddings.word_embeddings
        self.cls = Named({"predictions": BERTPredictions(config, words)})


class BERTForPreTraining(BERTFamily, MLMModel):
    """The encoder, a masked-language head and a next sentence head (section 3.1)."""

    def add_head(self, config: BERTConfig) -> None:
        words = self.base_model.embeddings.word_embeddings
        order = nn.Linear(config.hidden_size, 2)
        self.cls = Named({"predictions": BERTPredictions(config, words), "seq_relationship": order})

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        output_logits: bool = True,
    ) -> Any:
        """Scores of every word at every token, and of whether the second segment follows the first.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
                output_attentions, return_dict: as the encoder's `forward` takes them.
            labels: (B, S) ids, -100 where there is nothing to predict.
            next_sentence_label: (B,), 0 where the second segment follows the first, 1 where it does not. Both give a loss.
            output_logits: False gives no prediction_logits, and needs no memory for them.

        Returns:
            BERTPreTrainingOutput: loss (), the sum of both; prediction_logits (B, S, V), zeros at padding;
            seq_relationship_logits (B, 2); hidden_states; attentions.

        Raises:
            As the encoder's `forward`; ValueError for labels of another shape, or output_logits=False without both.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        if not output_logits and (labels is None or next_sentence_label is None):
            raise ValueError("output_logits=False leaves the loss alone, which needs labels and next_sentence_label")
        assert encoded.pooled is not None
        cls: Any = self.cls
        order = project(cls.seq_relationship, encoded.pooled)
        both = labels is not None and next_sentence_label is not None
        scores, loss = self.scores_and_loss(encoded, labels if both else None, output_logits)
        if loss is not None and next_sentence_label is not None:
            loss = loss + cross_entropy(order, next_sentence_label.flatten())
        output = BERTPreTrainingOutput(loss, None if scores is None else encoded.scatter(scores), order)
        return self.finish(output, encoded, return_dict)


class BERTForSequenceClassification(BERTFamily, ForSequenceClassification):
    """The encoder and a classifier of its pooled token; the last layer is computed for first tokens alone."""


class BERTForTokenClassification(BERTFamily, ForTokenClassification):
    """The encoder and a classifier of every token."""


class BERTForQuestionAnswering(BERTFamily, ForQuestionAnswering):
    """The encoder and, for every token, how likely an answer starts and ends there."""


class BERTForMultipleChoice(BERTFamily, ForMultipleChoice):
    """The encoder and one score for each of several choices, of its pooled token."""
