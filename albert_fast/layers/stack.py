"""Embedding and the shared layer, in operator names: what happens to the T real tokens of a packed batch.

For inference all layers can be one operator, `encoder` (see `Encoder.in_one_call`); for a gradient, dropout or the states in
between they run operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..models.config import ALBERTConfig
from ..quantization.rounding import Fit, QuantizedAttention, QuantizedLinear
from ..runtime import dispatch
from ..runtime.linear import linear
from ..runtime.registration import is_traced
from ..runtime.unused_gradients import watch_graph
from .adapters import check_read, is_hooked, is_linear, product
from .attention import Attention, Fused, add_norm, dropout
from .packing import Packing, Queries, take

# What a backward computes again instead of finding it kept: nothing; the FFN's activations, one of a layer's two largest
# arrays (T, I) at the price of a pass over memory; or layers as a whole, of which the input (T, H) alone is kept.
RECOMPUTE = ("nothing", "activations", "layers")
_MAY_NEED_GRADIENT = "a gradient may be asked for: torch.no_grad() says that it is not"
_NOT_FASTER = "one kernel was not measured faster: ALBERT_FAST_TUNE=1 measures, backend='triton' takes it"


class Embeddings(nn.Module):
    """Word, position and type tables of width E and their LayerNorm (section 3.1: factorised)."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(
        self,
        ids: Tensor | None,
        types: Tensor,
        positions: Tensor,
        embeds: Tensor | None,
        projection: nn.Linear,
        backend: str,
    ) -> Tensor:
        words, norm = self.word_embeddings, self.LayerNorm
        for name, part in self._modules.items():
            check_read(part, nn.LayerNorm if name == "LayerNorm" else nn.Embedding, name)  # type: ignore[arg-type]
        check_read(projection, nn.Linear, "encoder.embedding_hidden_mapping_in")
        p, seed = dropout(self, self.dropout_p)
        return ops.embedding_projection(
            ids, types, positions, words.weight, self.token_type_embeddings.weight, self.position_embeddings.weight,
            norm.weight, norm.bias, projection.weight, projection.bias, norm.eps,
            -1 if words.padding_idx is None else words.padding_idx, p, seed, inputs_embeds=embeds, backend=backend,
        )  # fmt: skip


class Encoder(nn.Module):
    """The layer of each group, num_hidden_layers times."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = "nothing"  # of RECOMPUTE
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.albert_layer_groups = nn.ModuleList(LayerGroup(config) for _ in range(config.num_hidden_groups))

    def order(self) -> list[int]:
        """The distinct layer of each step, counted over all groups: num_hidden_layers x inner_group_num."""
        config = self.config
        groups = [config.group_of_layer(i) for i in range(config.num_hidden_layers)]
        return [group * config.inner_group_num + inner for group in groups for inner in range(config.inner_group_num)]

    def distinct(self) -> list[Layer]:
        """The layers that have weights of their own, group after group."""
        return [layer for group in self.albert_layer_groups for layer in group.albert_layers]  # type: ignore[union-attr]

    def is_plain(self) -> bool:
        """Whether the layers compute just what the encoder operators do: see `Layer.is_plain`; no hooks on groups."""
        groups = self.albert_layer_groups
        return not any(is_hooked(group) for group in groups) and all(layer.is_plain() for layer in self.distinct())

    @property
    def quantized(self) -> str | None:
        """The precision that the layers' weights were rounded to, "int8" say; None where they are floats."""
        first: Any = self.distinct()[0].ffn
        return first.precision if isinstance(first, QuantizedLinear) else None

    def in_one_call(self, hidden: Tensor, backend: str, run: Callable[[str], Tensor] | None = None) -> str | None:
        """None where the `encoder` operator runs all layers on such states (T, H), else why it does not.

        On a CPU it is C++, for "auto" and "cpp". On a GPU it is one persistent Triton kernel for few tokens: for "triton", and
        for "auto" where ALBERT_FAST_TUNE=1 measured it faster than the operators for about so many tokens. `run` computes
        the layers on the backend "triton" or "operators", to measure what is not known yet.
        """
        device, op = hidden.device.type, "encoder"
        if is_traced():
            return "a compiler traces the operators"
        chosen = dispatch.runnable_on(op, device)[0] if backend == "auto" else backend
        if chosen == "reference" or chosen not in dispatch.runnable_on(op, device):
            return f"no kernel runs on {device}" if backend == "auto" else f"backend={backend!r} was asked for"
        if reason := dispatch.why_not(op, device, chosen, hidden.dtype):
            return reason
        if torch.is_autocast_enabled(device):
            return "autocast is on"
        if self.training:
            return "the model is in training mode"
        weights = (parameter for layer in self.distinct() for parameter in layer.parameters())
        if torch.is_grad_enabled() and (hidden.requires_grad or any(weight.requires_grad for weight in weights)):
            return _MAY_NEED_GRADIENT
        # What costs nothing to ask comes first: most calls on a GPU end here.
        if chosen == "triton" and (reason := self._beyond_one_kernel(len(hidden), backend)):
            return reason
        if not self.is_plain():
            return "a layer has hooks or replaced parts"
        if chosen == "triton" and backend == "auto":
            config = self.config
            sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, len(self.order()))
            return None if ops.kernel_is_faster(hidden.dtype, len(hidden), sizes, run) else _NOT_FASTER
        return None

    def _beyond_one_kernel(self, tokens: int, backend: str) -> str | None:
        """What the persistent kernel is not for."""
        if tokens > ops.MAX_KERNEL_TOKENS:
            return f"{tokens} tokens: one kernel for all layers is for up to {ops.MAX_KERNEL_TOKENS}"
        if self.config.head_dim > ops.MAX_KERNEL_HEAD_DIM:
            return f"heads of {self.config.head_dim}: the Triton kernels take up to {ops.MAX_KERNEL_HEAD_DIM}"
        return _NOT_FASTER if backend == "auto" and not ops.kernels_are_compared() else None

    def forward(
        self, hidden: Tensor, packing: Packing, queries: Queries | None, backend: str,
        states: list[Tensor] | None = None, attentions: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """(T, H) -> (T, H), or (Tq, H) for `queries`; appends every layer's states and probabilities where lists are given."""
        if self.quantized is not None:
            return self._quantized(hidden, packing, queries, backend, states, attentions)
        if states is not None or attentions is not None:
            return self._by_operators(hidden, packing, queries, backend, states, attentions)

        def run(by: str) -> Tensor:
            if by == "operators":
                return self._by_operators(hidden, packing, queries, backend)
            distinct = self.distinct()
            first = distinct[0]
            rows, cu_rows = (None, None) if queries is None else (queries.rows, queries.cu_seqlens)
            return ops.encoder(
                hidden, [weight for layer in distinct for weight in layer.weights()], self.order(), packing.cu_seqlens, rows,
                cu_rows, first.attention.num_heads, first.attention.scale, first.full_layer_layer_norm.eps, first.act,
                backend=by,
            )  # fmt: skip

        reason = self.in_one_call(hidden, backend, run)
        out = run(backend if reason is None else "operators")
        if reason == _MAY_NEED_GRADIENT and out.device.type == "cpu":
            watch_graph(out)
        return out

    def _by_operators(
        self, hidden: Tensor, packing: Packing, queries: Queries | None, backend: str,
        states: list[Tensor] | None = None, attentions: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        if states is not None:
            states.append(hidden)
        # What a compiled graph computes again its partitioner decides; torch cannot trace checkpoints of changing lengths.
        recompute = self.recompute if torch.is_grad_enabled() and not is_traced() else "nothing"
        asked = queries if states is None and attentions is None else None  # else every token's are to be shown
        groups: list[Any] = list(self.albert_layer_groups)
        # Once a forward for each distinct layer, however often it is applied.
        fused = [None if is_hooked(group) else list(map(_fused_ahead, group.albert_layers)) for group in groups]
        last = self.config.num_hidden_layers - 1
        for step in range(last + 1):
            number = self.config.group_of_layer(step)
            group = groups[number]
            call = group if is_hooked(group) else group.forward  # a module's call costs as much as a launch
            wanted = asked if step == last else None
            hidden = call(hidden, packing, wanted, backend, recompute, states, attentions, fused[number])
        return hidden if queries is None or asked is not None else take(hidden, queries.rows)

    def _quantized(
        self, hidden: Tensor, packing: Packing, queries: Queries | None, backend: str, states: list[Tensor] | None,
        attentions: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        if attentions is not None:
            raise ValueError("output_attentions: integer layers run as a whole; load the model in fp32 for these")
        if self.training:
            raise RuntimeError("integer weights cannot be trained: load the model in fp32, or call eval()")
        distinct, order = self.distinct(), self.order()
        precision = distinct[0].products()[0].precision
        expected = dispatch.quantized_dtype(precision, hidden.device.type)
        # The reference has the arithmetic of either device.
        if hidden.dtype != expected and not (backend == "reference" and hidden.dtype == torch.bfloat16):
            raise TypeError(
                f"{precision} layers run in {expected} here, the model was converted to {hidden.dtype}: load it again"
            )
        if not self.is_plain():
            raise RuntimeError(
                "integer layers run as a whole: hooks on their parts and replaced parts would not be seen"
            )
        first = distinct[0]
        linears = [linear for layer in distinct for linear in layer.products()]
        vectors = [vector for layer in distinct for vector in layer.vectors()]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *vectors)):
            raise RuntimeError(
                "integer layers have no gradient: load the model in fp32, or run it under torch.no_grad()"
            )
        integers, scales, sums, rescales, shifts = map(
            list, zip(*(linear.tensors() for linear in linears), strict=True)
        )

        def run(hidden: Tensor, order: list[int], queries: Queries | None) -> Tensor:
            rows, cu_rows, max_rows = (None, None, None) if queries is None else (
                queries.rows, queries.cu_seqlens, queries.max_seqlen
            )  # fmt: skip
            return ops.quantized_encoder(
                hidden, vectors, integers, scales, sums, rescales, shifts, order, packing.cu_seqlens, rows, cu_rows,
                first.attention.num_heads, first.attention.scale, first.full_layer_layer_norm.eps, first.act,
                precision=precision, sequence_order=packing.order, max_seqlen=packing.max_seqlen, max_wanted=max_rows,
                backend=backend,
            )  # fmt: skip

        if states is None:
            return run(hidden, order, queries)
        states.append(hidden)
        for number in order:
            hidden = run(hidden, [number], None)
            states.append(hidden)
        return hidden if queries is None else take(hidden, queries.rows)


class LayerGroup(nn.Module):
    """The inner_group_num layers that share one group's index; the names of Hugging Face's state_dict."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.albert_layers = nn.ModuleList(Layer(config) for _ in range(config.inner_group_num))

    def forward(
        self, hidden: Tensor, packing: Packing, queries: Queries | None, backend: str, recompute: str,
        states: list[Tensor] | None = None, attentions: list[Tensor] | None = None, fused: list[Fused | None] | None = None,
    ) -> Tensor:  # fmt: skip
        """(T, H) -> (T, H), or (Tq, H) for `queries`; `recompute` is one of RECOMPUTE, `fused` what is joined already."""
        last = len(self.albert_layers) - 1
        for inner, layer in enumerate(self.albert_layers):
            wanted = queries if inner == last else None
            joined = None if fused is None else fused[inner]
            arguments = (hidden, packing, wanted, backend, attentions, recompute == "activations", joined)
            # Run twice, a layer would append its probabilities twice.
            again = recompute == "layers" and attentions is None
            hidden = checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
            if states is not None:
                states.append(hidden)
        return hidden


class Layer(nn.Module):
    """attention, add_layer_norm, FFN, add_layer_norm; every bias rides in the fused operator with its product or behind it."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.full_layer_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention: Any = Attention(config)  # or a QuantizedAttention: see `place`
        self.ffn = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = config.activation
        # Google's code applies this dropout, Hugging Face's does not; the configuration says which.
        self.dropout_p = config.hidden_dropout_prob if config.ffn_output_dropout else 0.0

    def weights(self) -> list[Tensor]:
        """What `ops.encoder` reads, in the order of `ops.WEIGHTS`."""
        a, norm = self.attention, self.full_layer_layer_norm
        modules = (a.query, a.key, a.value, a.dense, a.LayerNorm, self.ffn, self.ffn_output, norm)
        return [parameter for module in modules for parameter in (module.weight, module.bias)]

    def products(self) -> list[Any]:
        """The four products, in the order of `ops.quantized_encoder.PRODUCTS`: integers, or Linears to make them of."""
        a = self.attention
        return [a.qkv if isinstance(a, QuantizedAttention) else a.as_one_linear(), a.dense, self.ffn, self.ffn_output]

    def vectors(self) -> list[Tensor]:
        """What `ops.quantized_encoder` reads beside the products, in the order of its `VECTORS`."""
        a, norm = self.attention, self.full_layer_layer_norm
        return [a.qkv.bias, a.dense.bias, a.LayerNorm.weight, a.LayerNorm.bias, self.ffn.bias, self.ffn_output.bias,
                norm.weight, norm.bias]  # fmt: skip

    def inputs(self, hidden: Tensor, packing: Packing) -> tuple[list[Tensor], Tensor]:
        """What each of `products` is given (T, K) in a float32 layer, and the layer's result: to calibrate integers."""
        a, norm = self.attention, self.full_layer_layer_norm
        q, k, v = a.query_key_value(hidden, hidden, a.fused())
        cu, longest = packing.cu_seqlens, packing.max_seqlen
        context = ops.attention(q, k, v, cu, cu, longest, longest, a.num_heads, a.scale)
        attended = add_norm(linear(context, a.dense.weight), a.dense.bias, hidden, a.LayerNorm, self, 0.0, "auto")
        middle = ops.bias_gelu(linear(attended, self.ffn.weight), self.ffn.bias, self.act)
        down = linear(middle, self.ffn_output.weight)
        out = add_norm(down, self.ffn_output.bias, attended, norm, self, 0.0, "auto")
        return [hidden, context, attended, middle], out

    def rounded(self, precision: str, fit: Fit, inputs: Sequence[Tensor | None] = (None,) * 4) -> list[QuantizedLinear]:
        """The four Linears in integers; `inputs` are what each was given: see `QuantizedLinear.rounded`."""
        linears = zip(ops.PRODUCTS, self.products(), inputs, strict=True)
        return [QuantizedLinear.rounded(name, old, precision, fit, x) for name, old, x in linears]

    def place(self, linears: list[Any]) -> None:
        """Put these QuantizedLinears, in the order of `ops.PRODUCTS`, in the place of the float ones."""
        # In the layer's mode: of a new module it is training, which graphs are not for.
        qkv, dense, self.ffn, self.ffn_output = (linear.train(self.training) for linear in linears)
        self.attention = QuantizedAttention(self.attention, qkv, dense)

    def is_plain(self) -> bool:
        """Whether the layer computes just what the encoder operators do: no hook, no part replaced, parametrised or absent."""
        return all(
            type(module) in _PLAIN
            and not is_hooked(module)
            and all(parameter is not None for parameter in module._parameters.values())
            for module in self.modules()
        )

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        queries: Queries | None,
        backend: str,
        attentions: list[Tensor] | None = None,
        recompute_activations: bool = False,
        fused: Fused | None = None,
    ) -> Tensor:
        attended = self.attention(hidden, packing, queries, backend, attentions, fused)
        if recompute_activations:
            up = product(self.ffn, attended)
            # What stands in the place of a Linear may drop; ours replays the seeds that it was given.
            draws = not is_linear(self.ffn_output)
            down, bias = checkpoint(self._down, *up, backend, use_reentrant=False, preserve_rng_state=draws)
        elif fuses_ffn(hidden.device.type) and is_linear(self.ffn) and self.ffn.bias is not None:
            middle = ops.linear_gelu(attended, self.ffn.weight, self.ffn.bias, self.act, backend=backend)
            down, bias = product(self.ffn_output, middle)
        else:
            down, bias = self._down(*product(self.ffn, attended), backend)
        return add_norm(down, bias, attended, self.full_layer_layer_norm, self, self.dropout_p, backend)

    def _down(self, up: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """The FFN behind its first product, and the bias that is still to be added."""
        return product(self.ffn_output, ops.bias_gelu(up, bias, self.act, backend=backend))


def fuses_ffn(device_type: str) -> bool:
    """Whether the FFN's first product and its activation are one operator, `linear_gelu`.

    On a CPU oneDNN's product and bias_gelu are as good. Under autocast torch's Linear takes its weight from a cache, so that
    a layer that runs twelve times has it rounded once; an operator of ours would round it, and keep it, twelve times.
    """
    return device_type == "cuda" and not torch.is_autocast_enabled(device_type)


_PLAIN = (Layer, Attention, QuantizedAttention, nn.Linear, QuantizedLinear, nn.LayerNorm)


def _fused_ahead(layer: nn.Module) -> Fused | None:
    """`Attention.fused` for all applications of a layer in one forward; None where each application must look for itself:
    a wrapper (FSDP) or a hook may put weights in place only while the layer is called."""
    if type(layer) is not Layer or type(layer.attention) is not Attention:
        return None
    return None if is_hooked(layer) or is_hooked(layer.attention) else layer.attention.fused()
