"""Tile sizes of attention's kernels, forward and backward, by type of operands, head size and lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton

from ._precision import numbers_name
from ._tuning import Tiles

TileRow = tuple[int, int, int, int, int]
# (operands, padded head size) -> rows of a table
TileTable = Mapping[tuple[int | str, int], Sequence[TileRow]]
MAX_HEAD_DIM = 256

# Bounds on the queries of a sequence, for smaller BLOCK_M: often the last layer computes one token of each sequence only.
FEW_QUERIES, _SOME_QUERIES = 16, 64
# (bytes per element or "tf32", padded head size) -> candidates (BLOCK_M, BLOCK_N, CHUNK_D, num_warps, num_stages) for many
# queries, the default first: the tile with most queries, since keys and values are read once for each tile.
# Registers bound them (none spills on sm_80, sm_90 or sm_100, under Triton 3.6 or 3.7, with or without dropout), and the
# 163 KiB of shared memory of sm_80. An exact float32 product runs on plain FMA, with all its operands in registers: hence
# small tiles and chunks. TF32 operands are in shared memory, with twice the bytes of 16-bit ones.
_TILES: TileTable = {
    (2, 16): ((128, 32, 16, 8, 3),),
    (2, 32): ((64, 64, 32, 4, 3),),
    (2, 64): ((128, 64, 64, 8, 3), (128, 128, 64, 8, 2), (64, 64, 64, 4, 3)),
    (2, 128): ((128, 64, 64, 8, 3), (64, 64, 64, 4, 2)),
    (2, 256): ((64, 16, 64, 8, 2),),
    (4, 16): ((64, 32, 16, 4, 1),),
    (4, 32): ((64, 16, 16, 8, 1),),
    (4, 64): ((64, 16, 16, 8, 1), (64, 32, 16, 8, 1)),
    (4, 128): ((32, 32, 16, 4, 1),),
    (4, 256): ((16, 32, 16, 4, 1),),
    ("tf32", 16): ((128, 32, 16, 4, 2), (64, 32, 16, 4, 2)),
    ("tf32", 32): ((64, 32, 32, 4, 2),),
    ("tf32", 64): ((128, 32, 64, 8, 2), (128, 64, 64, 8, 2), (64, 32, 64, 4, 3)),
    ("tf32", 128): ((128, 32, 128, 8, 2), (64, 32, 32, 8, 2)),
    ("tf32", 256): ((64, 16, 64, 8, 2),),
}
# Candidates that spill with dropout, or causal: 2 to 8 registers, on sm_80 or sm_100.
_NOT_WITH_DROPOUT: tuple[Tiles, ...] = (
    {"TF32": False, "BLOCK_D": 64, "BLOCK_M": 128, "BLOCK_N": 128},
    {"TF32": False, "BLOCK_D": 128, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4},
    {"TF32": True, "BLOCK_D": 128, "BLOCK_M": 128},
)
_DQ_NOT_WITH_DROPOUT: tuple[Tiles, ...] = ({"TF32": False, "BLOCK_D": 64, "BLOCK_M": 128},)
# Limits on registers per thread, by operands, padded head size and BLOCK_N, for tiles of more than FEW_QUERIES queries: without a
# limit ptxas spills some registers to fit one more program.
_REGISTERS: dict[tuple[int | str, int, int], int] = {(2, 16, 32): 128, (4, 32, 16): 128, (4, 64, 32): 255}

# The same for the backward. The default gives a program the most rows, since every program reads again what it walks over.
_DQ_TILES: TileTable = {
    (2, 16): ((64, 64, 16, 4, 2),),
    (2, 32): ((64, 64, 32, 4, 2),),
    (2, 64): ((128, 64, 64, 8, 2), (64, 32, 64, 4, 2), (64, 64, 64, 8, 2)),
    (2, 128): ((64, 64, 64, 8, 2),),
    (2, 256): ((64, 16, 64, 8, 1),),
    (4, 16): ((32, 16, 16, 4, 1),),
    (4, 32): ((32, 16, 32, 8, 1),),
    (4, 64): ((64, 16, 16, 8, 1), (32, 16, 16, 4, 1)),
    (4, 128): ((16, 16, 16, 4, 1),),
    (4, 256): ((16, 16, 16, 8, 1),),
    ("tf32", 16): ((64, 32, 16, 4, 2),),
    ("tf32", 32): ((64, 32, 32, 4, 2),),
    ("tf32", 64): ((128, 32, 64, 8, 1), (64, 32, 64, 8, 2)),
    ("tf32", 128): ((64, 16, 32, 8, 1),),
    ("tf32", 256): ((64, 16, 32, 8, 1),),
}
_DKDV_TILES: TileTable = {
    (2, 16): ((32, 64, 16, 4, 2),),
    (2, 32): ((32, 64, 32, 4, 2),),
    (2, 64): ((32, 128, 64, 8, 2), (32, 64, 64, 4, 2)),
    (2, 128): ((32, 64, 64, 8, 2),),
    (2, 256): ((16, 64, 128, 8, 1),),
    (4, 16): ((16, 32, 16, 4, 1),),
    (4, 32): ((16, 32, 32, 8, 1),),
    (4, 64): ((16, 64, 16, 8, 1), (16, 32, 16, 4, 1)),
    (4, 128): ((16, 32, 16, 8, 1),),
    (4, 256): ((16, 16, 16, 8, 1),),
    ("tf32", 16): ((32, 64, 16, 4, 2),),
    ("tf32", 32): ((32, 64, 32, 8, 1),),
    ("tf32", 64): ((16, 128, 64, 8, 1), (32, 64, 32, 8, 1)),
    ("tf32", 128): ((16, 64, 32, 8, 1),),
    ("tf32", 256): ((16, 64, 32, 8, 2),),
}
# Limits on registers per thread of the kernel of dQ, for every BLOCK_N.
_DQ_REGISTERS = {(2, 32): 255, (4, 64): 128, ("tf32", 64): 255, ("tf32", 128): 255}


def _candidates(table: TileTable, head_dim: int, dtype: torch.dtype, tf32: bool) -> list[Tiles]:
    """A row of a table as keywords of the kernel."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention: head size {head_dim}; the Triton kernel takes up to {MAX_HEAD_DIM}")
    block_d = max(16, triton.next_power_of_2(head_dim))
    names = ("BLOCK_M", "BLOCK_N", "CHUNK_D", "num_warps", "num_stages")
    rows = table["tf32" if tf32 else dtype.itemsize, block_d]
    return [{"TF32": tf32, "BLOCK_D": block_d, **dict(zip(names, row, strict=True))} for row in rows]


def attention_tiles(
    head_dim: int,
    dtype: torch.dtype,
    max_seqlen_q: int,
    dropout: bool = False,
    tf32: bool = False,
    causal: bool = False,
) -> list[Tiles]:
    """Candidates for at most `max_seqlen_q` queries per sequence, the default first, as keywords of the kernel.

    tf32: whether float32 is multiplied as TF32; it is one of the keywords.

    Raises:
        ValueError: a head size above 256.
    """
    candidates = _candidates(_TILES, head_dim, dtype, tf32)
    kind = ("tf32" if tf32 else dtype.itemsize, candidates[0]["BLOCK_D"])
    # With TF32, few queries take the last candidate, the smallest.
    default = candidates[-1 if tf32 and max_seqlen_q <= _SOME_QUERIES else 0]
    if max_seqlen_q <= FEW_QUERIES:
        # With few queries, larger tiles of keys hide the time of loads. Exact float32 heads of 128 would spill, and so would heads
        # of 32 without a limit, because ptxas then aims at one more program.
        block_n = 16 if kind == (4, 128) else max(default["BLOCK_N"], 32)
        few_limits: dict[tuple[int | str, int], Tiles] = {(2, 32): {"maxnreg": 128}, (4, 32): {"maxnreg": 255}}
        limit = few_limits.get(kind, {})
        return [default | {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": 4} | limit]
    if max_seqlen_q <= _SOME_QUERIES and tf32:
        return [default]
    if max_seqlen_q <= _SOME_QUERIES and default["BLOCK_M"] > 64:
        return [default | {"BLOCK_M": 64, "num_warps": 4}]
    limits = [_REGISTERS.get((*kind, tiles["BLOCK_N"])) for tiles in candidates]
    bounded = [
        tiles | ({} if limit is None else {"maxnreg": limit}) for tiles, limit in zip(candidates, limits, strict=True)
    ]
    return _with_room(bounded, dropout or causal, _NOT_WITH_DROPOUT)


def _with_room(candidates: list[Tiles], masked: bool, too_large: Sequence[Tiles]) -> list[Tiles]:
    """The candidates; if probabilities are masked (dropout, causal), without those that are too large then."""
    return [tiles for tiles in candidates if not (masked and any(some.items() <= tiles.items() for some in too_large))]


def attention_bwd_tiles(
    head_dim: int,
    dtype: torch.dtype,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout: bool = False,
    tf32: bool = False,
    causal: bool = False,
) -> tuple[list[Tiles], list[Tiles]]:
    """Candidates for the kernel of dQ and for that of dK and dV, for sequences of at most these lengths, the default first.

    Raises:
        ValueError: a head size above 256.
    """
    dq, dkdv = (_candidates(table, head_dim, dtype, tf32) for table in (_DQ_TILES, _DKDV_TILES))
    kind = ("tf32" if tf32 else dtype.itemsize, dq[0]["BLOCK_D"])
    if kind == ("tf32", 64) or (causal and kind == (2, 32)):  # without a limit ptxas spills on sm_100, on sm_80
        dkdv = [tiles | {"maxnreg": 255} for tiles in dkdv]
    if max_seqlen_q <= FEW_QUERIES:
        # Float32 and wide heads keep their number of warps: with fewer they would spill. So would float32 heads of 64 in short
        # chunks, and TF32 heads of 128 without a limit on registers.
        fewer = {"num_warps": 4} if dtype.itemsize == 2 and head_dim <= 128 else {}
        other: Tiles = {(4, 64): {"CHUNK_D": 32}, ("tf32", 128): {"maxnreg": 255}}.get(kind, {})
        # Without a limit ptxas spills 16-bit heads of 64 on sm_100, under Triton 3.6.
        limit = {"maxnreg": 255} if kind == (2, 64) else {}
        dq, dkdv = [dq[0] | {"BLOCK_M": 16} | fewer | other], [tiles | {"BLOCK_M": 16} | limit for tiles in dkdv]
    elif kind in _DQ_REGISTERS:
        dq = [tiles | {"maxnreg": _DQ_REGISTERS[kind]} for tiles in dq]
    dq = _with_room(dq, dropout or causal, _DQ_NOT_WITH_DROPOUT)
    # Short sequences take no more rows than the smallest tile has.
    dq = [tiles for tiles in dq if max_seqlen_q > 64 or tiles["BLOCK_M"] <= 64]
    return dq, [tiles for tiles in dkdv if max_seqlen_k > 64 or tiles["BLOCK_N"] <= 64]


def choice_key(
    head_dim: int, dtype: torch.dtype, tf32: bool, dropout_p: float, causal: bool, max_seqlen_q: int, max_seqlen_k: int
) -> str:
    """What the fastest tiles depend on, apart from the chip; lengths are rounded up to powers of two."""
    lengths = f"Q{triton.next_power_of_2(max_seqlen_q)} K{triton.next_power_of_2(max_seqlen_k)}"
    return f"{numbers_name(dtype, tf32)} D{head_dim} {lengths}" + " dropout" * bool(dropout_p) + " causal" * causal
