"""Computes the least time in which a chip could run each GPU operator at a model's sizes, from what its launches move and compute.

    python -m albert_fast.testing.gpu.floors [--kernel NAME ...]

These are counts, not measurements: the operator's launchers run on tensors without memory, their launches are recorded, library
products included, and every operand of a launch counts once (costs.py). The floor of a launch is the larger of the time that
memory needs and the time that the arithmetic needs; the floor of an operator is the sum over its launches. With few tokens,
launches may take less than that together, if one finds the results of the previous one in the L2 cache. embedding_projection is
launched by CUDA code and counted as a whole, from its OpCase: its gradient takes several more passes. No kernel runs, and
nothing here says how close a kernel comes to its floor.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..case import EPS, Inputs
from ..cases import ALL_CASES
from .costs import CHIPS, Cost, Rates, microseconds
from .recording import launch_costs

_RAGGED = tuple(range(8, 513, 8))  # 64 sequences, 16,640 tokens
_CALLS = ((1, 128, "dense"), (64, 512, "dense"), (64, 512, "masked"))

# operator -> name -> shape in the form of OpCase.make_inputs: 32,768 tokens of ALBERT-base and -large, and batches for attention;
# few tokens for the persistent encoder, whose weights count once, since they stay in the L2 cache from layer to layer.
# quantized_encoder has the precision at the end; graph_inputs has (sequences, tokens of each, whether some may be padding).
SHAPES: dict[str, dict[str, Any]] = {
    "attention": {
        f"{model} {batch}": (lengths, None, heads, 64)
        for model, heads in (("base", 12), ("large", 16))
        for batch, lengths in (("64x128", (128,) * 64), ("64x512", (512,) * 64), ("64x8..512", _RAGGED))
    },
    "add_layer_norm": {"base 32768x768": (32768, 768), "large 32768x1024": (32768, 1024)},
    "bias_gelu": {"base 32768x3072": (32768, 3072), "large 32768x4096": (32768, 4096)},
    "linear_gelu": {"base 32768x768x3072": (32768, 768, 3072), "large 32768x1024x4096": (32768, 1024, 4096)},
    "gelu_layer_norm": {"base, large 32768x128": (32768, 128)},
    "embedding_layer_norm": {
        "base 32768x768": (32768, 768, 30522, 512, 2),
        "large 32768x1024": (32768, 1024, 30522, 512, 2),
    },
    "linear_cross_entropy": {"base, large 4915x128x30000": (4915, 128, 30000)},  # 15 % of the tokens
    "encoder": {
        f"base {batch}x{length}": ((length,) * batch, 768, 12, 3072, 1, 12)
        for batch, length in ((1, 16), (1, 128), (4, 128))
    },
    "quantized_encoder": {
        f"base {precision} {batch}x{length}": ((length,) * batch, 768, 12, 3072, 1, 12, precision)
        for precision in ("int8", "fp8")
        for batch, length in ((1, 128), (64, 128), (64, 512))
    },
    "graph_inputs": {f"{batch}x{length}, {kind}": (batch, length, kind == "masked") for batch, length, kind in _CALLS},
    "embedding_projection": {
        "base 32768x128x768": (32768, 128, 768, 30000, 512, 2),
        "large 32768x128x1024": (32768, 128, 1024, 30000, 512, 2),
    },
}


@dataclass(frozen=True)
class Count:
    """What the launches of one operator move and compute, forward or backward, with activations in bfloat16."""

    operator: str
    direction: str
    shape: str
    launches: tuple[Cost, ...]

    @property
    def bytes(self) -> int:
        return sum(cost.bytes for cost in self.launches)

    @property
    def operations(self) -> float:
        return sum(cost.operations for cost in self.launches)

    def seconds(self, chip: Rates) -> tuple[float, str] | None:
        """(the floor in seconds, what sets most of it: memory or a kind of operations); None if the chip lacks a kind."""
        floors = [cost.seconds(chip) for cost in self.launches]
        parts: dict[str, float] = {}
        for floor in floors:
            if floor is None:
                return None
            parts[floor[1]] = parts.get(floor[1], 0.0) + floor[0]
        return sum(parts.values()), max(parts, key=lambda name: parts[name])


def counted_inputs(operator: str, shape: Any) -> Inputs:
    """The operator's inputs on the meta device, without memory, except sequence lengths, which are read."""
    with torch.device("meta"):
        inputs = ALL_CASES[operator].make_inputs(shape, torch.bfloat16, "meta")
    for name in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens"):
        if name in inputs:
            inputs[name] = torch.tensor([0, *itertools.accumulate(shape[0])], dtype=torch.int32)
    return inputs


# How each operator's launchers are called: forward, and backward where there is one. ----------------------------------------


Runs = tuple[Callable[[], Any], ...]


def _attention(shape: Any) -> Runs:
    from ...kernels.attention import attention_fwd
    from ...kernels.attention_bwd import attention_bwd

    i = counted_inputs("attention", shape)
    q, k, v = i["q"], i["k"], i["v"]
    numbers = (i["max_seqlen_q"], i["max_seqlen_k"], i["num_heads"], i["softmax_scale"])
    sequence_order = torch.empty(len(shape[0]), dtype=torch.int32, device="meta")
    batch = (i["cu_seqlens_q"], i["cu_seqlens_k"], sequence_order)
    return (
        lambda: attention_fwd(q, k, v, *batch, *numbers),
        lambda: attention_bwd(q, q, k, v, q, k, v, *batch, *numbers),
    )


def _add_layer_norm(shape: Any) -> Runs:
    from ...kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd

    i = counted_inputs("add_layer_norm", shape)
    x, bias, residual, weight = (i[name] for name in ("x", "bias", "residual", "weight"))
    stats = torch.empty(len(x), device="meta")
    return (
        lambda: add_layer_norm_fwd(x, bias, residual, weight, i["ln_bias"], EPS),
        lambda: add_layer_norm_bwd(x, x, bias, residual, weight, stats, stats),
    )


def _gelu_layer_norm(shape: Any) -> Runs:
    from ...kernels.gelu_layer_norm import gelu_layer_norm_bwd, gelu_layer_norm_fwd

    i = counted_inputs("gelu_layer_norm", shape)
    x, bias, weight, act = (i[name] for name in ("x", "bias", "weight", "act"))
    stats = torch.empty(len(x), device="meta")
    return (
        lambda: gelu_layer_norm_fwd(x, bias, weight, i["ln_bias"], EPS, act),
        lambda: gelu_layer_norm_bwd(x, x, bias, weight, stats, stats, act),
    )


def _embedding_layer_norm(shape: Any) -> Runs:
    from ...kernels.embedding_layer_norm import embedding_layer_norm_bwd, embedding_layer_norm_fwd

    i = counted_inputs("embedding_layer_norm", shape)
    ids = (i["input_ids"], None, i["token_type_ids"], i["position_ids"])
    tables = (*ids, i["word"], i["token_type"], i["position"], i["ln_weight"])
    stats = torch.empty(shape[0], device="meta")
    grad = torch.empty(shape[:2], dtype=i["word"].dtype, device="meta")
    return (
        lambda: embedding_layer_norm_fwd(*tables, i["ln_bias"], EPS),
        lambda: embedding_layer_norm_bwd(grad, *tables, stats, stats),
    )


def _bias_gelu(shape: Any) -> Runs:
    from ...kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd

    i = counted_inputs("bias_gelu", shape)
    return (
        lambda: bias_gelu_fwd(i["x"], i["bias"], i["act"]),
        lambda: bias_gelu_bwd(i["x"], i["x"], i["bias"], i["act"]),
    )


def _linear_gelu(shape: Any) -> Runs:
    from ...kernels.bias_gelu import bias_gelu_bwd
    from ...kernels.linear_gelu import linear_gelu_fwd

    i = counted_inputs("linear_gelu", shape)
    x, weight = i["x"], i["weight"]

    def bwd() -> None:
        grad = x.new_empty(len(x), len(weight))
        du, _ = bias_gelu_bwd(grad, grad, None, i["act"])
        torch.mm(du, weight), torch.mm(du.t(), x)  # as in ops/linear_gelu.py

    return lambda: linear_gelu_fwd(x, weight, i["bias"], i["act"], keep_sums=False), bwd


def _linear_cross_entropy(shape: Any) -> Runs:
    from ...kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

    with torch.device("meta"):
        x, weight, bias = (torch.empty(size, dtype=torch.bfloat16) for size in (shape[:2], shape[:0:-1], shape[2:]))
        labels, stats, loss = torch.empty(shape[0], dtype=torch.int64), torch.empty(shape[0]), torch.empty(())
    return (
        lambda: linear_cross_entropy_fwd(x, weight, bias, labels),
        lambda: linear_cross_entropy_bwd(loss, x, weight, bias, labels, stats, stats),
    )


def _encoder(shape: Any) -> Runs:
    from ...kernels.encoder import encoder_fwd

    i = counted_inputs("encoder", shape)
    return (lambda: encoder_fwd(**i),)


def _quantized_encoder(shape: Any) -> Runs:
    from ...kernels.quantized_encoder import quantized_encoder_fwd

    lengths, width, heads, middle, distinct, steps, precision = shape
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[precision]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    products = ((3 * width, width), (width, width), (middle, width), (width, middle)) * distinct
    with torch.device("meta"):
        hidden = torch.empty(sum(lengths), width, dtype=torch.bfloat16)
        floats, halves = torch.float32, torch.bfloat16
        kinds = (floats, floats, halves, halves, floats, floats, halves, halves)  # of biases and norms
        sizes = (3 * width, width, width, width, middle, width, width, width)
        vectors = [torch.empty(n, dtype=kind) for n, kind in zip(sizes, kinds, strict=True)] * distinct
        weights = [torch.empty(size, dtype=dtype) for size in products]
        channels, inner = ([torch.empty(size[side]) for size in products] for side in (0, 1))
        sequence_order = torch.empty(len(lengths), dtype=torch.int32)
    layer_indices, longest = [step * distinct // steps for step in range(steps)], max(lengths)
    matrices = (weights, channels, channels, inner, inner)
    numbers: tuple[Any, ...] = (longest, longest, heads, (width // heads) ** -0.5, EPS, "gelu_tanh")
    return (
        lambda: quantized_encoder_fwd(
            hidden, vectors, *matrices, layer_indices, ends, None, None, sequence_order, *numbers
        ),
    )


def _graph_inputs(shape: Any) -> Runs:
    from ...kernels._graph_inputs import graph_inputs

    batch, length, masked = shape
    with torch.device("meta"):
        ids = torch.empty(batch, length, dtype=torch.int64)
        ends = torch.empty(batch + 1, dtype=torch.int32)
        static = torch.empty(3, batch * length, dtype=torch.int64)
    rows, bounds = (ids, length, 1), (batch * length, batch)
    # All types are 0 and positions are the same in every row, as the model makes them.
    types, positions = (ids[0, :1], 0, 0), (ids[0], 0, 1)
    mask: tuple[Any, Any, Any, Any] = (rows, ids[:, 0], None, ids.view(-1)) if masked else (None, None, None, None)
    return (lambda: graph_inputs(rows, types, positions, *mask, ends, static, ends, (batch, length), bounds),)


_RUNS: dict[str, Callable[[Any], Runs]] = {
    "attention": _attention,
    "add_layer_norm": _add_layer_norm,
    "bias_gelu": _bias_gelu,
    "linear_gelu": _linear_gelu,
    "gelu_layer_norm": _gelu_layer_norm,
    "embedding_layer_norm": _embedding_layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "encoder": _encoder,
    "quantized_encoder": _quantized_encoder,
    "graph_inputs": _graph_inputs,
}


def counts(operators: Iterable[str] = tuple(SHAPES)) -> Iterator[Count]:
    """Forward and, if there is one, backward of every shape of these operators."""
    for operator in operators:
        for name, shape in SHAPES[operator].items():
            for direction, launches in zip(("fwd", "bwd"), _launches(operator, shape), strict=False):
                yield Count(operator, direction, name, tuple(launches))


def _launches(operator: str, shape: Any) -> list[list[Cost]]:
    if operator in _RUNS:
        return [launch_costs(run) for run in _RUNS[operator](shape)]
    case, inputs = ALL_CASES[operator], counted_inputs(operator, shape)
    forward = Cost(case.bytes_moved(inputs), case.operations(inputs), "half")
    return [[forward], [Cost(int(case.backward_bytes(inputs)), case.backward_operations(inputs), "half")]]


def table(operators: Iterable[str] = tuple(SHAPES)) -> str:
    """One line per count, and a sentence that says what the numbers are."""
    head = ["operator", "", "bf16 at", "launches", "MB", "GFLOP", *(f"{chip.name}, us" for chip in CHIPS)]
    body = []
    for count in counts(operators):
        floors = [count.seconds(chip) for chip in CHIPS]
        cells = ["" if floor is None else f"{microseconds(floor[0] * 1e6)} {floor[1]}" for floor in floors]
        amounts = [str(len(count.launches)), f"{count.bytes / 1e6:.1f}", f"{count.operations / 1e9:.2f}"]
        body.append([count.operator, count.direction, count.shape, *amounts, *cells])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rates = "; ".join(
        f"{c.name} {c.memory / 1e12:g} TB/s, {c.half / 1e12:g} TFLOP/s half, {c.int8 / 1e12:g} int8, {c.f32 / 1e12:g} f32"
        for c in CHIPS
    )
    return "\n".join(
        [*rows, f"Floors from counted bytes and operations and datasheet rates ({rates}): no measurements."]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m albert_fast.testing.gpu.floors", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES), help="count only these operators"
    )
    print(table(parser.parse_args(arguments).kernel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
