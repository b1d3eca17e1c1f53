"""What the model is measured on: dense batches, and batches of real length.

`shape_list("cpu")` is the table; which sides run on a shape stands next to it, for the longest
batches take ten seconds a call where padding is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import lengths
import torch
from torch import Tensor

from albert_fast import ALBERTConfig

BASE = ALBERTConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
QUICK = replace(BASE, hidden_size=128, num_attention_heads=2, intermediate_size=512, num_hidden_layers=2)

FAST = "albert_fast"
ALL_SIDES = (FAST, "reference", "hf-eager", "hf-sdpa", "hf-compile", "onnxruntime", "openvino")
# Real lengths: the usual ways to run the model and the two engines; on 32 padded rows of 512 the faster engine alone.
PADDED_SIDES = (FAST, "hf-sdpa", "hf-compile", "onnxruntime", "openvino")
LONG_SIDES = (FAST, "openvino")


@dataclass(frozen=True)
class Shape:
    """A batch by name, the sides that run on it and how many calls warm it up."""

    name: str
    sides: tuple[str, ...] = ALL_SIDES
    warmup: int = 2

    def rows(self, vocab_size: int) -> list[list[int]]:
        """Token ids of every sequence."""
        if self.name in lengths.BATCHES:
            return lengths.batch(self.name, vocab_size)
        batch, columns = map(int, self.name.split("x"))
        generator = torch.Generator().manual_seed(0)
        ids: list[list[int]] = torch.randint(
            lengths.FIRST_ORDINARY_ID, vocab_size, (batch, columns), generator=generator
        ).tolist()
        return ids


_CPU = (
    *(Shape(name) for name in ("1x16", "1x128")),
    *(Shape(name, warmup=1) for name in ("8x128", "4x512")),
    Shape("sst2-32", PADDED_SIDES),
    Shape("mixed-32", LONG_SIDES, warmup=1),
)
_CPU_LONG = (Shape("imdb-32", LONG_SIDES, warmup=1),)
_CUDA = tuple(Shape(name) for name in ("1x128", "64x128", "64x512", *lengths.BATCHES))
_QUICK = (Shape("1x16"), Shape("sst2-32"))


def shape_list(device_type: str, quick: bool = False, long: bool = False) -> tuple[Shape, ...]:
    """The shapes of a run: `quick` for a check alone, `long` with those that take minutes on a CPU."""
    if quick:
        return _QUICK
    if device_type == "cuda":
        return _CUDA
    return _CPU + (_CPU_LONG if long else ())


@dataclass(frozen=True)
class Batch:
    """ids and mask (B, S) int64, padded on the right with `pad_token_id` as every peer takes them."""

    ids: Tensor
    mask: Tensor
    lengths: Sequence[int]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> Batch:
        lengths = [len(row) for row in rows]
        padded = [[*row, *[pad_token_id] * (max(lengths) - len(row))] for row in rows]
        ids = torch.tensor(padded, device=device)
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        return cls(ids, mask.long(), lengths)

    def real(self, hidden_states: Tensor) -> Tensor:
        """(B, S, H) -> (T, H): the real tokens' rows."""
        return hidden_states[self.mask.bool().to(hidden_states.device)]


def model_operations(config: ALBERTConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations of the encoder on real tokens alone, a multiply-add counted as two.

    Per token and layer 2 (4 H^2 + 2 H I) in the Linears and 4 S H in attention over its own S tokens; once 2 E H in the
    embedding's projection.
    """
    h, i, e = config.hidden_size, config.intermediate_size, config.embedding_size
    layers = config.num_hidden_layers * config.inner_group_num
    return float(sum(n * (layers * (2 * (4 * h * h + 2 * h * i) + 4 * n * h) + 2 * e * h) for n in lengths))
