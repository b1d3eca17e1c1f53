"""One layer on packed tokens (T, H): self-attention, add_layer_norm, feed-forward network, add_layer_norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from .adapters import is_hooked, is_linear, product
from .attention import Attention, FusedQKV, add_norm
from .packed import PackedLinear, packed_linears
from .packing import Packing
from .quantized import QuantizedAttention, QuantizedLinear
from .run import Run
from .spec import LayerSpec
from .wanted import WantedRows


class Layer(nn.Module):
    """Every bias is added by the fused operator that follows its product, or by the product itself.

    The names of modules are those of Hugging Face's ALBERT. A subclass of a family that names or nests them otherwise builds
    them in `build`, and says where they are with the properties `up`, `down`, `norm` and `attention_norm`.
    """

    plain_types: ClassVar[tuple[type[nn.Module], ...]] = ()  # of all modules of a layer without replaced parts
    attention: Any  # an Attention, or a QuantizedAttention: see `place_quantized`

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.act = spec.activation
        self.dropout_p = spec.ffn_dropout
        self.build(spec)

    ffn: Any
    ffn_output: Any

    def build(self, spec: LayerSpec) -> None:
        """Make the modules."""
        self.full_layer_layer_norm = nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.attention = Attention(spec)
        self.ffn = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.ffn_output = nn.Linear(spec.intermediate_size, spec.hidden_size)

    @property
    def up(self) -> Any:
        """The first product of the feed-forward network, H -> I: a Linear or a QuantizedLinear."""
        return self.ffn

    @property
    def down(self) -> Any:
        """The second product of the feed-forward network, I -> H."""
        return self.ffn_output

    @property
    def norm(self) -> Any:
        """The LayerNorm at the layer's end."""
        return self.full_layer_layer_norm

    @property
    def attention_norm(self) -> Any:
        """The LayerNorm after the attention."""
        return self.attention.LayerNorm

    def attend(
        self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run, fused: FusedQKV | None
    ) -> Tensor:
        """The attention with its LayerNorm, (T, H) -> (T, H) or (Tq, H)."""
        attended: Tensor = self.attention(hidden, packing, wanted, run, fused)
        return attended

    def forward(
        self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run, fused: FusedQKV | None = None
    ) -> Tensor:
        """(T, H) -> (T, H), or (Tq, H) for the rows that are wanted. `fused` is the attention's `fused()`, if known."""
        return self.feed_forward(self.attend(hidden, packing, wanted, run, fused), run)

    def feed_forward(self, attended: Tensor, run: Run) -> Tensor:
        """The feed-forward network with its LayerNorm, (T, H) -> (T, H)."""
        ffn = self.up
        if run.recompute == "activations":
            up = product(ffn, attended)
            # A replaced Linear may draw random numbers; our own dropout replays the seeds that it was given.
            draws = not is_linear(self.down)
            down = checkpoint(self._down, *up, run, use_reentrant=False, preserve_rng_state=draws)
        elif fuses_ffn(attended.device.type) and is_linear(ffn) and ffn.bias is not None:
            middle = ops.linear_gelu(attended, ffn.weight, ffn.bias, self.act, backend=run.backend)
            down = product(self.down, middle)
        else:
            down = self._down(*product(ffn, attended), run)
        if run.listen is not None:
            run.listen(ffn, attended)
        return add_norm(down, attended, self.norm, self, run)

    def _down(self, up: Tensor, bias: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """The activation and the second product (T, H), with the bias (H,) that is still to be added."""
        middle = ops.bias_gelu(up, bias, self.act, backend=run.backend)
        if run.listen is not None:
            run.listen(self.down, middle)
        return product(self.down, middle)

    def weights(self) -> list[Tensor]:
        """The tensors that `ops.encoder` reads, in its order."""
        a = self.attention
        modules = (a.query, a.key, a.value, a.dense, self.attention_norm, self.up, self.down, self.norm)
        return [parameter for module in modules for parameter in (module.weight, module.bias)]

    def numbers(self) -> tuple[int, float, float, str]:
        """num_heads, softmax_scale, eps and activation, as the encoder operators take them."""
        return self.attention.num_heads, self.attention.scale, self.norm.eps, self.act

    def products(self) -> list[Any]:
        """The four products in the order of `ops.PRODUCTS`: QuantizedLinears, or Linears to round."""
        a = self.attention
        return [a.qkv if isinstance(a, QuantizedAttention) else a.as_one_linear(), a.dense, self.up, self.down]

    def product_modules(self) -> list[nn.Module]:
        """The modules under which `Run.listen` hears the inputs of `products`."""
        return [self.attention, self.attention.dense, self.up, self.down]

    def vectors(self) -> list[Tensor]:
        """The tensors that `ops.quantized_encoder` reads beside the products, in its order."""
        a, inner, norm = self.attention, self.attention_norm, self.norm
        biases = a.qkv.bias, a.dense.bias, self.up.bias, self.down.bias
        return [*biases[:2], inner.weight, inner.bias, *biases[2:], norm.weight, norm.bias]

    def place_quantized(self, linears: Sequence[QuantizedLinear]) -> None:
        """Replace the four products by these, in the order of `ops.PRODUCTS`."""
        # In the layer's mode: a new module is in training mode, which CUDA graphs refuse.
        qkv, dense, up, down = (linear.train(self.training) for linear in linears)
        self.place_ffn(up, down)
        self.attention = QuantizedAttention(self.attention, qkv, dense)

    def place_packed(self) -> None:
        """Replace the six Linears by their packed matrices.

        Raises:
            As `packed_linears`.
        """
        a = self.attention
        linears = [a.query, a.key, a.value, a.dense, self.up, self.down]
        packed = packed_linears(linears)
        new = {id(old): module.train(self.training) for old, module in zip(linears, packed, strict=True)}
        for parent in list(self.modules()):
            for name, child in list(parent._modules.items()):
                if id(child) in new:
                    setattr(parent, name, new[id(child)])

    def packed_vectors(self) -> list[Tensor]:
        """The tensors that `ops.packed_encoder` reads beside the packed matrices, in its order."""
        a, inner, norm = self.attention, self.attention_norm, self.norm
        biases = [module.bias for module in (a.query, a.key, a.value, a.dense)]
        return [*biases, inner.weight, inner.bias, self.up.bias, self.down.bias, norm.weight, norm.bias]

    def place_ffn(self, up: nn.Module, down: nn.Module) -> None:
        """Replace the two products of the feed-forward network."""
        self.ffn, self.ffn_output = up, down

    def is_plain(self) -> bool:
        """Whether the layer computes exactly what the encoder operators do: nothing hooked, replaced or parametrised."""
        return all(
            type(module) in self.plain_types
            and not is_hooked(module)
            and all(parameter is not None for parameter in module._parameters.values())
            for module in self.modules()
        )


# The modules whose computation the operators know: those of a layer that is nothing but itself.
PLAIN_PARTS = (QuantizedAttention, nn.Linear, QuantizedLinear, PackedLinear, nn.LayerNorm)
Layer.plain_types = (Layer, Attention, *PLAIN_PARTS)


def fuses_ffn(device_type: str) -> bool:
    """Whether the first product of the feed-forward network and its activation are one operator, `linear_gelu`.

    On a CPU oneDNN's product and bias_gelu are as fast. Under autocast torch's Linear takes its weight from a cache: a layer
    that runs twelve times has it rounded once. Our operator would round it, and keep it, twelve times.
    """
    return device_type == "cuda" and not torch.is_autocast_enabled(device_type)


def fused_ahead(layer: Any) -> FusedQKV | None:
    """The attention's `fused()` for all steps of a forward that run this layer. None where each step must find out itself: a
    wrapper (FSDP) or a hook may put weights into the layer only while it is called."""
    plain = getattr(layer, "plain_types", ())  # a wrapper passes on what it wraps, but is of none of the types
    if (
        type(layer) not in plain
        or type(layer.attention) not in plain
        or isinstance(layer.attention, QuantizedAttention)
    ):
        return None
    attention: Attention = layer.attention
    return None if is_hooked(layer) or is_hooked(attention) else attention.fused()
