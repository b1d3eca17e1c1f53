"""ELECTRA (Clark et al. 2020): BERT's layers over embeddings that may be narrower, and heads of its own.

Same modules, same parameters and same numbers as Hugging Face's `Electra*` classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints.families import ELECTRA
from ..layers.adapters import project
from ..layers.embeddings import Embeddings, FactorisedEmbeddings
from ..layers.inputs import Inputs, PackedInputs
from ..layers.single_layers import Named, SingleLayers
from . import config_checks
from .bert import BERTLayer, BERTLikeConfig
from .config_attributes import keeps_other_keys
from .encoder_config import EncoderConfig
from .encoder_model import EncoderModel
from .head_model import HeadModel, LMParts
from .losses import binary_token_loss
from .outputs import LogitsOutput
from .roberta import FirstTokenHead
from .task_models import (
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


@keeps_other_keys
@dataclass
class ELECTRAConfig(BERTLikeConfig):
    """The fields of config.json; defaults are Hugging Face's (ELECTRA-small).

    Other keywords are accepted as transformers accepts them: they are kept in `extra`, can be read and set as attributes, and
    are written back.

    Raises:
        ValueError: as `EncoderConfig`; a decoder, cross-attention, relative positions.
    """

    model_type: ClassVar[str] = ELECTRA.model_type

    vocab_size: int = 30522
    embedding_size: int = 128
    hidden_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    summary_type: str = "first"
    summary_use_proj: bool = True
    summary_activation: str | None = "gelu"
    summary_last_dropout: float = 0.1
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

    @property
    def word_embedding_size(self) -> int:
        return self.embedding_size


class ELECTRAModel(EncoderModel):
    """ELECTRA's encoder on fused operators.

    Args:
        config: an ELECTRAConfig.
        add_pooling_layer: False; the family has no pooler.
        backend: "auto", or one backend's name for every operator that has it.

    Raises:
        ValueError: add_pooling_layer=True.
    """

    family = ELECTRA
    config_class: ClassVar[type[EncoderConfig]] = ELECTRAConfig
    base_model_prefix = ELECTRA.attribute

    def __init__(self, config: Any, add_pooling_layer: bool = False, *, backend: str = "auto") -> None:
        super().__init__(config, backend)
        if add_pooling_layer:
            raise ValueError("ELECTRA has no pooler: leave add_pooling_layer out")
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        kind: Any = Embeddings
        if config.embedding_size != config.hidden_size:
            kind = FactorisedEmbeddings
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        numbers = config.embedding_size, config.layer_norm_eps, config.pad_token_id, config.hidden_dropout_prob
        self.embeddings = kind(rows, *numbers)
        self.encoder = SingleLayers(config.layer_spec(), [BERTLayer] * config.num_hidden_layers)
        self.pooler = None
        self.init_weights()

    def embedded(self, tokens: PackedInputs, types: Tensor) -> Tensor:
        projection = (self.embeddings_project,) if "embeddings_project" in self._modules else ()
        out: Tensor = self.embeddings(tokens, types, *projection, self.execution_state.backend)
        return out


class ELECTRAFamily(HeadModel):
    """The encoder in `electra`."""

    family = ELECTRA
    config_class: ClassVar[type[EncoderConfig]] = ELECTRAConfig
    base_model_prefix = ELECTRA.attribute
    prefix = ELECTRA.prefix
    encoder_class: ClassVar[Any] = ELECTRAModel
    pools_first = True


class ELECTRAForPreTraining(ELECTRAFamily):
    """The encoder and the discriminator's head: whether each token was replaced (section 2)."""

    pools = False

    def add_head(self, config: ELECTRAConfig) -> None:
        width = config.hidden_size
        self.discriminator_predictions = Named(
            {"dense": nn.Linear(width, width), "dense_prediction": nn.Linear(width, 1)}
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """One score for every token: above 0 where it looks replaced.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
                output_attentions, return_dict: as the encoder's `forward` takes them.
            labels: (B, S), 1 where a token was replaced, 0 where not; gives a loss.

        Returns:
            LogitsOutput: loss (), binary cross-entropy, the mean over the real tokens; logits (B, S), zeros at padding;
            hidden_states; attentions.

        Raises:
            As the encoder's `forward`; ValueError for labels of another shape.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        head: Any = self.discriminator_predictions
        middle = _activated(project(head.dense, encoded.hidden), self.config.kernel_activation)
        logits = project(head.dense_prediction, middle).squeeze(-1)
        loss = None if labels is None else binary_token_loss(logits, encoded.labels(labels))
        return self.finish(LogitsOutput(loss, encoded.scatter(logits)), encoded, return_dict)


class ELECTRAForMaskedLM(ELECTRAFamily, ForMaskedLM):
    """The encoder and the generator's masked-language head."""

    def add_head(self, config: ELECTRAConfig) -> None:
        narrow = config.embedding_size
        norm = nn.LayerNorm(narrow, eps=config.layer_norm_eps)
        self.generator_predictions = Named({"LayerNorm": norm, "dense": nn.Linear(config.hidden_size, narrow)})
        self.generator_lm_head = nn.Linear(narrow, config.vocab_size)
        if config.tie_word_embeddings:
            self.generator_lm_head.weight = self.base_model.embeddings.word_embeddings.weight

    def lm_parts(self) -> LMParts:
        head: Any = self.generator_predictions
        # GELU, whatever hidden_act is, as in Hugging Face.
        return LMParts(head.dense, head.LayerNorm, self.generator_lm_head, "gelu_erf", "generator_predictions")

    def lm_scores(self, hidden: Tensor) -> Tensor:
        return self.lm_parts().scores(hidden, self.backend)


class ELECTRAForSequenceClassification(ELECTRAFamily, ForSequenceClassification):
    """The encoder and a classifier of each sequence's first token; the last layer is computed for these alone."""

    def add_head(self, config: EncoderConfig) -> None:
        self.classifier = FirstTokenHead(config, "gelu")

    def scores(self, pooled: Any) -> Tensor:
        logits: Tensor = self.classifier(pooled)
        return logits


class ELECTRAForTokenClassification(ELECTRAFamily, ForTokenClassification):
    """The encoder and a classifier of every token."""


class ELECTRAForQuestionAnswering(ELECTRAFamily, ForQuestionAnswering):
    """The encoder and, for every token, how likely an answer starts and ends there."""


class ELECTRAForMultipleChoice(ELECTRAFamily, ForMultipleChoice):
    """The encoder and one score for each of several choices, of its first token.

    Raises:
        ValueError: a configuration whose summary_type is not "first", or whose summary_activation is not "gelu".
    """

    def add_head(self, config: Any) -> None:
        config_checks.check_choice("summary_type", config.summary_type, ("first",))
        config_checks.check_choice("summary_activation", config.summary_activation, ("gelu",))
        if not config.summary_use_proj:
            raise ValueError("config: summary_use_proj must be true for multiple choice, got False")
        self.sequence_summary = Named({"summary": nn.Linear(config.hidden_size, config.hidden_size)})
        self.dropout = nn.Dropout(config.summary_last_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def scores(self, pooled: Any) -> Tensor:
        summary: Any = self.sequence_summary
        middle = torch.nn.functional.gelu(project(summary.summary, pooled))
        return project(self.classifier, self.dropout(middle))


def _activated(x: Tensor, act: str) -> Tensor:
    """The activation that the configuration names, of (T, H)."""
    if act == "relu":
        return x.relu()
    return torch.nn.functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
