"""The encoder's result while its tokens are still packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .packing import Packing
from .wanted import WantedTokens


@dataclass(frozen=True)
class Encoded:
    """The encoder's result before it is unpacked.

    hidden: (T, H), or (N, H) of the tokens that were wanted. pooled: (B, H). hidden_states and attentions: of every layer,
    unpacked, where they were asked for.
    """

    packing: Packing
    wanted: WantedTokens
    hidden: Tensor
    pooled: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, output: Any, packing: Packing, wanted: WantedTokens) -> Encoded:
        """The output of a whole call of an encoder, packed again.

        Raises:
            TypeError: a hook returned something without last_hidden_state.
        """
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"the encoder returned no last_hidden_state (B, S, H): a hook made it {type(output).__name__}"
            )
        if wanted.which != "masked":
            hidden = packing.gather(hidden)
        return cls(packing, wanted, hidden, output.pooler_output, output.hidden_states, output.attentions)

    def scatter(self, per_token: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) -> (B, S, ...), `fill` at padding; (N, ...) of masked tokens stays as it is."""
        return per_token if self.wanted.which == "masked" else self.packing.scatter(per_token, fill)

    def labels(self, labels: Tensor) -> Tensor:
        """The labels, of (B, S) or (T,) as the batch came, of the tokens in `hidden`.

        Raises:
            ValueError: labels of another shape than the batch.
        """
        flat = self.hidden if self.wanted.mask is None else self.wanted.mask
        expected = flat.shape[:1] if self.packing.shape is None else self.packing.shape
        if labels.shape != expected:
            raise ValueError(f"labels {tuple(labels.shape)} do not fit the batch of {tuple(expected)}")
        packed = self.packing.gather(labels)
        return packed if self.wanted.mask is None else packed[self.packing.gather(self.wanted.mask)]
