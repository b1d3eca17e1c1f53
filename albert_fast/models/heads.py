"""The six heads on the fast encoder: what the caller sees of Hugging Face's `Albert*` classes, computed on packed tokens.

Labels of -100 and labels at padding are ignored by every cross-entropy, and the mean over no label is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters import project
from ..layers.inputs import Inputs
from ..layers.wanted import WantedTokens
from .config import ALBERTConfig
from .head_model import HeadModel, MLMHead, MLMModel, SOPHead
from .losses import cross_entropy, position_loss, row_loss
from .outputs import LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput


class ALBERTForMaskedLM(MLMModel):
    """The encoder and a masked-language head (paper, section 3.1)."""

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, False, backend)
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)
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
        wanted_tokens: WantedTokens | Tensor | None = None,
        output_logits: bool = True,
    ) -> Any:
        """Scores of every word at every token, or at those that are asked for.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
                output_attentions, return_dict: as `ALBERTModel.forward` takes them.
            labels: (B, S) ids, -100 where there is nothing to predict; gives a loss.
            wanted_tokens: (B, S) bool, such as `labels != -100`: the last layer and the scores are computed for those alone.
            output_logits: False gives the loss alone, and needs no memory for the scores.

        Returns:
            LogitsOutput: loss (), the mean over the labels; logits (B, S, V), zeros at padding, or, with wanted_tokens,
            (N, V), row by row; hidden_states; attentions.

        Raises:
            As `ALBERTModel.forward`; ValueError for labels of another shape, or output_logits=False without labels.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions, wanted_tokens)
        if labels is None and not output_logits:
            raise ValueError("output_logits=False leaves the loss alone, which needs labels")
        scores, loss = self.scores_and_loss(encoded, labels, output_logits)
        return self.finish(
            LogitsOutput(loss, None if scores is None else encoded.scatter(scores)), encoded, return_dict
        )


class ALBERTForPreTraining(MLMModel):
    """The encoder, a masked-language head and a sentence order head (paper, section 3.1)."""

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, True, backend)
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)
        self.sop_classifier = SOPHead(config)
        self.init_weights()

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
            sentence_order_label: (B,), 0 where the segments are in order, 1 where they are swapped. Both give a loss.
            output_logits: False gives no prediction_logits, and needs no memory for them.

        Returns:
            PreTrainingOutput: loss (), the sum of both; prediction_logits (B, S, V), zeros at padding; sop_logits (B, 2),
            or as wide as num_labels; hidden_states; attentions.

        Raises:
            As `ALBERTModel.forward`; ValueError for labels of another shape, or output_logits=False without both.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        if not output_logits and (labels is None or sentence_order_label is None):
            raise ValueError("output_logits=False leaves the loss alone, which needs labels and sentence_order_label")
        order = self.sop_classifier(encoded.pooled)
        both = labels is not None and sentence_order_label is not None
        scores, loss = self.scores_and_loss(encoded, labels if both else None, output_logits)
        if loss is not None and sentence_order_label is not None:
            loss = loss + cross_entropy(order, sentence_order_label.flatten())
        output = PreTrainingOutput(loss, None if scores is None else encoded.scatter(scores), order)
        return self.finish(output, encoded, return_dict)


class ALBERTForSequenceClassification(HeadModel):
    """The encoder and a classifier of its pooled token; the last layer is computed for first tokens alone."""

    wanted_tokens = "first"

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, True, backend)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
    ) -> Any:
        """One score for each class, or value, of a text or a pair of texts.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
                output_attentions, return_dict: as `ALBERTModel.forward` takes them.
            labels: by `config.problem_type` (B,) classes, (B,) or (B, num_labels) numbers, or (B, num_labels) zeros and
                ones; without one, num_labels = 1 means numbers, integers mean classes, and floats zeros and ones.

        Returns:
            LogitsOutput: loss (), cross-entropy, squared error or binary cross-entropy; logits (B, num_labels);
            hidden_states; attentions.

        Raises:
            As `ALBERTModel.forward`; ValueError for labels of another shape.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        logits = project(self.classifier, self.dropout(encoded.pooled))
        loss = None if labels is None else row_loss(logits, labels, self.config)
        return self.finish(LogitsOutput(loss, logits), encoded, return_dict)

    def loss_function(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss that `forward` computes of logits (B, num_labels) and labels."""
        return row_loss(logits, labels, self.config)


class ALBERTForTokenClassification(HeadModel):
    """The encoder and a classifier of every token."""

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, False, backend)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
        wanted_tokens: WantedTokens | Tensor | None = None,
    ) -> Any:
        """One score for each class of every token, or of those that are asked for.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
                output_attentions, return_dict: as `ALBERTModel.forward` takes them.
            labels: (B, S) classes, -100 where there is none; gives a loss.
            wanted_tokens: (B, S) bool: the last layer and the scores are computed for those alone.

        Returns:
            LogitsOutput: loss (), the mean over the labels; logits (B, S, num_labels), zeros at padding, or, with
            wanted_tokens, (N, num_labels), row by row; hidden_states; attentions.

        Raises:
            As `ALBERTModel.forward`; ValueError for labels of another shape.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions, wanted_tokens)
        logits = project(self.classifier, self.dropout(encoded.hidden))
        loss = None if labels is None else cross_entropy(logits, encoded.labels(labels))
        return self.finish(LogitsOutput(loss, encoded.scatter(logits)), encoded, return_dict)


class ALBERTForQuestionAnswering(HeadModel):
    """The encoder and, for every token, how likely an answer starts and ends there."""

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        if config.num_labels != 2:
            raise ValueError(f"question answering needs num_labels = 2 (start and end), got {config.num_labels}")
        super().__init__(config, False, backend)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """One score for the start and one for the end of an answer at every token.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
                output_attentions, return_dict: as `ALBERTModel.forward` takes them.
            start_positions, end_positions: (B,) columns; both give a loss. One behind the last column or at padding is
                ignored, one below 0 counts as 0.

        Returns:
            QuestionAnsweringOutput: loss (), the mean of two cross-entropies over the columns; start_logits and end_logits
            (B, S), the lowest finite value at padding; hidden_states; attentions.

        Raises:
            As `ALBERTModel.forward`; ValueError for positions of another shape.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        scores = project(self.qa_outputs, encoded.hidden)
        start, end = encoded.scatter(scores, torch.finfo(scores.dtype).min).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            real = encoded.packing.mask()
            loss = (position_loss(start, start_positions, real) + position_loss(end, end_positions, real)) / 2
        output = QuestionAnsweringOutput(loss, start.contiguous(), end.contiguous())
        return self.finish(output, encoded, return_dict)


class ALBERTForMultipleChoice(HeadModel):
    """The encoder and one score for each of several choices, of its pooled token."""

    wanted_tokens = "first"

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, True, backend)
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
    ) -> Any:
        """One score for each choice.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, choices, S); inputs_embeds: (B, choices, S, E).
            output_hidden_states, output_attentions, return_dict: as `ALBERTModel.forward` takes them, for B x choices rows.
            labels: (B,), the right choice; gives a loss.

        Returns:
            LogitsOutput: loss (), cross-entropy over the choices; logits (B, choices); hidden_states; attentions.

        Raises:
            As `ALBERTModel.forward`; ValueError for labels of another shape.
        """
        given = Inputs(input_ids, inputs_embeds=inputs_embeds).given()
        if given.dim() != (3 if inputs_embeds is None else 4):
            raise ValueError(f"expected (B, choices, S) ids or (B, choices, S, E) embeddings, got {tuple(given.shape)}")
        ids, mask, types, positions, embeds = (
            None if t is None else t.expand(len(given) if len(t) == 1 else -1, *t.shape[1:]).flatten(0, 1)
            for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        encoded = self.encode(Inputs(ids, mask, types, positions, embeds), output_hidden_states, output_attentions)
        logits = project(self.classifier, self.dropout(encoded.pooled)).view(-1, given.shape[1])
        loss = None if labels is None else cross_entropy(logits, labels)
        return self.finish(LogitsOutput(loss, logits), encoded, return_dict)
