"""The tasks of every family: what the caller sees of Hugging Face's classes, computed on packed tokens.

A family's class adds its head's modules in `add_head`, and where they differ, how a head computes.
Labels of -100 and labels at padding are ignored by every cross-entropy, and the mean over no label is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters import project, project_tanh
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs
from ..layers.packing import aligned_mean
from ..layers.wanted import WantedTokens
from .encoder_config import pools_pairs
from .head_model import HeadModel, MLMModel
from .losses import cross_entropy, position_loss, row_loss
from .outputs import LogitsOutput, QuestionAnsweringOutput


class ForMaskedLM(MLMModel):
    """The encoder and a masked-language head."""

    pools = False

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
                output_attentions, return_dict: as the encoder's `forward` takes them.
            labels: (B, S) ids, -100 where there is nothing to predict; gives a loss.
            wanted_tokens: (B, S) bool, such as `labels != -100`: the last layer and the scores are computed for those alone.
            output_logits: False gives the loss alone, and needs no memory for the scores.

        Returns:
            LogitsOutput: loss (), the mean over the labels; logits (B, S, V), zeros at padding, or, with wanted_tokens,
            (N, V), row by row; hidden_states; attentions.

        Raises:
            As the encoder's `forward`; ValueError for labels of another shape, or output_logits=False without labels.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions, wanted_tokens)
        if labels is None and not output_logits:
            raise ValueError("output_logits=False leaves the loss alone, which needs labels")
        scores, loss = self.scores_and_loss(encoded, labels, output_logits)
        return self.finish(
            LogitsOutput(loss, None if scores is None else encoded.scatter(scores)), encoded, return_dict
        )

    def forward_packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        wanted_tokens: WantedTokens | Tensor | None = None,
        output_logits: bool = True,
    ) -> Any:
        """`forward` for a batch that holds no padding; hooks on the encoder do not run.

        Args:
            input_ids, cu_seqlens, max_seqlen, token_type_ids, position_ids, inputs_embeds: as the encoder's
                `forward_packed` takes them.
            labels, wanted_tokens: as in `forward`, of shape (T,). output_logits: as in `forward`.

        Returns:
            LogitsOutput: loss (); logits (T, V), or (N, V) with wanted_tokens.

        Raises:
            As the encoder's `forward_packed`, and as `forward`.
        """
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        encoded = self.encode_packed(inputs, wanted_tokens)
        if labels is None and not output_logits:
            raise ValueError("output_logits=False leaves the loss alone, which needs labels")
        scores, loss = self.scores_and_loss(encoded, labels, output_logits)
        return self.finish(LogitsOutput(loss, scores), encoded, return_dict)


class ForSequenceClassification(HeadModel):
    """The encoder and a classifier of its pooled token; the last layer is computed for first tokens alone.

    With `pair_pooling="aligned"` in config.json the pooler reads the mean of a pair's `aligned_representation` instead.
    """

    wanted_tokens = "first"

    def __init__(self, config: Any, *, backend: str = "auto") -> None:
        super().__init__(config, backend=backend)
        self.pools_pairs = pools_pairs(config)
        if self.pools_pairs and (self.pools_first or not self.base_model.takes_types):
            raise ValueError(
                f"pair_pooling 'aligned' needs a pooler and token types, which {config.model_type} has not"
            )
        if self.pools_pairs:
            self.wanted_tokens = "all"

    def add_head(self, config: Any) -> None:
        self.add_classifier(config, config.num_labels)

    def pooled(self, encoded: Encoded, inputs: Inputs) -> Any:
        """(B, H) of the pooler."""
        if not self.pools_pairs:
            return encoded.pooled
        types = (inputs if encoded.packing.shape is None else inputs.for_all_rows()).token_type_ids
        types = (
            torch.zeros_like(encoded.hidden[:, 0], dtype=torch.int64)
            if types is None
            else encoded.packing.gather(types)
        )
        mean = aligned_mean(encoded.hidden, types, encoded.packing)
        return project_tanh(self.base_model.pooling(), mean)

    def scores(self, pooled: Any) -> Tensor:
        """(B, H) -> (B, num_labels)."""
        return project(self.classifier, self.dropout(pooled))

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
                output_attentions, return_dict: as the encoder's `forward` takes them.
            labels: by `config.problem_type` (B,) classes, (B,) or (B, num_labels) numbers, or (B, num_labels) zeros and
                ones; without one, num_labels = 1 means numbers, integers mean classes, and floats zeros and ones.

        Returns:
            LogitsOutput: loss (), cross-entropy, squared error or binary cross-entropy; logits (B, num_labels);
            hidden_states; attentions.

        Raises:
            As the encoder's `forward`; ValueError for labels of another shape.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        logits = self.scores(self.pooled(encoded, inputs))
        loss = None if labels is None else row_loss(logits, labels, self.config)
        return self.finish(LogitsOutput(loss, logits), encoded, return_dict)

    def forward_packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`forward` without labels for a batch that holds no padding; hooks on the encoder do not run.

        Args, Raises:
            As the encoder's `forward_packed`.

        Returns:
            LogitsOutput: logits (B, num_labels).
        """
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        encoded = self.encode_packed(inputs)
        return self.finish(LogitsOutput(logits=self.scores(self.pooled(encoded, inputs))), encoded, return_dict)

    def loss_function(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss that `forward` computes of logits (B, num_labels) and labels."""
        return row_loss(logits, labels, self.config)


class ForTokenClassification(HeadModel):
    """The encoder and a classifier of every token."""

    pools = False

    def add_head(self, config: Any) -> None:
        self.add_classifier(config, config.num_labels)

    def token_scores(self, hidden: Tensor) -> Tensor:
        """(T, H) -> (T, num_labels)."""
        return project(self.classifier, self.dropout(hidden))

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
                output_attentions, return_dict: as the encoder's `forward` takes them.
            labels: (B, S) classes, -100 where there is none; gives a loss.
            wanted_tokens: (B, S) bool: the last layer and the scores are computed for those alone.

        Returns:
            LogitsOutput: loss (), the mean over the labels; logits (B, S, num_labels), zeros at padding, or, with
            wanted_tokens, (N, num_labels), row by row; hidden_states; attentions.

        Raises:
            As the encoder's `forward`; ValueError for labels of another shape.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions, wanted_tokens)
        logits = self.token_scores(encoded.hidden)
        loss = None if labels is None else cross_entropy(logits, encoded.labels(labels))
        return self.finish(LogitsOutput(loss, encoded.scatter(logits)), encoded, return_dict)

    def forward_packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        wanted_tokens: WantedTokens | Tensor | None = None,
    ) -> Any:
        """`forward` without labels for a batch that holds no padding; hooks on the encoder do not run.

        Args, Raises:
            As the encoder's `forward_packed`.

        Returns:
            LogitsOutput: logits (T, num_labels), or (N, num_labels) of the wanted_tokens, a mask (T,).
        """
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        encoded = self.encode_packed(inputs, wanted_tokens)
        return self.finish(LogitsOutput(logits=self.token_scores(encoded.hidden)), encoded, return_dict)


class ForQuestionAnswering(HeadModel):
    """The encoder and, for every token, how likely an answer starts and ends there."""

    pools = False

    def add_head(self, config: Any) -> None:
        if config.num_labels != 2:
            raise ValueError(f"question answering needs num_labels = 2 (start and end), got {config.num_labels}")
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)

    def span_scores(self, hidden: Tensor) -> Tensor:
        """(T, H) -> the scores (T, 2) of a start and of an end."""
        return project(self.qa_outputs, hidden)

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
                output_attentions, return_dict: as the encoder's `forward` takes them.
            start_positions, end_positions: (B,) columns; both give a loss. One behind the last column or at padding is
                ignored, one below 0 counts as 0.

        Returns:
            QuestionAnsweringOutput: loss (), the mean of two cross-entropies over the columns; start_logits and end_logits
            (B, S), the lowest finite value at padding; hidden_states; attentions.

        Raises:
            As the encoder's `forward`; ValueError for positions of another shape.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, output_hidden_states, output_attentions)
        scores = self.span_scores(encoded.hidden)
        start, end = encoded.scatter(scores, torch.finfo(scores.dtype).min).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            real = encoded.packing.mask()
            loss = (position_loss(start, start_positions, real) + position_loss(end, end_positions, real)) / 2
        output = QuestionAnsweringOutput(loss, start.contiguous(), end.contiguous())
        return self.finish(output, encoded, return_dict)

    def forward_packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`forward` without labels for a batch that holds no padding; hooks on the encoder do not run.

        Args, Raises:
            As the encoder's `forward_packed`.

        Returns:
            QuestionAnsweringOutput: start_logits and end_logits (T,).
        """
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        encoded = self.encode_packed(inputs)
        start, end = self.span_scores(encoded.hidden).unbind(-1)
        return self.finish(QuestionAnsweringOutput(None, start.contiguous(), end.contiguous()), encoded, return_dict)


class ForMultipleChoice(HeadModel):
    """The encoder and one score for each of several choices, of its pooled token."""

    wanted_tokens = "first"

    def add_head(self, config: Any) -> None:
        self.add_classifier(config, 1)

    def scores(self, pooled: Any) -> Tensor:
        """(B x choices, H) -> (B x choices, 1)."""
        return project(self.classifier, self.dropout(pooled))

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
            output_hidden_states, output_attentions, return_dict: as the encoder's `forward` takes them, for B x choices rows.
            labels: (B,), the right choice; gives a loss.

        Returns:
            LogitsOutput: loss (), cross-entropy over the choices; logits (B, choices); hidden_states; attentions.

        Raises:
            As the encoder's `forward`; ValueError for labels of another shape.
        """
        given = Inputs(input_ids, inputs_embeds=inputs_embeds).given()
        if given.dim() != (3 if inputs_embeds is None else 4):
            raise ValueError(f"expected (B, choices, S) ids or (B, choices, S, E) embeddings, got {tuple(given.shape)}")
        ids, mask, types, positions, embeds = (
            None if t is None else t.expand(len(given) if len(t) == 1 else -1, *t.shape[1:]).flatten(0, 1)
            for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        encoded = self.encode(Inputs(ids, mask, types, positions, embeds), output_hidden_states, output_attentions)
        logits = self.scores(encoded.pooled).view(-1, given.shape[1])
        loss = None if labels is None else cross_entropy(logits, labels)
        return self.finish(LogitsOutput(loss, logits), encoded, return_dict)

    def forward_packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores R rows without padding, each a text with one of its choices; hooks on the encoder do not run.

        Args, Raises:
            As the encoder's `forward_packed`.

        Returns:
            LogitsOutput: logits (R, 1); those of a text's choices, one after the other, are a row of `forward`'s.
        """
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        encoded = self.encode_packed(inputs)
        return self.finish(LogitsOutput(logits=self.scores(encoded.pooled)), encoded, return_dict)
