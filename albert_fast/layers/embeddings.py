"""Token embeddings: word, position and type tables and their LayerNorm; ALBERT and ELECTRA project them to the hidden size."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .adapters import check_read, is_linear, project
from .attention import dropout
from .inputs import PackedInputs


class Embeddings(nn.Module):
    """Tables of width E and their LayerNorm (Devlin et al. 2018, figure 2).

    Args:
        rows: of the tables of words, positions and types; 0 types: there is no such table.
        width: E.
        eps: of the LayerNorm.
        padding_idx: the word whose embedding gets no gradient.
        dropout_p: probability, applied to the LayerNorm's result.
        position_padding_idx: the position whose embedding gets no gradient.
    """

    operator = "embedding_layer_norm"

    def __init__(
        self,
        rows: tuple[int, int, int],
        width: int,
        eps: float,
        padding_idx: int | None,
        dropout_p: float,
        position_padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        words, positions, types = rows
        self.word_embeddings = nn.Embedding(words, width, padding_idx=padding_idx)
        self.position_embeddings = nn.Embedding(positions, width, padding_idx=position_padding_idx)
        if types:
            self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout_p = dropout_p

    def sizes(self) -> tuple[int, int, int]:
        """Rows of the tables of words, types (0 without them) and positions, in the order of the operators."""
        types = self.token_type_embeddings.num_embeddings if "token_type_embeddings" in self._modules else 0
        return self.word_embeddings.num_embeddings, types, self.position_embeddings.num_embeddings

    def check_parts(self) -> None:
        """RuntimeError where a table or the LayerNorm was replaced by a module that would have to be called."""
        for name, module in self._modules.items():
            check_read(module, nn.LayerNorm if name == "LayerNorm" else nn.Embedding, name)  # type: ignore[arg-type]

    def forward(self, tokens: PackedInputs, types: Tensor, backend: str) -> Tensor:
        """(T,) ids or (T, E) embeddings of `tokens`, with `types` (T,) -> (T, E)."""
        self.check_parts()
        words, positions, norm = self.word_embeddings, self.position_embeddings, self.LayerNorm
        typed = "token_type_embeddings" in self._modules
        p, seed = dropout(self, self.dropout_p)
        return ops.embedding_layer_norm(
            tokens.ids,
            types if typed else None,
            tokens.positions,
            words.weight,
            self.token_type_embeddings.weight if typed else None,
            positions.weight,
            norm.weight,
            norm.bias,
            norm.eps,
            -1 if words.padding_idx is None else words.padding_idx,
            p,
            seed,
            inputs_embeds=tokens.embeds,
            position_padding_idx=-1 if positions.padding_idx is None else positions.padding_idx,
            backend=backend,
        )


class FactorisedEmbeddings(Embeddings):
    """Looks up and normalises token embeddings (T, E), then projects them to (T, H) with the encoder's
    `embedding_hidden_mapping_in` (Lan et al. 2019, section 3.1)."""

    operator = "embedding_projection"

    def forward(  # type: ignore[override]
        self, tokens: PackedInputs, types: Tensor, projection: nn.Linear, backend: str
    ) -> Tensor:
        """(T,) ids or (T, E) embeddings of `tokens`, with `types` (T,) -> (T, H)."""
        if not is_linear(projection) or projection.bias is None:  # an adapter, a hook
            return project(projection, super().forward(tokens, types, backend))
        words, norm = self.word_embeddings, self.LayerNorm
        self.check_parts()
        p, seed = dropout(self, self.dropout_p)
        return ops.embedding_projection(
            tokens.ids,
            types,
            tokens.positions,
            words.weight,
            self.token_type_embeddings.weight,
            self.position_embeddings.weight,
            norm.weight,
            norm.bias,
            projection.weight,
            projection.bias,
            norm.eps,
            -1 if words.padding_idx is None else words.padding_idx,
            p,
            seed,
            inputs_embeds=tokens.embeds,
            backend=backend,
        )
