"""ALBERT's task heads in plain eager PyTorch, with Hugging Face's losses (Lan et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.packing import aligned_representation
from ..config import ALBERTConfig
from ..encoder_config import pools_pairs
from ..outputs import BaseModelOutput, LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput
from ..pretrained import PretrainedMixin
from .albert import ACTIVATIONS, ALBERTModel, LayerNorm, token_mask
from .losses import cross_entropy, position_loss, row_loss, token_loss


class MLMHead(nn.Module):
    """hidden states (B, S, H) -> LayerNorm(activation(Linear H to E)) -> decoder: scores (B, S, V)."""

    def __init__(self, config: ALBERTConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.LayerNorm = LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.activation = ACTIVATIONS[config.activation]
        if config.tie_word_embeddings:
            self.decoder.weight, self.decoder.bias = word_embeddings.weight, self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        scores: Tensor = self.decoder(self.LayerNorm(self.activation(self.dense(hidden_states))))
        return scores


class SOPHead(nn.Module):
    """pooled (B, H) -> sentence order scores (B, N); Google's releases have N = 2."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.dropout(pooled))
        return scores


class HeadModel(PretrainedMixin):
    """An encoder in `albert` and the task's `head(encoded, mask, labels, ...)` on top of it.

    forward: ALBERTModel's arguments and the task's labels. Labels of -100 are ignored, a mean over no label is 0.
    """

    accepts_loss_kwargs = False  # transformers' Trainer asks: the loss is the batch's own mean
    head: Callable[..., Any]

    def __init__(self, config: ALBERTConfig, add_pooling_layer: bool) -> None:
        super().__init__(config)
        self.albert = ALBERTModel(config, add_pooling_layer)

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
        **more: Any,
    ) -> Any:
        mask = token_mask(input_ids, attention_mask, inputs_embeds)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.albert(*inputs, output_hidden_states, output_attentions, True)
        encoded.pooler_output = self.pooled(encoded, mask, token_type_ids)
        output = self.head(encoded, mask, labels, **more)
        output.hidden_states, output.attentions = encoded.hidden_states, encoded.attentions
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()

    def pooled(self, encoded: BaseModelOutput, mask: Tensor, token_type_ids: Tensor | None) -> Tensor | None:
        """(B, H), what a classifier reads of each sequence."""
        return encoded.pooler_output


class ALBERTForMaskedLM(HeadModel):
    """labels (B, S) -> loss; logits (B, S, V), zeros at padding. Paper, section 3.1."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)
        self.init_weights()

    def head(self, encoded: BaseModelOutput, mask: Tensor, labels: Tensor | None) -> LogitsOutput:
        logits = self.predictions(encoded.last_hidden_state).masked_fill(~mask[..., None], 0)
        return LogitsOutput(None if labels is None else token_loss(logits, labels, mask), logits)


class ALBERTForPreTraining(HeadModel):
    """labels (B, S) and sentence_order_label (B,) -> loss, their sum, given both; prediction_logits (B, S, V) and
    sop_logits (B, N)."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__(config, add_pooling_layer=True)
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)
        self.sop_classifier = SOPHead(config)
        self.init_weights()

    def head(
        self, encoded: BaseModelOutput, mask: Tensor, labels: Tensor | None, sentence_order_label: Tensor | None = None
    ) -> PreTrainingOutput:
        prediction_logits = self.predictions(encoded.last_hidden_state).masked_fill(~mask[..., None], 0)
        sop_logits = self.sop_classifier(encoded.pooler_output)
        loss = None
        if labels is not None and sentence_order_label is not None:
            order = cross_entropy(sop_logits, sentence_order_label.flatten())
            loss = token_loss(prediction_logits, labels, mask) + order
        return PreTrainingOutput(loss, prediction_logits, sop_logits)


class ALBERTForSequenceClassification(HeadModel):
    """labels by problem_type: (B,) classes, (B,) or (B, N) numbers, or (B, N) zeros and ones; logits (B, N)."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__(config, add_pooling_layer=True)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def pooled(self, encoded: BaseModelOutput, mask: Tensor, token_type_ids: Tensor | None) -> Tensor | None:
        if not pools_pairs(self.config):
            return encoded.pooler_output
        assert encoded.last_hidden_state is not None
        assert self.albert.pooler is not None
        types = torch.zeros_like(mask) if token_type_ids is None else token_type_ids.expand_as(mask)
        means = []
        for states, real, own in zip(encoded.last_hidden_state, mask.bool(), types, strict=True):
            kept, separator = states[real], int((own[real] == 0).sum())
            short = len(kept) < 2  # nothing is left without the separator
            means.append(
                states.new_zeros(states.shape[1]) if short else aligned_representation(kept, separator).mean(0)
            )
        return torch.tanh(self.albert.pooler(torch.stack(means)))

    def head(self, encoded: BaseModelOutput, mask: Tensor, labels: Tensor | None) -> LogitsOutput:
        logits = self.classifier(self.dropout(encoded.pooler_output))
        return LogitsOutput(None if labels is None else row_loss(logits, labels, self.config), logits)


class ALBERTForTokenClassification(HeadModel):
    """labels (B, S) -> loss; logits (B, S, N), zeros at padding."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def head(self, encoded: BaseModelOutput, mask: Tensor, labels: Tensor | None) -> LogitsOutput:
        logits = self.classifier(self.dropout(encoded.last_hidden_state)).masked_fill(~mask[..., None], 0)
        return LogitsOutput(None if labels is None else token_loss(logits, labels, mask), logits)


class ALBERTForQuestionAnswering(HeadModel):
    """start_positions, end_positions (B,) columns, both -> loss, the mean of the two; start_logits, end_logits (B, S).

    A position behind the last column or at padding is ignored; one below 0 counts as 0.
    """

    def __init__(self, config: ALBERTConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(f"question answering needs num_labels = 2 (start and end), got {config.num_labels}")
        super().__init__(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def head(
        self,
        encoded: BaseModelOutput,
        mask: Tensor,
        labels: Tensor | None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        if labels is not None:
            raise ValueError("question answering takes start_positions and end_positions, not labels")
        logits = self.qa_outputs(encoded.last_hidden_state)
        start, end = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (position_loss(start, start_positions, mask) + position_loss(end, end_positions, mask)) / 2
        return QuestionAnsweringOutput(loss, start, end)


class ALBERTForMultipleChoice(HeadModel):
    """Inputs (B, C, S), labels (B,) the right choice -> loss; logits (B, C)."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__(config, add_pooling_layer=True)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights()

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
        **more: Any,
    ) -> Any:
        given = next((x for x in (input_ids, inputs_embeds) if x is not None), torch.empty(0))
        choices = given.shape[1] if given.dim() in (3, 4) else 0
        if not choices:
            raise ValueError(f"expected input_ids (B, C, S) or inputs_embeds (B, C, S, E), got {tuple(given.shape)}")
        ids, mask, types, positions, embeds = (
            None if x is None else x.expand(len(given) if len(x) == 1 else -1, *x.shape[1:]).flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        options = (output_hidden_states, output_attentions, return_dict)
        return super().forward(ids, mask, types, positions, embeds, labels, *options, choices=choices, **more)

    def head(self, encoded: BaseModelOutput, mask: Tensor, labels: Tensor | None, choices: int) -> LogitsOutput:
        logits = self.classifier(self.dropout(encoded.pooler_output)).unflatten(0, (mask.shape[0] // choices, choices))
        logits = logits.squeeze(-1)
        return LogitsOutput(None if labels is None else cross_entropy(logits, labels.flatten()), logits)
