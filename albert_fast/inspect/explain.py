"""`explain` lists which kernels a forward would run on which backend, and why, without running it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..execution.graphs import Bucket
from ..layers.layer import fuses_ffn
from ..layers.packing import pack
from ..models.execution import encoder_of
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


def explain(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Plan:
    """What `model(input_ids, attention_mask)` would run where, and why; after `warmup` also whether as a CUDA graph.

    That depends on the modes it is asked in: under torch.no_grad() as the call will be.

    Args:
        model: an ALBERTModel or a model with a head.
        input_ids: (B, S). attention_mask: (B, S), as in forward.

    Returns:
        Plan: `print` it for a table; `plan.steps` for the rows.

    Raises:
        TypeError: not one of our models. ValueError: shapes that do not fit.
    """
    encoder = encoder_of(model)
    if input_ids.dim() != 2:
        raise ValueError(f"expected input_ids (B, S), got {tuple(input_ids.shape)}")
    config, weight = encoder.config, encoder.embeddings.word_embeddings.weight
    device, dtype, backend = weight.device.type, weight.dtype, encoder.execution_state.backend
    batch, columns = input_ids.shape
    packing = pack((batch, columns), attention_mask, input_ids.device)
    lengths = packing.cu_seqlens.diff().double()
    tokens, pairs = int(lengths.sum()), float((lengths * lengths).sum())
    width, inner = config.hidden_size, config.intermediate_size
    layers = len(encoder.encoder.layer_indices)
    first_only = getattr(model, "wanted_tokens", "all") == "first"
    last = min(batch, tokens) if first_only else tokens
    last_pairs = float(lengths.sum()) if first_only else pairs

    def product(name: str, times: int, rows: int, k: int, n: int) -> Step:
        library = gemm_library(device, dtype)
        why = "weights packed once" if library == "cpp" else "torch's own GEMM"
        return Step(name, times, rows, library, times * 2 * rows * k * n / 1e9, why)

    def operator(name: str, times: int, rows: int, gflop: float = 0.0) -> Step:
        chosen, why = _chosen(name, device, dtype, backend)
        return Step(name, times, rows, chosen, gflop, why)

    def ffn_up(times: int, asked: int) -> list[Step]:
        recomputed = torch.is_grad_enabled() and encoder.execution_state.recompute == "activations"
        if fuses_ffn(device) and not recomputed:
            fused = operator("linear_gelu", times, asked, times * 2 * asked * width * inner / 1e9)
            return [replace(fused, why=fused.why + without_tiles(fused.backend, inner))]
        return [product("FFN up", times, asked, width, inner), operator("bias_gelu", times, asked)]

    def layer(projections: list[Step], times: int, asked: int, asked_pairs: float) -> list[Step]:
        return [
            *projections,
            operator("attention", times, asked, times * 4 * asked_pairs * width / 1e9),
            product("attention output", times, asked, width, width),
            operator("add_layer_norm", 2 * times, asked),
            *ffn_up(times, asked),
            product("FFN down", times, asked, inner, width),
        ]

    narrow = config.word_embedding_size
    projection = 2 * tokens * narrow * width / 1e9 if encoder.embeddings.operator == "embedding_projection" else 0.0
    steps = [operator(encoder.embeddings.operator, 1, tokens, projection)]
    by_layer: list[Step] = []
    if layers > 1 or not first_only:
        times = layers - first_only
        fused = product("query, key, value product", times, tokens, width, 3 * width)
        by_layer += layer([fused], times, tokens, pairs)
    if first_only:
        apart = [
            product("query product", 1, last, width, width),
            product("key, value product", 1, tokens, width, 2 * width),
        ]
        by_layer += [replace(s, name=f"last layer: {s.name}") for s in layer(apart, 1, last, last_pairs)]
    quantized = encoder.encoder.quantized
    states = weight.detach()[:1].expand(tokens, -1)  # as many, on that device, in that dtype
    apart_because = None if quantized else encoder.encoder.why_not_one_call(states, backend)
    gflop = sum(s.gflop for s in by_layer)
    if quantized:
        chosen, _ = _chosen("quantized_encoder", device, dtype, backend)
        by = dispatch.quantized_kernels(quantized, device, chosen)[1]
        why = f"{quantized} weights, {by}; softmax and norms in float32"
        steps.append(Step("quantized_encoder", 1, tokens, chosen, gflop, why))
    elif apart_because is None:
        chosen, _ = _chosen("encoder", device, dtype, backend)
        steps.append(Step("encoder", 1, tokens, chosen, gflop, "all layers in one call"))
    else:
        steps += by_layer
    if hasattr(model, "lm_parts"):
        steps += [
            product("head: dense", 1, tokens, width, narrow),
            operator("gelu_layer_norm", 1, tokens),
            product("head: decoder", 1, tokens, narrow, config.vocab_size),
        ]
    if encoder.pooling() is not None:
        steps.append(product("pooler", 1, batch, width, width))
    for name in ("classifier", "qa_outputs"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            steps.append(product(f"head: {name}", 1, last, width, head.out_features))
    padding = 1 - tokens / (batch * columns) if batch * columns else 0.0
    wanted = "the first token of each sequence" if first_only else "every token"
    precision = f"{quantized} layers" if quantized else str(dtype).removeprefix("torch.")
    graphs = ""
    if encoder.execution_state.graphs is not None:
        longest = int(lengths.max()) if batch else 0
        bucket = Bucket.of(tokens, batch, longest, getattr(model, "wanted_tokens", "all"), backend)
        graphs = f"; {encoder.execution_state.graphs.forecast(encoder, bucket, batch * columns if tokens else 0, input_ids.device)}"
    summary = (
        f"{type(model).__name__}, {precision} on {device}, backend={backend!r}: {batch} x {columns} "
        f"holds {tokens} real tokens ({padding:.0%} padding, not computed); {layers} layers in {len(encoder.encoder.groups())} "
        f"group(s), {config.num_attention_heads} heads of {config.head_dim}, the last one for {wanted}; "
        f"{sum(s.gflop for s in steps):.2f} GFLOP"
        + (f"; layers operator by operator: {apart_because}" if apart_because else "")
        + graphs
    )
    return Plan(summary, steps)
