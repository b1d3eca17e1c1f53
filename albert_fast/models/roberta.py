"""RoBERTa (Liu et al. 2019), XLM-RoBERTa and CamemBERT: BERT's layers with other positions and heads.

A token's position is pad_token_id + 1 + its rank among the ids of its row that are not the pad token; the pad token's is
pad_token_id. Same modules, parameters and numbers as Hugging Face's `Roberta*`, `XLMRoberta*` and `Camembert*` classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.families import ROBERTA
from ..layers.adapters import project, project_tanh
from ..layers.embeddings import Embeddings
from ..layers.inputs import Inputs
from .bert import BERTLikeConfig, BERTModel
from .config_attributes import keeps_other_keys
from .encoder_config import EncoderConfig
from .head_model import HeadModel, LMParts
from .task_models import (
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


@keeps_other_keys
@dataclass
class RoBERTaConfig(BERTLikeConfig):
    """The fields of config.json, of model_type "roberta", "xlm-roberta" or "camembert"; defaults are Hugging Face's RoBERTa's.

    Other keywords are accepted as transformers accepts them: they are kept in `extra`, can be read and set as attributes, and
    are written back.

    Raises:
        ValueError: as `EncoderConfig`; a decoder, cross-attention, relative positions, no pad_token_id.
    """

    model_type: ClassVar[str] = ROBERTA.model_type
    other_model_types: ClassVar[tuple[str, ...]] = ("xlm-roberta", "camembert")

    vocab_size: int = 50265
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
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.max_position_embeddings - 1:
            raise ValueError(
                f"config: pad_token_id must be a position below max_position_embeddings - 1 = "
                f"{self.max_position_embeddings - 1}, from which positions count, got {self.pad_token_id!r}"
            )

    @property
    def longest(self) -> int:
        return self.max_position_embeddings - 1 - int(self.pad_token_id or 0)


class RoBERTaModel(BERTModel):
    """RoBERTa's encoder on fused operators.

    Args:
        config: a RoBERTaConfig.
        add_pooling_layer: whether `pooler_output` is computed.
        backend: "auto", or one backend's name for every operator that has it.
    """

    family = ROBERTA
    config_class: ClassVar[type[EncoderConfig]] = RoBERTaConfig
    base_model_prefix = ROBERTA.attribute
    positions_are_columns = False

    def make_embeddings(self, config: RoBERTaConfig) -> Embeddings:
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        pad = config.pad_token_id
        return Embeddings(rows, config.hidden_size, config.layer_norm_eps, pad, config.hidden_dropout_prob, pad)

    def positions(self, inputs: Inputs) -> Tensor:
        """(B, S) or (T,), as `RobertaEmbeddings.create_position_ids_from_input_ids` counts them; from inputs_embeds, in which the
        pad token cannot be seen, as the columns count."""
        pad = self.config.pad_token_id
        if inputs.input_ids is None:
            return super().positions(inputs) + (pad + 1)
        real = (inputs.input_ids != pad).long()
        if inputs.cu_seqlens is None:
            return real.cumsum(1) * real + pad
        before = F.pad(real.cumsum(0), (1, 0))  # the tokens in front of each, the pad token not counted
        lengths = inputs.cu_seqlens.diff().long()
        begins = before[inputs.cu_seqlens[:-1].long()]
        return (before[1:] - torch.repeat_interleave(begins, lengths, output_size=len(real))) * real + pad


class RoBERTaFamily(HeadModel):
    """The encoder in `roberta`."""

    family = ROBERTA
    config_class: ClassVar[type[EncoderConfig]] = RoBERTaConfig
    base_model_prefix = ROBERTA.attribute
    prefix = ROBERTA.prefix
    encoder_class: ClassVar[Any] = RoBERTaModel


class RoBERTaLMHead(nn.Module):
    """(N, H) -> dense and gelu_layer_norm (N, H) -> decoder, tied to the word embeddings: scores (N, V)."""

    def __init__(self, config: RoBERTaConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        width = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.vocab_size)
        if config.tie_word_embeddings:
            self.decoder.weight, self.decoder.bias = word_embeddings.weight, self.bias

    def parts(self) -> LMParts:
        # GELU, whatever hidden_act is, as in Hugging Face.
        return LMParts(self.dense, self.layer_norm, self.decoder, "gelu_erf", "lm_head")

    def forward(self, hidden: Tensor, backend: str) -> Tensor:
        return self.parts().scores(hidden, backend)


class RoBERTaForMaskedLM(RoBERTaFamily, ForMaskedLM):
    """The encoder and a masked-language head."""

    def add_head(self, config: RoBERTaConfig) -> None:
        self.lm_head = RoBERTaLMHead(config, self.base_model.embeddings.word_embeddings)


class FirstTokenHead(nn.Module):
    """(B, H) of first tokens -> dropout, dense, activation, dropout, out_proj: scores (B, num_labels)."""

    def __init__(self, config: EncoderConfig, act: str) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.act = act

    def forward(self, first: Tensor) -> Tensor:
        first = self.dropout(first)
        x = project_tanh(self.dense, first) if self.act == "tanh" else F.gelu(project(self.dense, first))
        return project(self.out_proj, self.dropout(x))


class RoBERTaForSequenceClassification(RoBERTaFamily, ForSequenceClassification):
    """The encoder and a classifier of each sequence's first token; the last layer is computed for these alone."""

    pools_first = True

    def add_head(self, config: EncoderConfig) -> None:
        self.classifier = FirstTokenHead(config, "tanh")

    def scores(self, pooled: Any) -> Tensor:
        logits: Tensor = self.classifier(pooled)
        return logits


class RoBERTaForTokenClassification(RoBERTaFamily, ForTokenClassification):
    """The encoder and a classifier of every token."""


class RoBERTaForQuestionAnswering(RoBERTaFamily, ForQuestionAnswering):
    """The encoder and, for every token, how likely an answer starts and ends there."""


class RoBERTaForMultipleChoice(RoBERTaFamily, ForMultipleChoice):
    """The encoder and one score for each of several choices, of its pooled token."""
