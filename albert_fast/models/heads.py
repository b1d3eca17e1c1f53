"""ALBERT's six heads: its names and modules on the tasks of `task_models.py` (Lan et al. 2019, section 3.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers.adapters import project, project_tanh
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs
from ..layers.wanted import WantedTokens, blank_empty
from .albert import ALBERTModel
from .config import ALBERTConfig
from .head_model import HeadModel, LMParts, MLMModel
from .losses import cross_entropy
from .outputs import PreTrainingOutput
from .task_models import (
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


class ALBERTFamily(HeadModel):
    """The encoder in `albert`."""

    encoder_class: ClassVar[Any] = ALBERTModel
    albert: ALBERTModel


class MLMHead(nn.Module):
    """(N, H) -> dense and gelu_layer_norm (N, E) -> decoder, tied to the word embeddings: scores (N, V)."""

    def __init__(self, config: ALBERTConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.act = config.activation
        if config.tie_word_embeddings:
            self.decoder.weight, self.decoder.bias = word_embeddings.weight, self.bias

    def parts(self) -> LMParts:
        return LMParts(self.dense, self.LayerNorm, self.decoder, self.act, "predictions")

    def forward(self, hidden: Tensor, backend: str) -> Tensor:
        return self.parts().scores(hidden, backend)


class SOPHead(nn.Module):
    """(B, H) -> sentence order scores (B, num_labels); Google's releases have two."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return project(self.classifier, self.dropout(pooled))


class ALBERTForMaskedLM(ALBERTFamily, ForMaskedLM):
    """The encoder and a masked-language head (paper, section 3.1)."""

    def add_head(self, config: ALBERTConfig) -> None:
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)


class ALBERTForPreTraining(ALBERTFamily, MLMModel):
    """The encoder, a masked-language head and a sentence order head (paper, section 3.1)."""

    def add_head(self, config: ALBERTConfig) -> None:
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)
        self.sop_classifier = SOPHead(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        output_logits: bool = True,
    ) -> Any:
        """Scores of every word at every token, and of the order of two segments.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
                output_attentions, return_dict: as `ALBERTModel.forward` takes them.
            labels: (B, S) ids, -100 where there is nothing to predict.
            sentence_order_label: (B,), 0 where the segments are in order, 1 where they are swapped, -100 where there is
                nothing to predict. Both give a loss.
            output_logits: False gives no prediction_logits, and needs no memory for them.

        Returns:
            PreTrainingOutput: loss (), the sum of both; prediction_logits (B, S, V), zeros at padding; sop_logits (B, 2),
            or as wide as num_labels; hidden_states; attentions.

        Raises:
            As `ALBERTModel.forward`; ValueError for labels of another shape, or output_logits=False without both.
        """
        if not output_logits and (labels is None or sentence_order_label is None):
            raise ValueError("output_logits=False leaves the loss alone, which needs labels and sentence_order_label")
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        order = self.sop_classifier(encoded.pooled)
        both = labels is not None and sentence_order_label is not None
        scores, loss = self.scores_and_loss(encoded, labels if both else None, output_logits)
        if loss is not None and sentence_order_label is not None:
            loss = loss + cross_entropy(order, sentence_order_label.flatten())
        output = PreTrainingOutput(loss, None if scores is None else encoded.scatter(scores), order)
        return self.finish(output, encoded, return_dict)

    def forward_packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        return_dict: bool | None = None,
        wanted_tokens: Tensor | None = None,
        output_logits: bool = True,
    ) -> Any:
        """`forward` for a batch that holds no padding; hooks on the encoder do not run.

        Args:
            input_ids, cu_seqlens, max_seqlen, token_type_ids, position_ids, inputs_embeds: as the encoder's
                `forward_packed` takes them.
            labels: (T,) ids, -100 where there is nothing to predict. sentence_order_label: (B,), as in `forward`. Each gives
                its loss, both their sum.
            wanted_tokens: (T,) bool, such as `labels != -100`: the last layer is computed for those and each sequence's first
                token, the scores for those alone.
            output_logits: as in `forward`.

        Returns:
            PreTrainingOutput: as `forward`, with prediction_logits (T, V), or (N, V) with wanted_tokens.

        Raises:
            As the encoder's `forward_packed`; ValueError for labels of another shape, or output_logits=False without labels.
        """
        if labels is None and not output_logits:
            raise ValueError("output_logits=False leaves the loss alone, which needs labels")
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        encoded = self.encode_packed(inputs) if wanted_tokens is None else self._encode_wanted(inputs, wanted_tokens)
        order = self.sop_classifier(encoded.pooled)
        scores, loss = self.scores_and_loss(encoded, labels, output_logits)
        if sentence_order_label is not None:
            order_loss = cross_entropy(order, sentence_order_label.flatten())
            loss = order_loss if loss is None else loss + order_loss
        return self.finish(PreTrainingOutput(loss, scores, order), encoded, return_dict)

    def _encode_wanted(self, inputs: Inputs, wanted_tokens: Tensor) -> Encoded:
        """The wanted tokens' states (N, H), and the pooled first tokens, from one pass that computes the last layer for both."""
        tokens, cu_seqlens = inputs.given().shape[0], inputs.cu_seqlens
        assert cu_seqlens is not None
        WantedTokens.of(wanted_tokens).check((tokens,))
        # An empty sequence marks another token; `blank_empty` clears what is pooled for it.
        first = cu_seqlens[:-1].to(wanted_tokens.device).long().clamp(max=tokens - 1)
        computed = wanted_tokens.clone()
        computed[first] = True
        encoded = self.encode_packed(inputs, computed)
        rows = computed.cumsum(0)[first] - 1
        pooled = project_tanh(self.albert.pooler, blank_empty(encoded.hidden.index_select(0, rows), encoded.packing))
        hidden = encoded.hidden[wanted_tokens[computed]]
        return replace(encoded, wanted=WantedTokens.of(wanted_tokens), hidden=hidden, pooled=pooled)


class ALBERTForSequenceClassification(ALBERTFamily, ForSequenceClassification):
    """The encoder and a classifier of its pooled token; the last layer is computed for first tokens alone."""


class ALBERTForTokenClassification(ALBERTFamily, ForTokenClassification):
    """The encoder and a classifier of every token."""


class ALBERTForQuestionAnswering(ALBERTFamily, ForQuestionAnswering):
    """The encoder and, for every token, how likely an answer starts and ends there."""


class ALBERTForMultipleChoice(ALBERTFamily, ForMultipleChoice):
    """The encoder and one score for each of several choices, of its pooled token."""
