"""The sizes and options of one encoder layer, whatever family of models it belongs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSpec:
    """What a layer is built from.

    activation: "gelu_tanh", "gelu_erf" or "relu", as the kernels name it.
    attention_dropout, hidden_dropout, ffn_dropout: probabilities, of the attention's probabilities, of the attention's
    output and of the feed-forward network's output.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    layer_norm_eps: float
    activation: str
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    ffn_dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
