"""The decoder: layers that share weights; each attends to the target so far, then to the source.

Modules have the names of Hugging Face's ELECTRA as a decoder, whose factorised embeddings and prediction head are ALBERT's.
Only layers with weights of their own are held: layer n of the file is group n.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers.attention import FusedQKV
from ..layers.cache import DecoderCache, KeyRows
from ..layers.embeddings import Embeddings, FactorisedEmbeddings
from ..layers.inputs import PackedInputs
from ..layers.packing import Packing
from ..layers.run import Run
from ..layers.single_layers import Named
from ..layers.spec import LayerSpec
from .bert import BERTAttention, BERTLayer
from .head_model import LMParts
from .seq2seq_config import ALBERTSeq2SeqConfig


class Past(NamedTuple):
    """What the decoder of one batch keeps from token to token.

    source: the source's keys and values of each group. fused: query, key and value of each group, see `Decoder.fused_once`.
    """

    cache: DecoderCache
    source: Sequence[KeyRows]
    fused: Sequence[FusedQKV | None]


class CausalAttention(BERTAttention):
    """Attention of every token to itself and the tokens before it."""

    causal = True


class DecoderLayer(BERTLayer):
    """A layer: `attention` to the target, `crossattention` to the source, then the feed-forward network."""

    attention: Any

    def build(self, spec: LayerSpec) -> None:
        super().build(spec)
        self.attention = CausalAttention(spec)
        self.crossattention = BERTAttention(spec)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, packing: Packing, source: KeyRows, run: Run, fused: FusedQKV | None = None
    ) -> Tensor:
        """(T, H) -> (T, H) of whole targets; `source` has the keys and values of `crossattention`."""
        attended = self.attention(hidden, packing, None, run, fused)
        return self.feed_forward(self.crossattention.attend_source(attended, packing, source, run), run)

    def next_token(
        self,
        hidden: Tensor,
        packing: Packing,
        source: KeyRows,
        cache: DecoderCache,
        step: int,
        run: Run,
        fused: FusedQKV | None,
    ) -> Tensor:
        """(B, H), the next token of each target -> (B, H), as the layer that runs at `step`."""
        attended = self.attention.attend_cache(hidden, packing, cache, step, run, fused)
        return self.feed_forward(self.crossattention.attend_source(attended, packing, source, run), run)


class PredictionTransform(nn.Module):
    """The parts before the output table: (N, H) -> dense, GELU and LayerNorm (N, E)."""

    def __init__(self, config: ALBERTSeq2SeqConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)


class Decoder(nn.Module):
    """Target tokens and the encoder's states -> states (T, H) and scores of the next token.

    Args:
        words: the encoder's word embeddings, which the decoder reads and its output shares.
    """

    def __init__(self, config: ALBERTSeq2SeqConfig, words: nn.Embedding) -> None:
        super().__init__()
        spec = config.decoder_spec()
        own = config.decoder_config()
        self.group_indices = own.group_indices()
        rows = config.vocab_size, config.max_position_embeddings, config.decoder_type_vocab_size
        factorised = config.embedding_size != config.hidden_size
        numbers = config.embedding_size, config.layer_norm_eps, config.pad_token_id, config.hidden_dropout_prob
        embeddings = (FactorisedEmbeddings if factorised else Embeddings)(rows, *numbers)
        embeddings.word_embeddings = words
        parts: dict[str, nn.Module] = {"embeddings": embeddings}
        if factorised:
            parts["embeddings_project"] = nn.Linear(config.embedding_size, config.hidden_size)
        layers = nn.ModuleList(DecoderLayer(spec) for _ in range(own.num_hidden_groups))
        self.electra: Any = Named({**parts, "encoder": Named({"layer": layers})})
        self.generator_predictions = PredictionTransform(config)
        self.generator_lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self.generator_lm_head.weight = words.weight

    def layers(self) -> list[DecoderLayer]:
        """The layers that have weights of their own; `group_indices` says which runs when."""
        return list(self.electra.encoder.layer)

    def parts(self) -> LMParts:
        """The head that scores words."""
        head = self.generator_predictions
        return LMParts(head.dense, head.LayerNorm, self.generator_lm_head, "gelu_erf", "decoder")

    def embed(self, ids: Tensor, positions: Tensor, backend: str) -> Tensor:
        """Ids and positions (T,) -> (T, H)."""
        tokens = PackedInputs(ids, None, positions, None)
        parts = self.electra._modules
        projection = (parts["embeddings_project"],) if "embeddings_project" in parts else ()
        embedded: Tensor = parts["embeddings"](tokens, torch.zeros_like(positions), *projection, backend)
        return embedded

    def source_rows(self, states: Tensor, packing: Packing) -> list[KeyRows]:
        """The keys and values of the source's states (Ts, H), of each layer with weights of its own: once for all its steps."""
        return [layer.crossattention.source_rows(states, packing) for layer in self.layers()]

    def fused_once(self) -> list[FusedQKV | None]:
        """`fused()` of each group's self-attention, for all tokens of a text: as Parameters, whose packed copies are kept."""
        every = [layer.attention.fused() for layer in self.layers()]
        return [None if one is None else (nn.Parameter(one[0], requires_grad=False), one[1]) for one in every]

    def forward(self, ids: Tensor, positions: Tensor, packing: Packing, source: Sequence[KeyRows], run: Run) -> Tensor:
        """Whole targets: ids and positions (T,) -> states (T, H)."""
        hidden, layers = self.embed(ids, positions, run.backend), self.layers()
        fused = [layer.attention.fused() for layer in layers]
        again = run.recompute == "layers" and torch.is_grad_enabled()
        for group in self.group_indices:
            arguments = hidden, packing, source[group], run, fused[group]
            hidden = checkpoint(layers[group], *arguments, use_reentrant=False) if again else layers[group](*arguments)
        return hidden

    def next_token(self, ids: Tensor, packing: Packing, past: Past, run: Run) -> Tensor:
        """The last token (B,) of each target so far -> its states (B, H). Without a gradient; the cache grows by a row each."""
        cache, layers = past.cache, self.layers()
        hidden = self.embed(ids, torch.full_like(ids, cache.length), run.backend)
        for step, group in enumerate(self.group_indices):
            hidden = layers[group].next_token(hidden, packing, past.source[group], cache, step, run, past.fused[group])
        cache.advance()
        return hidden


_LAYER = re.compile(r"(decoder\.electra\.encoder\.layer\.)(\d+)(\..*)")


def spread_layers(state: Mapping[str, Tensor], group_indices: Sequence[int]) -> dict[str, Tensor]:
    """`state` with a copy of a group's tensors for each layer that runs, as transformers names them."""
    spread = dict[str, Tensor]()
    for key, tensor in state.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            spread[key] = tensor
            continue
        for step, group in enumerate(group_indices):
            if group == int(match[2]):
                spread[f"{match[1]}{step}{match[3]}"] = tensor.clone()
    return spread


def gather_layers(state: Mapping[str, Tensor], group_indices: Sequence[int]) -> dict[str, Tensor]:
    """What `spread_layers` spread, as it was; a state of groups stays as it is.

    Raises:
        ValueError: layers of one group that differ.
    """
    numbers = [int(match[2]) for match in map(_LAYER.fullmatch, state) if match is not None]
    if max(numbers, default=0) <= max(group_indices):
        return dict(state)
    gathered, origin = dict[str, Tensor](), dict[str, str]()
    for key, tensor in state.items():
        match = _LAYER.fullmatch(key)
        own = key
        if match is not None and int(match[2]) < len(group_indices):
            own = f"{match[1]}{group_indices[int(match[2])]}{match[3]}"
        if own in gathered and not torch.equal(gathered[own], tensor):
            raise ValueError(
                f"{key!r} differs from {origin[own]!r}: the configuration has {max(group_indices) + 1} groups of decoder "
                "layers that share weights (decoder: num_hidden_groups)"
            )
        gathered[own], origin[own] = tensor, key
    return gathered
