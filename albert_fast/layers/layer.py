"""One encoder layer on packed tokens (T, H): self-attention, add_layer_norm, feed-forward network, add_layer_norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from .adapters import is_hooked, is_linear, product
from .attention import Attention, FusedQKV, add_norm
from .packing import Packing
from .quantized import QuantizedAttention, QuantizedLinear
from .run import Run
from .spec import LayerSpec
from .wanted import WantedRows


class Layer(nn.Module):
    """Every bias is added by the fused operator that follows its product, or by the product itself.

    The names of modules are those of Hugging Face's ALBERT.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.full_layer_layer_norm = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.attention: Any = Attention(spec)  # or a QuantizedAttention: see `place_quantized`
        self.ffn = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.ffn_output = nn.Linear(spec.intermediate_size, spec.hidden_size)
        self.act = spec.activation
        self.dropout_p = spec.ffn_dropout

    def forward(
        self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run, fused: FusedQKV | None = None
    ) -> Tensor:
        """(T, H) -> (T, H), or (Tq, H) for the rows that are wanted. `fused` is the attention's `fused()`, if known."""
        attended = self.attention(hidden, packing, wanted, run, fused)
        if run.recompute == "activations":
            up = product(self.ffn, attended)
            # A replaced Linear may draw random numbers; our own dropout replays the seeds that it was given.
            draws = not is_linear(self.ffn_output)
            down = checkpoint(self._down, *up, run, use_reentrant=False, preserve_rng_state=draws)
        elif fuses_ffn(hidden.device.type) and is_linear(self.ffn) and self.ffn.bias is not None:
            middle = ops.linear_gelu(attended, self.ffn.weight, self.ffn.bias, self.act, backend=run.backend)
            down = product(self.ffn_output, middle)
        else:
            down = self._down(*product(self.ffn, attended), run)
        if run.listen is not None:
            run.listen(self.ffn, attended)
        return add_norm(down, attended, self.full_layer_layer_norm, self, run)

    def _down(self, up: Tensor, bias: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """The activation and the second product (T, H), with the bias (H,) that is still to be added."""
        middle = ops.bias_gelu(up, bias, self.act, backend=run.backend)
        if run.listen is not None:
            run.listen(self.ffn_output, middle)
        return product(self.ffn_output, middle)

    def weights(self) -> list[Tensor]:
        """The tensors that `ops.encoder` reads, in its order."""
        a, norm = self.attention, self.full_layer_layer_norm
        modules = (a.query, a.key, a.value, a.dense, a.LayerNorm, self.ffn, self.ffn_output, norm)
        return [parameter for module in modules for parameter in (module.weight, module.bias)]

    def numbers(self) -> tuple[int, float, float, str]:
        """num_heads, softmax_scale, eps and activation, as the encoder operators take them."""
        return self.attention.num_heads, self.attention.scale, self.full_layer_layer_norm.eps, self.act

    def products(self) -> list[Any]:
        """The four products in the order of `ops.PRODUCTS`: QuantizedLinears, or Linears to round."""
        a = self.attention
        return [a.qkv if isinstance(a, QuantizedAttention) else a.as_one_linear(), a.dense, self.ffn, self.ffn_output]

    def product_modules(self) -> list[nn.Module]:
        """The modules under which `Run.listen` hears the inputs of `products`."""
        return [self.attention, self.attention.dense, self.ffn, self.ffn_output]

    def vectors(self) -> list[Tensor]:
        """The tensors that `ops.quantized_encoder` reads beside the products, in its order."""
        a, norm = self.attention, self.full_layer_layer_norm
        biases = a.qkv.bias, a.dense.bias, self.ffn.bias, self.ffn_output.bias
        return [*biases[:2], a.LayerNorm.weight, a.LayerNorm.bias, *biases[2:], norm.weight, norm.bias]

    def place_quantized(self, linears: Sequence[QuantizedLinear]) -> None:
        """Replace the four products by these, in the order of `ops.PRODUCTS`."""
        # In the layer's mode: a new module is in training mode, which CUDA graphs refuse.
        qkv, dense, self.ffn, self.ffn_output = (linear.train(self.training) for linear in linears)  # type: ignore[assignment]
        self.attention = QuantizedAttention(self.attention, qkv, dense)

    def is_plain(self) -> bool:
        """Whether the layer computes exactly what the encoder operators do: nothing hooked, replaced or parametrised."""
        return all(
            type(module) in _PLAIN
            and not is_hooked(module)
            and all(parameter is not None for parameter in module._parameters.values())
            for module in self.modules()
        )


_PLAIN = (Layer, Attention, QuantizedAttention, nn.Linear, QuantizedLinear, nn.LayerNorm)


def fuses_ffn(device_type: str) -> bool:
    """Whether the first product of the feed-forward network and its activation are one operator, `linear_gelu`.

    On a CPU oneDNN's product and bias_gelu are as fast. Under autocast torch's Linear takes its weight from a cache: a layer
    that runs twelve times has it rounded once. Our operator would round it, and keep it, twelve times.
    """
    return device_type == "cuda" and not torch.is_autocast_enabled(device_type)


def fused_ahead(layer: nn.Module) -> FusedQKV | None:
    """The attention's `fused()` for all steps of a forward that run this layer. None where each step must find out itself: a
    wrapper (FSDP) or a hook may put weights into the layer only while it is called."""
    if type(layer) is not Layer or type(layer.attention) is not Attention:
        return None
    return None if is_hooked(layer) or is_hooked(layer.attention) else layer.attention.fused()
