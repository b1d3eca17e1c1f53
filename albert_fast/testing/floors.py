"""The least time in which a chip could run each GPU operator: bytes and operations counted, divided by datasheet rates.

    python -m albert_fast.testing.floors [--kernel NAME ...]

Counts and not measurements: every operand read once and every result written once (OpCase.bytes_moved, backward_bytes), and
the floating-point operations of the formula (operations, backward_operations). The floor is the larger of the time that
memory needs and the time that the arithmetic needs. No kernel runs, and nothing here says how near one comes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .case import Inputs
from .cases import ALL_CASES


@dataclass(frozen=True)
class Rates:
    """A chip's datasheet: bytes a second of its memory, dense bfloat16 and float32 operations a second."""

    name: str
    memory: float
    bf16: float
    f32: float


# NVIDIA's datasheets of the A100 80 GB SXM and the H100 SXM.
CHIPS = (Rates("A100", 2.0e12, 312e12, 19.5e12), Rates("H100", 3.35e12, 989e12, 67e12))
# Operators whose arithmetic is products, on tensor cores; the others' is float32 whatever their operands are.
_PRODUCTS = {"attention", "embedding_projection", "linear_cross_entropy", "linear_gelu", "encoder"}
_RAGGED = tuple(range(8, 513, 8))  # 64 sequences, 16,640 tokens

# operator -> name -> shape as OpCase.make_inputs takes it: 32,768 tokens of ALBERT-base and -large, and batches of attention;
# few tokens of the persistent encoder, whose weights are counted once: between the layers they stay in the L2 cache.
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
    "linear_cross_entropy": {"base, large 4915x128x30000": (4915, 128, 30000)},  # 15 % of the tokens
    "encoder": {
        f"base {batch}x{length}": ((length,) * batch, 768, 12, 3072, 1, 12)
        for batch, length in ((1, 16), (1, 128), (4, 128))
    },
    "embedding_projection": {
        "base 32768x128x768": (32768, 128, 768, 30000, 512, 2),
        "large 32768x128x1024": (32768, 128, 1024, 30000, 512, 2),
    },
}


@dataclass(frozen=True)
class Count:
    """What one operator must move and compute in one direction, in bfloat16."""

    operator: str
    direction: str
    shape: str
    bytes: float
    operations: float

    def seconds(self, chip: Rates) -> tuple[float, str]:
        """(the floor in seconds, what sets it: memory, bf16 or f32)."""
        rate = "bf16" if self.operator in _PRODUCTS else "f32"
        times = {"memory": self.bytes / chip.memory, rate: self.operations / getattr(chip, rate)}
        slower = max(times, key=lambda name: times[name])
        return times[slower], slower


def counted_inputs(operator: str, shape: Any) -> Inputs:
    """The operator's inputs without memory behind them, on the meta device, but for sequence lengths, which are counted."""
    with torch.device("meta"):
        inputs = ALL_CASES[operator].make_inputs(shape, torch.bfloat16, "meta")
    for name in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens"):
        if name in inputs:
            inputs[name] = torch.tensor([0, *itertools.accumulate(shape[0])], dtype=torch.int32)
    return inputs


def counts(operators: Iterable[str] = tuple(SHAPES)) -> Iterator[Count]:
    """Forward and, where there is one, backward of every shape of these operators."""
    for operator in operators:
        case = ALL_CASES[operator]
        for name, shape in SHAPES[operator].items():
            inputs = counted_inputs(operator, shape)
            yield Count(operator, "fwd", name, case.bytes_moved(inputs), case.operations(inputs))
            if case.gradients:
                yield Count(operator, "bwd", name, case.backward_bytes(inputs), case.backward_operations(inputs))


def table(operators: Iterable[str] = tuple(SHAPES)) -> str:
    """One line a count, and the sentence that says what it is."""
    head = ["operator", "", "bf16 at", "MB", "GFLOP", *(f"{chip.name}, us" for chip in CHIPS)]
    body = []
    for count in counts(operators):
        floors = [count.seconds(chip) for chip in CHIPS]
        cells = [f"{seconds * 1e6:.1f} {bound}" for seconds, bound in floors]
        amounts = [f"{count.bytes / 1e6:.1f}", f"{count.operations / 1e9:.2f}"]
        body.append([count.operator, count.direction, count.shape, *amounts, *cells])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rates = "; ".join(
        f"{c.name} {c.memory / 1e12:g} TB/s, {c.bf16 / 1e12:g} TFLOP/s bf16, {c.f32 / 1e12:g} f32" for c in CHIPS
    )
    return "\n".join(
        [*rows, f"Floors from counted bytes and operations and datasheet rates ({rates}): no measurements."]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m albert_fast.testing.floors", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--kernel", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES), help="these operators alone"
    )
    print(table(parser.parse_args(arguments).kernel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
