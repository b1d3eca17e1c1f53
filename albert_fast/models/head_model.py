"""Base classes of the models with a head: the encoder in `albert`, the masked-language head, hidden states and losses."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.adapters import check_heard, check_read, is_hooked, product, project
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs
from ..layers.packing import pack
from ..layers.wanted import WantedTokens
from ..runtime.registration import is_traced
from .albert import ALBERTModel
from .config import ALBERTConfig
from .execution import Execution
from .losses import cross_entropy
from .pretrained import PretrainedMixin


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

    def forward(self, hidden: Tensor, backend: str) -> Tensor:
        return project(self.decoder, self.transform(hidden, backend))

    def transform(self, hidden: Tensor, backend: str) -> Tensor:
        """(N, H) -> (N, E), the decoder's input."""
        norm = self.LayerNorm
        check_read(norm, nn.LayerNorm, "predictions.LayerNorm")
        x, bias = product(self.dense, hidden)
        return ops.gelu_layer_norm(x, bias, norm.weight, norm.bias, norm.eps, self.act, backend=backend)

    def loss(self, hidden: Tensor, labels: Tensor, backend: str) -> Tensor:
        """Cross-entropy of the scores of `hidden` (N, H) with labels (N,), computed without the scores in memory."""
        check_heard(self, "predictions, with output_logits=False,")
        check_read(self.decoder, nn.Linear, "predictions.decoder")
        x, decoder = self.transform(hidden, backend), self.decoder
        return ops.linear_cross_entropy(x, decoder.weight, decoder.bias, labels, backend=backend)


class SOPHead(nn.Module):
    """(B, H) -> sentence order scores (B, num_labels); Google's releases have two."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return project(self.classifier, self.dropout(pooled))


class HeadModel(PretrainedMixin):
    """An encoder in `albert`. A subclass has `forward`, whose docstring says what it takes."""

    execution_class = Execution
    wanted_tokens = "all"
    accepts_loss_kwargs = False  # transformers' Trainer asks: the loss is the batch's own mean

    def __init__(self, config: ALBERTConfig, add_pooling_layer: bool, backend: str) -> None:
        super().__init__(config)
        self.albert = ALBERTModel(config, add_pooling_layer, backend=backend)

    @property
    def backend(self) -> str:
        """The backend of the head's operators: the encoder's."""
        return self.albert.execution_state.backend

    def loss_function(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss that `forward` computes from logits (..., N) and class labels (...); -100 is ignored."""
        return cross_entropy(logits.flatten(0, -2), labels.flatten())

    def encode(
        self,
        inputs: Inputs,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        wanted_tokens: WantedTokens | Tensor | str | None = None,
    ) -> Encoded:
        """The encoder's result, still packed. Where `albert` has hooks it is called, so that they run."""
        wanted = WantedTokens.of(self.wanted_tokens if wanted_tokens is None else wanted_tokens)
        if not is_hooked(self.albert):
            return self.albert.encode(inputs, wanted, output_hidden_states, output_attentions)
        if self.albert._backward_hooks or self.albert._backward_pre_hooks:
            _warn_of_backward_hooks()
        if wanted.which == "first":
            wanted = WantedTokens()  # hooks see last_hidden_state
        given = {name: tensor for name, tensor in inputs._asdict().items() if name not in ("cu_seqlens", "max_seqlen")}
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        output = self.albert(**given, **asked, return_dict=True, wanted_tokens=wanted)
        packing = pack(inputs.shape(), inputs.for_all_rows().attention_mask, inputs.given().device)
        return Encoded.of(output, packing, wanted)

    def finish(self, output: Any, encoded: Encoded, return_dict: bool | None) -> Any:
        """`output` with the encoder's states; as a tuple of its set fields where the caller asked for one."""
        output.hidden_states, output.attentions = encoded.hidden_states, encoded.attentions
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()


class MLMModel(HeadModel):
    """Base of the two models with a masked-language head: `predictions`, tied to the word embeddings."""

    predictions: MLMHead

    def scores_and_loss(
        self, encoded: Encoded, labels: Tensor | None, output_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scores (N, V) of the tokens in `encoded`, if asked for, and the loss of labels (B, S), if given."""
        head, hidden = self.predictions, encoded.hidden
        if self.config.tie_word_embeddings and not is_traced():
            self._check_tied()
        scores = head(hidden, self.backend) if output_logits else None
        if labels is None:
            return scores, None
        labels = encoded.labels(labels)
        return scores, head.loss(hidden, labels, self.backend) if scores is None else cross_entropy(scores, labels)

    def _check_tied(self) -> None:
        """ValueError where the table was replaced by one of another size; a warning where the size is the same."""
        words, decoder = self.albert.embeddings.word_embeddings, self.predictions.decoder
        if type(words) is not nn.Embedding or type(decoder) is not nn.Linear or decoder.weight is words.weight:
            return
        if decoder.weight.shape[0] != words.weight.shape[0]:
            raise ValueError(
                f"word_embeddings has {words.weight.shape[0]} rows, the decoder {decoder.weight.shape[0]}: call "
                "model.tie_weights() after replacing either, or model.resize_token_embeddings(n) instead"
            )
        _warn_of_untied()


@cache
def _warn_of_untied() -> None:
    warnings.warn(
        "albert_fast: word_embeddings or the decoder was replaced and they no longer share a table, although "
        "config.tie_word_embeddings: model.tie_weights() ties them, tie_word_embeddings=False keeps both",
        stacklevel=3,
    )


@cache
def _warn_of_backward_hooks() -> None:
    warnings.warn(
        "albert_fast: backward hooks on albert do not run: torch runs those of a module that returns tensors, not an "
        "output with fields; register them on albert.encoder or on tensors",
        stacklevel=3,
    )
