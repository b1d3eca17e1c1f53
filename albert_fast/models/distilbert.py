"""DistilBERT (Sanh et al. 2019): BERT's layers under other names, without token types and without a pooler.

Same modules, same parameters and same numbers as Hugging Face's `DistilBert*` classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..checkpoints.families import DISTILBERT
from ..layers.adapters import project
from ..layers.attention import Attention, FusedQKV
from ..layers.embeddings import Embeddings
from ..layers.inputs import PackedInputs
from ..layers.layer import PLAIN_PARTS, Layer
from ..layers.packing import Packing
from ..layers.run import Run
from ..layers.single_layers import Named, SingleLayers
from ..layers.spec import LayerSpec
from ..layers.wanted import WantedRows
from .config_attributes import keeps_other_keys
from .encoder_config import EncoderConfig
from .encoder_model import EncoderModel
from .head_model import HeadModel, LMParts
from .task_models import (
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)

EPS = 1e-12  # of every LayerNorm; config.json does not have it


@keeps_other_keys
@dataclass
class DistilBERTConfig(EncoderConfig):
    """The fields of config.json; `dim`, `n_heads` and `n_layers` are also known by BERT's names. Defaults are Hugging Face's.

    `sinusoidal_pos_embds` says how the positions' table began; a checkpoint holds the table either way. Other keywords are
    accepted as transformers accepts them: they are kept in `extra`, can be read and set as attributes, and are written back.

    Raises:
        ValueError: as `EncoderConfig`.
    """

    model_type: ClassVar[str] = DISTILBERT.model_type
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    # The names by which the machinery of all families asks.
    intermediate_size = property(lambda self: self.hidden_dim)
    hidden_act = property(lambda self: self.activation)
    hidden_dropout_prob = property(lambda self: self.dropout)
    attention_probs_dropout_prob = property(lambda self: self.attention_dropout)
    layer_norm_eps = property(lambda self: EPS)

    def layer_spec(self) -> LayerSpec:
        """The sizes and options of a layer; the attention's output has no dropout."""
        sizes = self.dim, self.hidden_dim, self.n_heads
        return LayerSpec(*sizes, EPS, self.kernel_activation, self.attention_dropout, 0.0, self.dropout)

    @property
    def head_dropout(self) -> float:
        """The dropout probability before the classifier of tokens."""
        return self.dropout


class DistilBERTAttention(Attention):
    """Query, key, value and output projection; the layer holds the LayerNorm."""

    def build(self, spec: LayerSpec) -> None:
        width = spec.hidden_size
        self.q_lin, self.k_lin, self.v_lin, self.out_lin = (nn.Linear(width, width) for _ in range(4))

    query = property(lambda self: self.q_lin)
    key = property(lambda self: self.k_lin)
    value = property(lambda self: self.v_lin)
    dense = property(lambda self: self.out_lin)


class DistilBERTLayer(Layer):
    """A layer under Hugging Face's names: attention, sa_layer_norm, ffn, output_layer_norm."""

    def build(self, spec: LayerSpec) -> None:
        width, middle = spec.hidden_size, spec.intermediate_size
        self.attention = DistilBERTAttention(spec)
        self.sa_layer_norm = nn.LayerNorm(width, eps=spec.layer_norm_eps)
        self.ffn = Named({"lin1": nn.Linear(width, middle), "lin2": nn.Linear(middle, width)})
        self.output_layer_norm = nn.LayerNorm(width, eps=spec.layer_norm_eps)

    up = property(lambda self: self.ffn.lin1)
    down = property(lambda self: self.ffn.lin2)
    norm = property(lambda self: self.output_layer_norm)
    attention_norm = property(lambda self: self.sa_layer_norm)

    def place_ffn(self, up: nn.Module, down: nn.Module) -> None:
        self.ffn.lin1, self.ffn.lin2 = up, down

    def attend(
        self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run, fused: FusedQKV | None
    ) -> Tensor:
        attended: Tensor = self.attention(hidden, packing, wanted, run, fused, self.sa_layer_norm)
        return attended


DistilBERTLayer.plain_types = (DistilBERTLayer, DistilBERTAttention, Named, *PLAIN_PARTS)


class DistilBERTModel(EncoderModel):
    """DistilBERT's encoder on fused operators.

    Args:
        config: a DistilBERTConfig.
        add_pooling_layer: False; the family has no pooler.
        backend: "auto", or one backend's name for every operator that has it.

    Raises:
        ValueError: add_pooling_layer=True; a forward with token_type_ids.
    """

    family = DISTILBERT
    config_class: ClassVar[type[EncoderConfig]] = DistilBERTConfig
    base_model_prefix = DISTILBERT.attribute
    has_token_types = False

    def __init__(self, config: Any, add_pooling_layer: bool = False, *, backend: str = "auto") -> None:
        super().__init__(config, backend)
        if add_pooling_layer:
            raise ValueError("DistilBERT has no pooler: leave add_pooling_layer out")
        rows = config.vocab_size, config.max_position_embeddings, 0
        self.embeddings = Embeddings(rows, config.dim, EPS, config.pad_token_id, config.dropout)
        self.transformer = SingleLayers(config.layer_spec(), [DistilBERTLayer] * config.n_layers)
        self.pooler = None
        self.init_weights()

    @property
    def encoder(self) -> SingleLayers:  # type: ignore[override]
        """The stack of layers."""
        return self.transformer

    def embedded(self, tokens: PackedInputs, types: Tensor) -> Tensor:
        out: Tensor = self.embeddings(tokens, types, self.execution_state.backend)
        return out


class DistilBERTFamily(HeadModel):
    """The encoder in `distilbert`."""

    family = DISTILBERT
    config_class: ClassVar[type[EncoderConfig]] = DistilBERTConfig
    base_model_prefix = DISTILBERT.attribute
    prefix = DISTILBERT.prefix
    encoder_class: ClassVar[Any] = DistilBERTModel
    pools_first = True

    def add_first_token_classifier(self, config: DistilBERTConfig, classes: int) -> None:
        """pre_classifier, classifier and dropout, for the first token of each sequence."""
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, classes)
        self.dropout = nn.Dropout(config.seq_classif_dropout)

    def first_token_scores(self, first: Tensor) -> Tensor:
        """(B, H) -> (B, classes)."""
        return project(self.classifier, self.dropout(project(self.pre_classifier, first).relu()))


class DistilBERTForMaskedLM(DistilBERTFamily, ForMaskedLM):
    """The encoder and a masked-language head."""

    def add_head(self, config: DistilBERTConfig) -> None:
        self.vocab_transform = nn.Linear(config.dim, config.dim)
        self.vocab_layer_norm = nn.LayerNorm(config.dim, eps=EPS)
        self.vocab_projector = nn.Linear(config.dim, config.vocab_size)
        if config.tie_word_embeddings:
            self.vocab_projector.weight = self.base_model.embeddings.word_embeddings.weight

    def lm_parts(self) -> LMParts:
        act = self.config.kernel_activation
        return LMParts(self.vocab_transform, self.vocab_layer_norm, self.vocab_projector, act, "vocab_projector")

    def lm_scores(self, hidden: Tensor) -> Tensor:
        return self.lm_parts().scores(hidden, self.backend)


class DistilBERTForSequenceClassification(DistilBERTFamily, ForSequenceClassification):
    """The encoder and a classifier of each sequence's first token; the last layer is computed for these alone."""

    def add_head(self, config: Any) -> None:
        self.add_first_token_classifier(config, config.num_labels)

    def scores(self, pooled: Any) -> Tensor:
        return self.first_token_scores(pooled)


class DistilBERTForTokenClassification(DistilBERTFamily, ForTokenClassification):
    """The encoder and a classifier of every token."""


class DistilBERTForQuestionAnswering(DistilBERTFamily, ForQuestionAnswering):
    """The encoder and, for every token, how likely an answer starts and ends there."""

    def add_head(self, config: Any) -> None:
        super().add_head(config)
        self.dropout = nn.Dropout(config.qa_dropout)

    def span_scores(self, hidden: Tensor) -> Tensor:
        return project(self.qa_outputs, self.dropout(hidden))


class DistilBERTForMultipleChoice(DistilBERTFamily, ForMultipleChoice):
    """The encoder and one score for each of several choices, of its first token."""

    def add_head(self, config: Any) -> None:
        self.add_first_token_classifier(config, 1)

    def scores(self, pooled: Any) -> Tensor:
        return self.first_token_scores(pooled)
