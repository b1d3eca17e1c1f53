"""`explain` lists which kernels a forward would run on which backend, and why, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.graphs import Bucket
from ..layers.layer import fuses_ffn
from ..layers.packing import pack
from ..models.execution import encoder_of
from ..ops._schema import matrix_sizes
from ..ops.linear_gelu import without_tiles
from ..runtime import dispatch
from ..runtime.linear import library as gemm_library

_HEADER = ("step", "times", "rows", "runs on", "GFLOP", "why")


@dataclass(frozen=True)
class Step:
    """One kind of work in a forward: how often, over how many rows, on which backend, how much arithmetic, and why there."""

    name: str
    times: int
    rows: int
    backend: str
    gflop: float
    why: str

    def cells(self) -> tuple[str, ...]:
        return (self.name, str(self.times), str(self.rows), self.backend, f"{self.gflop:.3f}", self.why)


@dataclass(frozen=True)
class Plan:
    """The steps of a forward, in order; `str()` is a table."""

    summary: str
    steps: list[Step] = field(default_factory=list)

    def __str__(self) -> str:
        table = [_HEADER, *(step.cells() for step in self.steps)]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([self.summary, "", lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _chosen(op: str, device_type: str, dtype: torch.dtype, backend: str) -> tuple[str, str]:
    """The backend that would run `op`, and why: it was asked for, is the first choice, or a better one cannot run."""
    name = dispatch.resolve(op, device_type, dtype, backend)
    if backend == name:
        return name, "asked for"
    preferred = dispatch.runnable_on(op, device_type)
    missing = [dispatch.why_not(op, device_type, other, dtype) for other in preferred[: preferred.index(name)]]
    return name, "first choice" if not missing else str(missing[0])


@dataclass(frozen=True)
class _Call:
    """The sizes and choices of a forward that its steps follow from.

    shape: (B, S), padding included. tokens: the real ones; longest: those of the longest sequence. pairs: of a query and a
    key. first_only: the last layer is computed only for the first token of each sequence.
    """

    encoder: Any
    shape: tuple[int, int]
    tokens: int
    longest: int
    pairs: float
    first_only: bool

    @classmethod
    def of(cls, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> _Call:
        encoder = encoder_of(model)
        if input_ids.dim() != 2:
            raise ValueError(f"expected input_ids (B, S), got {tuple(input_ids.shape)}")
        shape = (input_ids.shape[0], input_ids.shape[1])
        lengths = pack(shape, attention_mask, input_ids.device).cu_seqlens.diff().double()
        longest = int(lengths.max()) if shape[0] else 0
        first_only = getattr(model, "wanted_tokens", "all") == "first"
        return cls(encoder, shape, int(lengths.sum()), longest, float((lengths * lengths).sum()), first_only)

    @property
    def weight(self) -> Tensor:
        """The table of words, whose device and dtype are the model's."""
        weight: Tensor = self.encoder.embeddings.word_embeddings.weight
        return weight

    @property
    def device(self) -> str:
        return self.weight.device.type

    @property
    def backend(self) -> str:
        backend: str = self.encoder.execution_state.backend
        return backend

    @property
    def hidden_size(self) -> int:
        return int(self.encoder.config.hidden_size)

    @property
    def intermediate_size(self) -> int:
        return int(self.encoder.config.intermediate_size)

    @property
    def num_layers(self) -> int:
        return len(self.encoder.encoder.layer_indices)

    @property
    def wanted(self) -> int:
        """Tokens that the last layer is computed for."""
        return min(self.shape[0], self.tokens) if self.first_only else self.tokens

    def chosen(self, op: str) -> tuple[str, str]:
        return _chosen(op, self.device, self.weight.dtype, self.backend)

    def operator(self, op: str, times: int, rows: int, gflop: float = 0.0) -> Step:
        backend, why = self.chosen(op)
        return Step(op, times, rows, backend, gflop, why)

    def product(self, name: str, times: int, rows: int, shape: tuple[int, int]) -> Step:
        """A product with a matrix of this shape (N, K)."""
        library = gemm_library(self.device, self.weight.dtype)
        why = "weights packed once" if library == "cpp" else "torch's own GEMM"
        return Step(name, times, rows, library, times * 2 * rows * shape[0] * shape[1] / 1e9, why)

    def layer_product(self, name: str, product: str, times: int, rows: int) -> Step:
        """One of a layer's `PRODUCTS`."""
        return self.product(name, times, rows, matrix_sizes(product, self.hidden_size, self.intermediate_size))


def _one_layer(call: _Call, projections: list[Step], times: int, rows: int, pairs: float) -> list[Step]:
    """The steps of a layer that runs `times` times, from its products for query, key and value on."""
    recomputed = torch.is_grad_enabled() and call.encoder.execution_state.recompute == "activations"
    product = call.layer_product("FFN up", "ffn", times, rows)
    if fuses_ffn(call.device) and not recomputed:
        fused = call.operator("linear_gelu", times, rows, product.gflop)
        up = [replace(fused, why=fused.why + without_tiles(fused.backend, call.intermediate_size))]
    else:
        up = [product, call.operator("bias_gelu", times, rows)]
    return [
        *projections,
        call.operator("attention", times, rows, times * 4 * pairs * call.hidden_size / 1e9),
        call.layer_product("attention output", "dense", times, rows),
        call.operator("add_layer_norm", 2 * times, rows),
        *up,
        call.layer_product("FFN down", "ffn_output", times, rows),
    ]


def _layers_by_operator(call: _Call) -> list[Step]:
    """The steps of all layers, operator by operator; of a last layer for few tokens apart."""
    steps: list[Step] = []
    if call.num_layers > 1 or not call.first_only:
        times = call.num_layers - call.first_only
        fused = call.layer_product("query, key, value product", "qkv", times, call.tokens)
        steps += _one_layer(call, [fused], times, call.tokens, call.pairs)
    if call.first_only:
        width = call.hidden_size
        apart = [
            call.product("query product", 1, call.wanted, (width, width)),
            call.product("key, value product", 1, call.tokens, (2 * width, width)),
        ]
        last = _one_layer(call, apart, 1, call.wanted, float(call.tokens))
        steps += [replace(step, name=f"last layer: {step.name}") for step in last]
    return steps


def _layers(call: _Call) -> tuple[list[Step], str | None]:
    """The steps of all layers; and why they do not run in one call, None where they do."""
    by_operator, stack = _layers_by_operator(call), call.encoder.encoder
    gflop = sum(step.gflop for step in by_operator)
    if stack.quantized:
        backend, _ = call.chosen("quantized_encoder")
        by = dispatch.quantized_kernels(stack.quantized, call.device, backend)[1]
        why = f"{stack.quantized} weights, {by}; softmax and norms in float32"
        return [Step("quantized_encoder", 1, call.tokens, backend, gflop, why)], None
    states = call.weight.detach()[:1].expand(call.tokens, -1)  # as many, on that device, in that dtype
    if (reason := stack.why_not_one_call(states, call.backend)) is not None:
        return by_operator, reason
    return [Step("encoder", 1, call.tokens, call.chosen("encoder")[0], gflop, "all layers in one call")], None


def _embedding(call: _Call) -> Step:
    """The step before the layers."""
    operator, narrow = call.encoder.embeddings.operator, call.encoder.config.word_embedding_size
    projection = 2 * call.tokens * narrow * call.hidden_size / 1e9 if operator == "embedding_projection" else 0.0
    return call.operator(operator, 1, call.tokens, projection)


def _head(model: nn.Module, call: _Call) -> list[Step]:
    """The steps after the layers: the head for masked tokens, the pooler, the Linear of a task."""
    config, width, steps = call.encoder.config, call.hidden_size, []
    narrow = config.word_embedding_size
    if hasattr(model, "lm_parts"):
        steps += [
            call.product("head: dense", 1, call.tokens, (narrow, width)),
            call.operator("gelu_layer_norm", 1, call.tokens),
            call.product("head: decoder", 1, call.tokens, (config.vocab_size, narrow)),
        ]
    if call.encoder.pooling() is not None:
        steps.append(call.product("pooler", 1, call.shape[0], (width, width)))
    for name in ("classifier", "qa_outputs"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            steps.append(call.product(f"head: {name}", 1, call.wanted, (head.out_features, width)))
    return steps


def _graphs(call: _Call, model: nn.Module, device: torch.device) -> str:
    """What CUDA graphs will do for the call; nothing before `warmup`."""
    graphs = call.encoder.execution_state.graphs
    if graphs is None:
        return ""
    batch, columns = call.shape
    wanted = getattr(model, "wanted_tokens", "all")
    bucket = Bucket.of(call.tokens, batch, call.longest, wanted, call.backend)
    return f"; {graphs.forecast(call.encoder, bucket, batch * columns if call.tokens else 0, device)}"


def _accelerated(model: Any) -> nn.Module | None:
    """The module that `model` is or holds, if `albert_fast.accelerate` changed it; its stacks then have `explained`."""
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        return None
    return module if any(hasattr(inner, "explained") for inner in module.modules()) else None


def _explain_accelerated(module: Any, tokenizer: Any, given: dict[str, Any]) -> Plan:
    stacks = [(name, inner) for name, inner in module.named_modules() if hasattr(inner, "explained")]
    arguments = stacks[0][1].call_arguments(module, tokenizer, given)
    steps = [Step(*inner.explained(name, module, arguments)) for name, inner in stacks]
    ids = arguments["input_ids"]
    batch, columns = arguments["inputs_embeds"].shape[:2] if ids is None else ids.shape[-2:]
    gflop = sum(step.gflop for step in steps)
    summary = f"{type(module).__name__}, accelerated: {batch} x {columns}; {gflop:.2f} GFLOP in its layers"
    return Plan(summary, steps)


def explain(model: Any, input_ids: Any = None, attention_mask: Tensor | None = None, **arguments: Any) -> Plan:
    """What `model(input_ids, attention_mask)` would run where, and why; after `warmup` also whether as a CUDA graph.

    That depends on the modes it is asked in: under torch.no_grad() as the call will be.

    Args:
        model: an ALBERTModel or a model with a head; or an accelerated model, and then the plan has a row for each stack of
            layers.
        input_ids: (B, S), or what a tokenizer returns; for an accelerated model that has a tokenizer (SentenceTransformer,
            CrossEncoder, pipeline) also a text, or a list of texts or of pairs of texts.
        attention_mask: (B, S), as in forward. arguments: others, for an accelerated model.

    Returns:
        Plan: `print` it for a table; `plan.steps` for the rows.

    Raises:
        TypeError: not one of our models; texts or anything else that it does not take. ValueError: shapes that do not fit.
    """
    if isinstance(input_ids, Mapping):
        return explain(model, **{"attention_mask": attention_mask, **input_ids, **arguments})
    if (accelerated := _accelerated(model)) is not None:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **arguments}
        return _explain_accelerated(accelerated, getattr(model, "tokenizer", None), given)
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        raise TypeError(
            f"explain: {type(model).__name__} holds a model: explain its `model`, with what its tokenizer returns"
        )
    encoder_of(model)
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"explain: expected input_ids (B, S), got {type(input_ids).__name__}: give what a tokenizer returns"
        )
    arguments.pop("token_type_ids", None)  # they change no step
    call = _Call.of(model, input_ids, attention_mask)
    if arguments:
        raise TypeError(f"{type(model).__name__}: explain takes no {next(iter(arguments))}")
    config, (batch, columns) = call.encoder.config, call.shape
    layers, apart_because = _layers(call)
    steps = [_embedding(call), *layers, *_head(model, call)]
    padding = 1 - call.tokens / (batch * columns) if batch * columns else 0.0
    wanted = "the first token of each sequence" if call.first_only else "every token"
    quantized = call.encoder.encoder.quantized
    precision = f"{quantized} layers" if quantized else str(call.weight.dtype).removeprefix("torch.")
    summary = (
        f"{type(model).__name__}, {precision} on {call.device}, backend={call.backend!r}: {batch} x {columns} "
        f"holds {call.tokens} real tokens ({padding:.0%} padding, not computed); {call.num_layers} layers in "
        f"{len(call.encoder.encoder.groups())} group(s), {config.num_attention_heads} heads of {config.head_dim}, the last one for "
        f"{wanted}; {sum(step.gflop for step in steps):.2f} GFLOP"
        + (f"; layers operator by operator: {apart_because}" if apart_because else "")
        + _graphs(call, model, input_ids.device)
    )
    return Plan(summary, steps)
