"""Token embeddings: word, position and type tables and their LayerNorm, and ALBERT's projection to the hidden size."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .adapters import check_read
from .attention import dropout
from .inputs import PackedInputs


class FactorisedEmbeddings(nn.Module):
    """Looks up and normalises token embeddings (T, E), then projects them to (T, H) with the encoder's
    `embedding_hidden_mapping_in` (section 3.1).

    Args:
        rows: of the tables of words, positions and types.
        width: E.
        eps: of the LayerNorm.
        padding_idx: the word whose embedding gets no gradient.
        dropout_p: probability, applied to the LayerNorm's result.
    """

    def __init__(
        self, rows: tuple[int, int, int], width: int, eps: float, padding_idx: int | None, dropout_p: float
    ) -> None:
        super().__init__()
        words, positions, types = rows
        self.word_embeddings = nn.Embedding(words, width, padding_idx=padding_idx)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout_p = dropout_p

    def forward(self, tokens: PackedInputs, types: Tensor, projection: nn.Linear, backend: str) -> Tensor:
        """(T,) ids or (T, E) embeddings of `tokens`, with `types` (T,) -> (T, H)."""
        words, norm = self.word_embeddings, self.LayerNorm
        for name, module in self._modules.items():
            check_read(module, nn.LayerNorm if name == "LayerNorm" else nn.Embedding, name)  # type: ignore[arg-type]
        check_read(projection, nn.Linear, "encoder.embedding_hidden_mapping_in")
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
