"""Base classes of the models with a head, of every family: the encoder, the masked-language head, hidden states and losses."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .. import ops
from ..layers.adapters import check_heard, check_read, is_hooked, product, project
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs
from ..layers.packing import pack
from ..layers.wanted import WantedTokens
from ..runtime.registration import is_traced
from .execution import Execution
from .losses import cross_entropy
from .pretrained import PretrainedMixin


class LMParts(NamedTuple):
    """A masked-language head: (N, H) -> dense and gelu_layer_norm (N, E) -> decoder: scores (N, V).

    name: of the head's module, for messages; "" where the model itself holds the parts.
    """

    dense: Any
    norm: Any
    decoder: Any
    act: str
    name: str

    def scores(self, hidden: Tensor, backend: str) -> Tensor:
        """(N, H) -> (N, V)."""
        return project(self.decoder, self.transform(hidden, backend))

    def transform(self, hidden: Tensor, backend: str) -> Tensor:
        """(N, H) -> (N, E), the decoder's input."""
        norm = self.norm
        check_read(norm, nn.LayerNorm, f"{self.name}.LayerNorm")
        x, bias = product(self.dense, hidden)
        return ops.gelu_layer_norm(x, bias, norm.weight, norm.bias, norm.eps, self.act, backend=backend)

    def loss(self, hidden: Tensor, labels: Tensor, backend: str, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of the scores of `hidden` (N, H) with labels (N,), computed without the scores in memory."""
        check_read(self.decoder, nn.Linear, f"{self.name}.decoder")
        x, decoder = self.transform(hidden, backend), self.decoder
        return ops.linear_cross_entropy(x, decoder.weight, decoder.bias, labels, label_smoothing, backend=backend)


class HeadModel(PretrainedMixin):
    """An encoder, in the attribute that the family names, and a head. A task's class has `forward`, whose docstring says what
    it takes; a family's class has `encoder_class`.

    pools: whether the head reads pooled tokens. pools_first: whether it has a classifier of its own for each sequence's first
    token, and no use for a pooler.
    """

    execution_class = Execution
    wanted_tokens = "all"
    accepts_loss_kwargs = False  # transformers' Trainer asks: the loss is the batch's own mean
    encoder_class: ClassVar[Any]
    pools: ClassVar[bool] = True
    pools_first: ClassVar[bool] = False
    classifier: Any

    def __init__(self, config: Any, *, backend: str = "auto") -> None:
        super().__init__(config)
        encoder = self.encoder_class(config, self.pools and not self.pools_first, backend=backend)
        encoder.keeps_first = self.pools and self.pools_first
        setattr(self, self.base_model_prefix, encoder)
        self.add_head(config)
        self.init_weights()

    def add_head(self, config: Any) -> None:
        """Make the head's modules; the encoder is made already."""
        raise NotImplementedError

    def add_classifier(self, config: Any, classes: int) -> None:
        """A dropout and a Linear H -> classes, as most heads have them."""
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, classes)

    @property
    def backend(self) -> str:
        """The backend of the head's operators: the encoder's."""
        backend: str = self.base_model.execution_state.backend
        return backend

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
        """The encoder's result, still packed. Where the encoder has hooks it is called, so that they run."""
        encoder = self.base_model
        wanted = WantedTokens.of(self.wanted_tokens if wanted_tokens is None else wanted_tokens)
        if not is_hooked(encoder):
            encoded: Encoded = encoder.encode(inputs, wanted, output_hidden_states, output_attentions)
            return encoded
        if encoder._backward_hooks or encoder._backward_pre_hooks:
            _warn_of_backward_hooks(self.base_model_prefix)
        if wanted.which == "first":
            wanted = WantedTokens()  # hooks see last_hidden_state
        given = {name: tensor for name, tensor in inputs._asdict().items() if name not in ("cu_seqlens", "max_seqlen")}
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        output = encoder(**given, **asked, return_dict=True, wanted_tokens=wanted)
        packing = pack(inputs.shape(), inputs.for_all_rows().attention_mask, inputs.given().device)
        encoded = Encoded.of(output, packing, wanted)
        if encoder.keeps_first:
            encoded = replace(encoded, pooled=encoder.first_states(encoded.hidden, packing, not len(encoded.hidden)))
        return encoded

    def encode_packed(self, inputs: Inputs, wanted_tokens: WantedTokens | Tensor | None = None) -> Encoded:
        """The encoder's result for a batch that holds no padding; `inputs` has cu_seqlens and max_seqlen. Hooks do not run."""
        check_heard(self.base_model, self.base_model_prefix, "forward_packed calls the encoder's parts")
        encoded: Encoded = self.base_model.encode_packed(
            inputs, self.wanted_tokens if wanted_tokens is None else wanted_tokens
        )
        return encoded

    def finish(self, output: Any, encoded: Encoded, return_dict: bool | None) -> Any:
        """`output` with the encoder's states; as a tuple of its set fields where the caller asked for one."""
        output.hidden_states, output.attentions = encoded.hidden_states, encoded.attentions
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()


class MLMModel(HeadModel):
    """Base of the models with a masked-language head, tied to the word embeddings."""

    def lm_parts(self) -> LMParts:
        """The parts of the head. Its module has the method `parts`, where it has a module of its own."""
        parts: LMParts = self.find_lm_head().parts()
        return parts

    def lm_scores(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V). A head's own module is called, so that its hooks run."""
        scores: Tensor = self.find_lm_head()(hidden, self.backend)
        return scores

    def scores_and_loss(
        self, encoded: Encoded, labels: Tensor | None, output_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scores (N, V) of the tokens in `encoded`, if asked for, and the loss of labels (B, S) or (T,), if given."""
        hidden = encoded.hidden
        if self.config.tie_word_embeddings and not is_traced():
            self._check_tied()
        scores = self.lm_scores(hidden) if output_logits else None
        if labels is None:
            return scores, None
        labels = encoded.labels(labels)
        if scores is not None:
            return scores, cross_entropy(scores, labels)
        head, parts = self.find_lm_head(), self.lm_parts()
        if head is not self:
            check_heard(head, f"{parts.name}, with output_logits=False,")
        return None, parts.loss(hidden, labels, self.backend)

    def _check_tied(self) -> None:
        """ValueError where the table was replaced by one of another size; a warning where the size is the same."""
        words, decoder = self.base_model.embeddings.word_embeddings, self.lm_parts().decoder
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
def _warn_of_backward_hooks(name: str) -> None:
    warnings.warn(
        f"albert_fast: backward hooks on {name} do not run: torch runs those of a module that returns tensors, not an "
        f"output with fields; register them on {name}.encoder or on tensors",
        stacklevel=3,
    )
