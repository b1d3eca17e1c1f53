"""Defines the batches that models are measured on, dense and of real lengths, and the sides that run on each.

The longest batches take ten seconds a call where padding is computed, so fewer sides run on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from albert_fast import ALBERTConfig
from shared import lengths
from shared.sides import FAST, INT8, INT16

OURS = (FAST, f"{FAST}-{INT16}", f"{FAST}-{INT8}")
# The usual ways to run the model in PyTorch.
_TORCH = (FAST, "reference", "hf-eager", "hf-sdpa", "hf-compile")
_TORCH_PADDED = (FAST, "hf-sdpa", "hf-compile")
# Peers on CPUs (hf-compile, which compiles for a minute, is added below), and sides that sort and split the batch.
_ENGINES = ("hf-sdpa", "onnxruntime", "openvino", "onnxruntime-int8", "openvino-int8")
_SORTED = ("onnxruntime-sorted", "openvino-sorted", "onnxruntime-int8-sorted", "openvino-int8-sorted")
_PEERS = (*OURS, "hf-compile", *_ENGINES)
_REAL_PEERS = (*_PEERS, *_SORTED)
_LONG_PEERS = (*OURS, "openvino", "openvino-int8", *_SORTED)  # padded 32 x 512: the faster engine alone
# Loading: each of ONNX Runtime's graphs is a file of its own.
LOAD_SIDES = (*_PEERS, "onnxruntime-fused", "onnxruntime-int8-fused")
LOAD_BATCH, LOAD_SIDES_QUICK = "8x128", tuple(side for side in LOAD_SIDES if side != "hf-compile")


@dataclass(frozen=True)
class Shape:
    """A batch's name, the sides that run on it, the number of warm-up calls, and the model (see models.py)."""

    name: str
    sides: tuple[str, ...]
    warmup: int = 2
    model: str = "base"


def model_shapes(device_type: str, quick: bool = False) -> tuple[Shape, ...]:
    """bench_model.py's batches of ALBERT-base."""
    if quick:
        return Shape("1x16", _TORCH), Shape("sst2-32", _TORCH_PADDED)
    if device_type == "cuda":
        return tuple(Shape(name, _TORCH) for name in ("1x128", "64x128", "64x512", *lengths.BATCHES))
    dense = (Shape(name, _TORCH, warmup=1 if name[0] > "1" else 2) for name in ("1x16", "1x128", "8x128", "4x512"))
    return *dense, Shape("sst2-32", _TORCH_PADDED)


def cpu_shapes(quick: bool = False, long: bool = False) -> tuple[Shape, ...]:
    """cpu/bench_peers.py's batches; `long` adds the one that takes the longest."""
    if quick:
        return (
            Shape("1x16", _PEERS),
            Shape("sst2-32", (*OURS, *_ENGINES, *_SORTED)),
            Shape("2", (*OURS, *_ENGINES), model="plbert"),
        )
    shapes = (
        *(Shape(name, _PEERS) for name in ("1x16", "1x128")),
        *(Shape(name, _PEERS, warmup=1) for name in ("8x128", "4x512")),
        Shape("sst2-32", _REAL_PEERS),
        Shape("mixed-32", _LONG_PEERS, warmup=1),
        Shape("1x128", _PEERS, model="large"),
        *(Shape(name, _PEERS, model="plbert") for name in ("1", "8")),
    )
    return (*shapes, Shape("imdb-32", _LONG_PEERS, warmup=1)) if long else shapes


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

    def by_length(self, rows: int = 8) -> list[tuple[Tensor, Batch]]:
        """Sub-batches of `rows` sequences of similar length, each padded to its own longest, and which rows they hold."""
        order = torch.tensor(self.lengths).argsort(stable=True)
        parts = []
        for chosen in order.split(rows):
            lengths = [self.lengths[row] for row in chosen.tolist()]
            ids, mask = (t[chosen, : max(lengths)].contiguous() for t in (self.ids, self.mask))
            parts.append((chosen, Batch(ids, mask, lengths)))
        return parts

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """The outputs (rows, S', H) of the sub-batches, put back to (B, S, H) with zeros where there is none."""
        joined = outputs[0].new_zeros(*self.ids.shape, outputs[0].shape[-1])
        for (chosen, _), output in zip(self.by_length(), outputs, strict=True):
            joined[chosen, : output.shape[1]] = output
        return joined


def model_operations(config: ALBERTConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations of the encoder on real tokens alone, a multiply-add counted as two.

    Per token and layer 2 (4 H^2 + 2 H I) in the Linears and 4 S H in attention over its own S tokens; once 2 E H in the
    embedding's projection.
    """
    h, i, e = config.hidden_size, config.intermediate_size, config.embedding_size
    layers = config.num_hidden_layers * config.inner_group_num
    return float(sum(n * (layers * (2 * (4 * h * h + 2 * h * i) + 4 * n * h) + 2 * e * h) for n in lengths))
