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

from . import dispatch, ops
from .config import ALBERTConfig
from .gemm import linear
from .packing import Packing, Queries, take
from .parts import check_read, is_hooked, is_linear, product, project
from .quantization import Fit, QuantizedLinear
from .slices import split_columns

# What a backward computes again instead of finding it kept: nothing; the FFN's activations, one of a layer's two largest
# arrays (T, I) at the price of a pass over memory; or layers as a whole, of which the input (T, H) alone is kept.
RECOMPUTE = ("nothing", "activations", "layers")
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
        p, seed = _dropout(self, self.dropout_p)
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
        if torch.compiler.is_compiling():
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
            return "a gradient may be asked for: torch.no_grad() says that it is not"
        # What costs nothing to ask comes first: most calls on a GPU end here.
        if chosen == "triton" and (reason := self._beyond_one_kernel(len(hidden), backend)):
            return reason
        if not all(layer.is_plain() for layer in self.distinct()):
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

        return run(backend if self.in_one_call(hidden, backend, run) is None else "operators")

    def _by_operators(
        self, hidden: Tensor, packing: Packing, queries: Queries | None, backend: str,
        states: list[Tensor] | None = None, attentions: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        order, distinct = self.order(), self.distinct()
        if states is not None:
            states.append(hidden)
        for number in order[:-1]:
            hidden = self._layer(distinct[number], hidden, packing, None, backend, attentions)
            if states is not None:
                states.append(hidden)
        last = distinct[order[-1]]
        if states is None and attentions is None:
            return self._layer(last, hidden, packing, queries, backend, None)
        hidden = self._layer(last, hidden, packing, None, backend, attentions)
        if states is not None:
            states.append(hidden)
        return hidden if queries is None else take(hidden, queries.rows)

    def _layer(
        self, layer: Layer, hidden: Tensor, packing: Packing, queries: Queries | None, backend: str,
        attentions: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        # What a compiled graph computes again its partitioner decides; torch cannot trace checkpoints of changing lengths.
        recompute = self.recompute if torch.is_grad_enabled() and not torch.compiler.is_compiling() else "nothing"
        arguments = (hidden, packing, queries, backend, attentions, recompute == "activations")
        # Run twice, a layer would append its probabilities twice.
        if recompute == "layers" and attentions is None:
            out: Tensor = checkpoint(layer, *arguments, use_reentrant=False)
            return out
        return layer(*arguments)

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
        if not all(layer.is_plain() for layer in distinct):
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
                precision=precision, schedule=packing.order, max_seqlen=packing.max_seqlen, max_rows=max_rows,
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


class Layer(nn.Module):
    """attention, add_layer_norm, FFN, add_layer_norm; every bias rides in the fused operator with its product or behind it."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.full_layer_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = config.activation
        # Google's code applies this dropout, Hugging Face's does not; the configuration says which.
        self.dropout_p = config.hidden_dropout_prob if config.ffn_output_dropout else 0.0

    def weights(self) -> list[Tensor]:
        """What `ops.encoder` reads, in the order of `ops.WEIGHTS`."""
        a, norm = self.attention, self.full_layer_layer_norm
        modules = (a.qkv, a.dense, a.LayerNorm, self.ffn, self.ffn_output, norm)
        return [parameter for module in modules for parameter in (module.weight, module.bias)]

    def products(self) -> list[Any]:
        """The four Linears, in the order of `ops.quantized_encoder.PRODUCTS`."""
        return [self.attention.qkv, self.attention.dense, self.ffn, self.ffn_output]

    def vectors(self) -> list[Tensor]:
        """What `ops.quantized_encoder` reads beside the products, in the order of its `VECTORS`."""
        a, norm = self.attention, self.full_layer_layer_norm
        return [a.qkv.bias, a.dense.bias, a.LayerNorm.weight, a.LayerNorm.bias, self.ffn.bias, self.ffn_output.bias,
                norm.weight, norm.bias]  # fmt: skip

    def inputs(self, hidden: Tensor, packing: Packing) -> tuple[list[Tensor], Tensor]:
        """What each of `products` is given (T, K) in a float32 layer, and the layer's result: to calibrate integers."""
        a, norm = self.attention, self.full_layer_layer_norm
        q, k, v = linear(hidden, a.qkv.weight, a.qkv.bias).split(hidden.shape[1], dim=1)
        cu, longest = packing.cu_seqlens, packing.max_seqlen
        context = ops.attention(q, k, v, cu, cu, longest, longest, a.num_heads, a.scale)
        attended = _add_norm(linear(context, a.dense.weight), a.dense.bias, hidden, a.LayerNorm, self, 0.0, "auto")
        middle = ops.bias_gelu(linear(attended, self.ffn.weight), self.ffn.bias, self.act)
        down = linear(middle, self.ffn_output.weight)
        out = _add_norm(down, self.ffn_output.bias, attended, norm, self, 0.0, "auto")
        return [hidden, context, attended, middle], out

    def rounded(self, precision: str, fit: Fit, inputs: Sequence[Tensor | None] = (None,) * 4) -> list[QuantizedLinear]:
        """The four Linears in integers; `inputs` are what each was given: see `QuantizedLinear.rounded`."""
        linears = zip(ops.PRODUCTS, self.products(), inputs, strict=True)
        return [QuantizedLinear.rounded(name, old, precision, fit, x) for name, old, x in linears]

    def place(self, linears: list[Any]) -> None:
        # In the layer's mode: of a new module it is training, which graphs are not for.
        self.attention.qkv, self.attention.dense, self.ffn, self.ffn_output = (
            linear.train(self.training) for linear in linears
        )

    def is_plain(self) -> bool:
        """Whether the layer computes just what the encoder operators do: no hook, no part replaced or parametrised."""
        return all(
            type(module) in (Layer, Attention, nn.Linear, QuantizedLinear, nn.LayerNorm) and not is_hooked(module)
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
    ) -> Tensor:
        attended = self.attention(hidden, packing, queries, backend, attentions)
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
        return _add_norm(down, bias, attended, self.full_layer_layer_norm, self, self.dropout_p, backend)

    def _down(self, up: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """The FFN behind its first product, and the bias that is still to be added."""
        return product(self.ffn_output, ops.bias_gelu(up, bias, self.act, backend=backend))


def fuses_ffn(device_type: str) -> bool:
    """Whether the FFN's first product and its activation are one operator, `linear_gelu`.

    On a CPU oneDNN's product and bias_gelu are as good. Under autocast torch's Linear takes its weight from a cache, so that
    a layer that runs twelve times has it rounded once; an operator of ours would round it, and keep it, twelve times.
    """
    return device_type == "cuda" and not torch.is_autocast_enabled(device_type)


class Attention(nn.Module):
    """Self-attention with query, key and value as one product; outside, state_dict has them apart, as Hugging Face does."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scale = config.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.probs_dropout_p = config.attention_probs_dropout_prob
        self.dropout_p = config.hidden_dropout_prob
        self.register_state_dict_post_hook(_split_qkv)
        self.register_load_state_dict_pre_hook(_merge_qkv)

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        queries: Queries | None,
        backend: str,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        width, residual = hidden.shape[1], hidden
        cu_seqlens_q, max_seqlen_q = packing.cu_seqlens, packing.max_seqlen
        if queries is not None:
            residual = take(hidden, queries.rows)
            cu_seqlens_q, max_seqlen_q = queries.cu_seqlens, queries.max_seqlen
        if queries is None or not is_linear(self.qkv) or self.qkv.bias is None:
            q, k, v = split_columns(project(self.qkv, hidden), width)
            q = q if queries is None else take(q, queries.rows)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = linear(residual, weight[:width], bias[:width])
            k, v = split_columns(linear(hidden, weight[width:], bias[width:]), width)
        if attentions is not None:
            attentions.append(_probabilities(q, k, packing, self.num_heads, self.scale))
        p, seed = _dropout(self, self.probs_dropout_p)
        context = ops.attention(
            q, k, v, cu_seqlens_q, packing.cu_seqlens, max_seqlen_q, packing.max_seqlen, self.num_heads, self.scale, p, seed,
            order=packing.order, backend=backend,
        )  # fmt: skip
        return _add_norm(*product(self.dense, context), residual, self.LayerNorm, self, self.dropout_p, backend)


def _add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, norm: nn.LayerNorm, module: nn.Module, dropout_p: float, backend: str
) -> Tensor:  # fmt: skip
    check_read(norm, nn.LayerNorm, "a layer's LayerNorm")
    p, seed = _dropout(module, dropout_p)
    return ops.add_layer_norm(x, bias, residual, norm.weight, norm.bias, norm.eps, p, seed, backend=backend)


def _dropout(module: nn.Module, p: float) -> tuple[float, Tensor | None]:
    return (p, ops.draw_seed()) if module.training and p else (0.0, None)


def _probabilities(q: Tensor, k: Tensor, packing: Packing, num_heads: int, scale: float) -> Tensor:
    """(B, heads, S, S), zeros wherever the query or the key is padded; only for callers who ask to see them."""
    q, k = (packing.scatter(t).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    real = None if packing.indices is None else packing.mask()[:, None, :, None]
    scores = (q.float() @ k.float().transpose(2, 3)) * scale
    if real is not None:
        scores = scores.masked_fill(~real.transpose(2, 3), torch.finfo(torch.float32).min)
    probabilities = torch.softmax(scores, dim=-1)
    return (probabilities if real is None else probabilities * (real & real.transpose(2, 3))).to(q.dtype)


_QKV = ("query", "key", "value")


def _qkv_kinds(module: nn.Module) -> tuple[str, ...]:
    """What of `qkv` stands apart for query, key and value outside."""
    return ("weight", "bias", "weight_scale") if isinstance(module.qkv, QuantizedLinear) else ("weight", "bias")


def _split_qkv(module: nn.Module, state: dict[str, Tensor], prefix: str, _local_metadata: Any) -> None:
    if f"{prefix}qkv.weight" not in state:  # an adapter's or a parametrisation's names, which stay as they are
        return
    for kind in _qkv_kinds(module):
        parts = state.pop(f"{prefix}qkv.{kind}").chunk(3)
        state.update({f"{prefix}{name}.{kind}": part for name, part in zip(_QKV, parts, strict=True)})


def _merge_qkv(
    module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any, _strict: bool, missing: list[str],
    _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    expected: dict[str, Tensor] = {}
    module.qkv._save_to_state_dict(expected, "", False)  # type: ignore[union-attr]
    if "weight" not in expected:
        return
    for kind in _qkv_kinds(module):
        names = [f"{prefix}{name}.{kind}" for name in _QKV]
        current = expected[kind]
        rows = current.chunk(3)
        missing += [name for name in names if name not in state]
        parts = [state.pop(name, row) for name, row in zip(names, rows, strict=True)]
        for name, part, row in zip(names, parts, rows, strict=True):
            if part.shape != row.shape:
                errors.append(f"size mismatch for {name}: {tuple(part.shape)}, expected {tuple(row.shape)}")
        fits = all(part.shape == row.shape for part, row in zip(parts, rows, strict=True))
        state[f"{prefix}qkv.{kind}"] = torch.cat(parts) if fits else current
