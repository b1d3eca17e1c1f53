"""The six heads on the fast encoder: what the caller sees of Hugging Face's `Albert*` classes, computed on packed tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import ALBERTConfig
from .fast_model import FastModel
from .losses import cross_entropy, position_loss, row_loss
from .modeling import ALBERTModel, Encoded, exactly_one
from .outputs import LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput
from .parts import check_read, product, project


def _classifier_dropout(config: ALBERTConfig) -> nn.Dropout:
    p = config.classifier_dropout_prob
    return nn.Dropout(config.hidden_dropout_prob if p is None else p)


class MLMHead(nn.Module):
    """(N, H) -> gelu_layer_norm of the product with dense (N, E) -> scores (N, V) by the decoder, tied to the embedding."""

    def __init__(self, config: ALBERTConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.act = config.activation
        if config.tie_word_embeddings:
            self.decoder.weight, self.decoder.bias = word_embeddings.weight, self.bias

    def forward(self, hidden: Tensor, backend: str) -> Tensor:
        return project(self.decoder, self.transform(hidden, backend))

    def transform(self, hidden: Tensor, backend: str) -> Tensor:
        """(N, H) -> (N, E), what the decoder takes."""
        norm = self.LayerNorm
        check_read(norm, nn.LayerNorm, "predictions.LayerNorm")
        x, bias = product(self.dense, hidden)
        return ops.gelu_layer_norm(x, bias, norm.weight, norm.bias, norm.eps, self.act, backend=backend)

    def loss(self, hidden: Tensor, labels: Tensor, backend: str) -> Tensor:
        """The cross-entropy of the scores of `hidden` (N, H) and labels (N,); the scores never stand in memory."""
        check_read(self.decoder, nn.Linear, "predictions.decoder")
        x, decoder = self.transform(hidden, backend), self.decoder
        return ops.linear_cross_entropy(x, decoder.weight, decoder.bias, labels, backend=backend)


class SOPHead(nn.Module):
    """(B, H) -> sentence order scores (B, num_labels); Google's releases have two."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return project(self.classifier, self.dropout(pooled))


class _HeadModel(FastModel):
    """An encoder in `albert` and `head(encoded, labels, ...)` on top of it.

    forward: ALBERTModel's arguments, the task's labels and `return_dict`. Labels of -100 and labels at padding are
    ignored, and the mean over no label is 0.
    """

    prefix = "albert."
    output_tokens = "all"
    accepts_loss_kwargs = False  # asked by transformers' Trainer: the loss is the batch's own mean
    head: Callable[..., Any]
    takes: frozenset[str]  # what `head` names

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.takes = frozenset(inspect.signature(cls.head).parameters)

    def __init__(self, config: ALBERTConfig, add_pooling_layer: bool, backend: str) -> None:
        super().__init__(config)
        self.albert = ALBERTModel(config, add_pooling_layer, backend=backend)

    @property
    def backend(self) -> str:
        return self.albert.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self.albert.backend = name

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        output_tokens: Tensor | None = None,
        **more: Any,
    ) -> Any:
        for name in more:
            if name not in self.takes:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected argument {name!r}")
        if output_tokens is not None and self.output_tokens != "all":
            raise ValueError(f"{type(self).__name__} reads the pooled token alone and takes no output_tokens")
        encoded = self.albert.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states, output_attentions,
            self.output_tokens if output_tokens is None else output_tokens,
        )  # fmt: skip
        output = self.head(encoded, labels, **more)
        output.hidden_states, output.attentions = encoded.hidden_states, encoded.attentions
        return output if return_dict else output.to_tuple()


class ALBERTForMaskedLM(_HeadModel):
    """labels (B, S) -> loss; logits (B, S, V), zeros at padding. Paper, section 3.1.

    With output_tokens, (B, S) bool such as `labels != -100`, the last layer and the scores are computed for those tokens
    alone, and logits are (N, V), row by row. With output_logits=False there is the loss alone, and no memory for scores.
    """

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, False, backend)
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)
        self.init_weights()

    def head(self, encoded: Encoded, labels: Tensor | None, output_logits: bool = True) -> LogitsOutput:
        if not output_logits:
            if labels is None:
                raise ValueError("output_logits=False leaves the loss alone, which needs labels")
            return LogitsOutput(self.predictions.loss(encoded.hidden, encoded.labels(labels), self.backend))
        scores = self.predictions(encoded.hidden, self.backend)
        loss = None if labels is None else cross_entropy(scores, encoded.labels(labels))
        return LogitsOutput(loss, encoded.scatter(scores))


class ALBERTForPreTraining(_HeadModel):
    """labels (B, S) and sentence_order_label (B,), both -> loss, their sum; prediction_logits (B, S, V), sop_logits (B, 2).

    With output_logits=False there are no prediction_logits, and no memory for them.
    """

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, True, backend)
        self.predictions = MLMHead(config, self.albert.embeddings.word_embeddings)
        self.sop_classifier = SOPHead(config)
        self.init_weights()

    def head(
        self,
        encoded: Encoded,
        labels: Tensor | None,
        sentence_order_label: Tensor | None = None,
        output_logits: bool = True,
    ) -> PreTrainingOutput:
        if encoded.pooled is None:
            raise ValueError("ALBERTForPreTraining needs the pooled token and takes no output_tokens")
        predictions, hidden, order = self.predictions, encoded.hidden, self.sop_classifier(encoded.pooled)
        scores = predictions(hidden, self.backend) if output_logits else None
        loss = None
        if labels is not None and sentence_order_label is not None:
            labels = encoded.labels(labels)
            loss = predictions.loss(hidden, labels, self.backend) if scores is None else cross_entropy(scores, labels)
            loss = loss + cross_entropy(order, sentence_order_label.flatten())
        elif scores is None:
            raise ValueError("output_logits=False leaves the loss alone, which needs labels and sentence_order_label")
        return PreTrainingOutput(loss, None if scores is None else encoded.scatter(scores), order)


class ALBERTForSequenceClassification(_HeadModel):
    """labels (B,) or (B, num_labels) -> loss by problem type; logits (B, num_labels). The last layer sees pooled tokens only."""

    output_tokens = "first"

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, True, backend)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def head(self, encoded: Encoded, labels: Tensor | None) -> LogitsOutput:
        logits = project(self.classifier, self.dropout(encoded.pooled))
        return LogitsOutput(None if labels is None else row_loss(logits, labels, self.config), logits)


class ALBERTForTokenClassification(_HeadModel):
    """labels (B, S) -> loss; logits (B, S, num_labels), zeros at padding."""

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, False, backend)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def head(self, encoded: Encoded, labels: Tensor | None) -> LogitsOutput:
        logits = project(self.classifier, self.dropout(encoded.hidden))
        loss = None if labels is None else cross_entropy(logits, encoded.labels(labels))
        return LogitsOutput(loss, encoded.scatter(logits))


class ALBERTForQuestionAnswering(_HeadModel):
    """start_positions, end_positions (B,) -> loss; start_logits, end_logits (B, S), the lowest finite value at padding."""

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        if config.num_labels != 2:
            raise ValueError(f"question answering needs num_labels = 2 (start and end), got {config.num_labels}")
        super().__init__(config, False, backend)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def head(
        self,
        encoded: Encoded,
        labels: Tensor | None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        if labels is not None or isinstance(encoded.output_tokens, Tensor):
            raise ValueError(
                "ALBERTForQuestionAnswering takes start_positions and end_positions, not labels or output_tokens"
            )
        scores = project(self.qa_outputs, encoded.hidden)
        start, end = encoded.scatter(scores, torch.finfo(scores.dtype).min).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            real = encoded.packing.mask()
            loss = (position_loss(start, start_positions, real) + position_loss(end, end_positions, real)) / 2
        return QuestionAnsweringOutput(loss, start.contiguous(), end.contiguous())


class ALBERTForMultipleChoice(_HeadModel):
    """input_ids and the rest (B, choices, S); labels (B,) -> loss; logits (B, choices)."""

    output_tokens = "first"

    def __init__(self, config: ALBERTConfig, *, backend: str = "auto") -> None:
        super().__init__(config, True, backend)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> Any:
        given = exactly_one(input_ids, inputs_embeds)
        if given.dim() != (3 if inputs_embeds is None else 4):
            raise ValueError(f"expected (B, choices, S) ids or (B, choices, S, E) embeddings, got {tuple(given.shape)}")
        flat: Any = [
            None if t is None else t.flatten(0, 1)
            for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        return super().forward(  # type: ignore[call-arg]
            *flat, labels, output_hidden_states, output_attentions, return_dict, choices=given.shape[1]
        )

    def head(self, encoded: Encoded, labels: Tensor | None, choices: int) -> LogitsOutput:
        logits = project(self.classifier, self.dropout(encoded.pooled)).view(-1, choices)
        return LogitsOutput(None if labels is None else cross_entropy(logits, labels), logits)
