"""ALBERT in plain eager PyTorch: the reference for every fused kernel and for the fast models of `models/albert.py`.

Lan et al. 2019 (arXiv 1909.11942); names, defaults and losses are those of Hugging Face's `modeling_albert.py`. Shapes:
B rows, S columns, E embedding_size, H hidden_size, V vocab_size, C choices, N num_labels. Attention is S x S, padding
is computed and set to zero. Differences from Hugging Face, all of them at padding: outputs there are zeros (the lowest
value in the question answering logits), labels there are ignored, and each row pools its first unmasked token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops._dtypes import widened
from ..config import ALBERTConfig
from ..outputs import BaseModelOutput
from ..pretrained import PretrainedMixin

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
}


class ALBERTModel(PretrainedMixin):
    """ids and mask -> embeddings -> the layer of each group, num_hidden_layers times -> all tokens and the pooled one.

    forward: input_ids (B, S) integers or inputs_embeds (B, S, E), exactly one; attention_mask (B, S), 0 at padding, in
    any pattern; token_type_ids (B, S), default 0; position_ids, default the column; these three also (1, S). Values at
    padding are never read. Returns last_hidden_state (B, S, H), pooler_output (B, H) where there is a pooler (a row
    without any token pools a zero vector), hidden_states (the projected embeddings, then every inner layer's output)
    and attentions (B, heads, S, S; zeros at padding) on request.

    Raises:
        ValueError: shapes that do not fit together; more columns than max_position_embeddings and no position_ids.
        TypeError: ids that are not integers, embeddings that are not floats.
        IndexError: an id, type or position outside its table.
    """

    prefix = ""

    def __init__(self, config: ALBERTConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        mask = token_mask(input_ids, attention_mask, inputs_embeds)
        embedded = self.embeddings(mask, input_ids, token_type_ids, position_ids, inputs_embeds)
        hidden_states, all_hidden_states, attentions = self.encoder(embedded, mask)
        pooled = None
        if self.pooler is not None:
            first_token = mask & (mask.cumsum(dim=1) == 1)
            # A masked sum rather than an index: a row without tokens, or without columns, gives the zero vector.
            first = hidden_states.masked_fill(~first_token[..., None], 0).sum(dim=1)
            pooled = torch.tanh(self.pooler(first))
        output = BaseModelOutput(
            hidden_states,
            pooled,
            all_hidden_states if self.asked("output_hidden_states", output_hidden_states) else None,
            attentions if self.asked("output_attentions", output_attentions) else None,
        )
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()


class Embeddings(nn.Module):
    """ids, types and positions (B, S) -> dropout(LayerNorm(sum of their rows)) (B, S, E); section 3.1, factorised."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        # padding_idx as in Hugging Face: the pad token's row learns nothing from being looked up.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.LayerNorm = LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        mask: Tensor,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        if position_ids is None:
            columns, limit = mask.shape[1], self.position_embeddings.num_embeddings
            if columns > limit:
                raise ValueError(f"the sequence has {columns} columns, more than max_position_embeddings = {limit}")
            position_ids = torch.arange(columns, device=mask.device)[None]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(mask, dtype=torch.long)
        if input_ids is not None:
            words = self.word_embeddings(checked_ids("input_ids", input_ids, mask, self.word_embeddings))
        elif inputs_embeds is not None:
            if inputs_embeds.shape[2] != self.word_embeddings.embedding_dim:
                width = self.word_embeddings.embedding_dim
                raise ValueError(
                    f"inputs_embeds {tuple(inputs_embeds.shape)} do not have embedding_size = {width} columns"
                )
            words = inputs_embeds.masked_fill(~mask[..., None], 0)
        token_type_ids = checked_ids("token_type_ids", token_type_ids, mask, self.token_type_embeddings)
        position_ids = checked_ids("position_ids", position_ids, mask, self.position_embeddings)
        embedded = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        dropped: Tensor = self.dropout(self.LayerNorm(embedded))
        return dropped


class Encoder(nn.Module):
    """embeddings (B, S, E), mask (B, S) -> hidden states (B, S, H): one Linear, then the shared layers."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.albert_layer_groups = nn.ModuleList(LayerGroup(config) for _ in range(config.num_hidden_groups))

    def forward(self, embedded: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        padding = ~mask[..., None]
        hidden_states = self.embedding_hidden_mapping_in(embedded).masked_fill(padding, 0)
        all_hidden_states, attentions = [hidden_states], []
        for i in range(self.config.num_hidden_layers):
            group: Any = self.albert_layer_groups[self.config.group_of_layer(i)]
            for layer in group.albert_layers:
                hidden_states, probabilities = layer(hidden_states, mask)
                hidden_states = hidden_states.masked_fill(padding, 0)
                all_hidden_states.append(hidden_states)
                attentions.append(probabilities.masked_fill(padding[:, None], 0))
        return hidden_states, tuple(all_hidden_states), tuple(attentions)


class LayerGroup(nn.Module):
    """The inner_group_num layers that share one group index; the names of Hugging Face's state_dict."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.albert_layers = nn.ModuleList(Layer(config) for _ in range(config.inner_group_num))


class Layer(nn.Module):
    """(B, S, H) -> (B, S, H): y = attention block, then LayerNorm(FFN(y) + y)."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.full_layer_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        # Google's code applies this dropout, Hugging Face's does not; the configuration says which.
        self.dropout = nn.Dropout(config.hidden_dropout_prob if config.ffn_output_dropout else 0.0)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attended, probabilities = self.attention(hidden_states, mask)
        ffn = self.ffn_output(self.activation(self.ffn(attended)))
        return self.full_layer_layer_norm(self.dropout(ffn) + attended), probabilities


class Attention(nn.Module):
    """(B, S, H) -> LayerNorm(x + dense(softmax(Q K^T / sqrt(head_dim)) V)) and the probabilities (B, heads, S, S)."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, S, head_dim)
            for project in (self.query, self.key, self.value)
        )
        scores = widened(query @ key.transpose(-1, -2)) * self.head_dim**-0.5
        # The lowest finite value, not -inf: a row without any token then stays finite, backward as well.
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        probabilities = self.attention_dropout(scores.softmax(dim=-1).to(value.dtype))
        context = (probabilities @ value).transpose(1, 2).flatten(2)
        return self.LayerNorm(hidden_states + self.output_dropout(self.dense(context))), probabilities


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension in float32 at least: eps 1e-12 is zero in float16."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = widened(self.weight), widened(self.bias)
        return F.layer_norm(widened(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def token_mask(input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """True at the real tokens, (B, S) bool, after checking that ids or embeddings and mask fit."""
    if input_ids is not None and inputs_embeds is None:
        tokens, name, dimensions = input_ids, "input_ids (B, S)", 2
    elif inputs_embeds is not None and input_ids is None:
        tokens, name, dimensions = inputs_embeds, "inputs_embeds (B, S, E)", 3
    else:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if tokens.dim() != dimensions:
        raise ValueError(f"expected {name}, got the shape {tuple(tokens.shape)}")
    if inputs_embeds is not None and not inputs_embeds.is_floating_point():
        raise TypeError(f"inputs_embeds must be floats, got {inputs_embeds.dtype}")
    shape = tokens.shape[:2]
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=tokens.device)
    if attention_mask.shape not in (shape, (1, shape[1])):
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not fit {name} of {tuple(tokens.shape)}")
    return (attention_mask != 0).expand(shape)


def checked_ids(name: str, ids: Tensor, mask: Tensor, table: nn.Embedding) -> Tensor:
    """`ids` (B, S) as int64 with 0 at padding, every one of them inside `table`."""
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.shape == (1, mask.shape[1]):
        ids = ids.expand_as(mask)
    if ids.shape != mask.shape:
        raise ValueError(f"{name} {tuple(ids.shape)} does not fit the batch of {tuple(mask.shape)}")
    ids = ids.long().masked_fill(~mask, 0)
    outside = (ids < 0) | (ids >= table.num_embeddings)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        value = ids[row, column].item()
        raise IndexError(f"{name}[{row}, {column}] = {value} is outside its table of {table.num_embeddings} rows")
    return ids
