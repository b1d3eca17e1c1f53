"""How one forward runs its layers, and what it collects on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

# What a backward computes again instead of keeping it: nothing; the activations of the feed-forward network, one of a layer's
# two largest arrays (T, I), for one more pass over memory; or whole layers, of which only the input (T, H) is kept.
RECOMPUTE = ("nothing", "activations", "layers")


class Run(NamedTuple):
    """Options of one forward.

    backend: "auto", or the backend of every operator that has it. recompute: one of RECOMPUTE.
    states: every layer's hidden states are appended to it. attentions: every layer's probabilities are.
    listen: called with a module and the input (T, K) of its product; an Attention stands for query, key and value.
    """

    backend: str = "auto"
    recompute: str = "nothing"
    states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    listen: Callable[[nn.Module, Tensor], None] | None = None

    @property
    def collects(self) -> bool:
        """Whether every token of every layer is wanted."""
        return self.states is not None or self.attentions is not None
