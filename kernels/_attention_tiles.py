"""Tiles of attention's kernels, forward and backward, by the operands of their products, the head size and the lengths."""

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

# Longest query range -> BLOCK_M: the last layer often asks for one token a sequence only.
FEW_QUERIES, _SOME_QUERIES = 16, 64
# (bytes an element or "tf32", padded head size) -> candidates (BLOCK_M, BLOCK_N, CHUNK_D, num_warps, num_stages) for long
# query ranges, the default first: the largest tile of queries, since keys and values are read once for each.
# Bounded by registers (no spill on any of sm_80, sm_90, sm_100, under Triton 3.6 or 3.7, dropout included) and by the
# 163 KiB of shared memory of sm_80. An exact float32 product runs on plain FMA, with all its operands in registers: hence
# small tiles and chunks. As TF32 the same operands stand in shared memory, in twice the bytes of 16-bit ones.
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
# Those that hold too much for a mask beside it: 2 to 8 spills, for sm_80 or sm_100.
_NOT_WITH_DROPOUT: tuple[Tiles, ...] = (
    {"TF32": False, "BLOCK_D": 64, "BLOCK_M": 128, "BLOCK_N": 128},
    {"TF32": False, "BLOCK_D": 128, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4},
    {"TF32": True, "BLOCK_D": 128, "BLOCK_M": 128},
)
_DQ_NOT_WITH_DROPOUT: tuple[Tiles, ...] = ({"TF32": False, "BLOCK_D": 64, "BLOCK_M": 128},)
# Registers of a thread, by operands, padded head size and BLOCK_N, in tiles of more than few queries: told no limit, ptxas
# spills some of them to fit one program more.
_REGISTERS: dict[tuple[int | str, int, int], int] = {(2, 16, 32): 128, (4, 32, 16): 128, (4, 64, 32): 255}

# Of the backward, likewise; the default has the most rows that a program owns, as what it walks over is read again by each.
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
# The same of dQ, whatever BLOCK_N.
_DQ_REGISTERS = {(2, 32): 255, (4, 64): 128, ("tf32", 64): 255, ("tf32", 128): 255}


def _candidates(table: TileTable, head_dim: int, dtype: torch.dtype, tf32: bool) -> list[Tiles]:
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention: head size {head_dim}; the Triton kernel takes up to {MAX_HEAD_DIM}")
    block_d = max(16, triton.next_power_of_2(head_dim))
    names = ("BLOCK_M", "BLOCK_N", "CHUNK_D", "num_warps", "num_stages")
    rows = table["tf32" if tf32 else dtype.itemsize, block_d]
    return [{"TF32": tf32, "BLOCK_D": block_d, **dict(zip(names, row, strict=True))} for row in rows]


def attention_tiles(
    head_dim: int, dtype: torch.dtype, max_seqlen_q: int, dropout: bool = False, tf32: bool = False
) -> list[Tiles]:
    """Candidates for queries of at most `max_seqlen_q` tokens a sequence, the default first, as keywords of the kernel.

    tf32: whether float32 is multiplied so; the keywords tell the kernel.

    Raises:
        ValueError: a head size above 256.
    """
    candidates = _candidates(_TILES, head_dim, dtype, tf32)
    kind = ("tf32" if tf32 else dtype.itemsize, candidates[0]["BLOCK_D"])
    # As TF32, few queries go by the last of the candidates, the smallest.
    default = candidates[-1 if tf32 and max_seqlen_q <= _SOME_QUERIES else 0]
    if max_seqlen_q <= FEW_QUERIES:
        # Larger key tiles hide the loads of few queries; exact float32 heads of 128 would spill, and so would heads of 32
        # where ptxas is told no limit and aims at one more program.
        block_n = 16 if kind == (4, 128) else max(default["BLOCK_N"], 32)
        limits_of_few: dict[tuple[int | str, int], Tiles] = {(2, 32): {"maxnreg": 128}, (4, 32): {"maxnreg": 255}}
        limit = limits_of_few.get(kind, {})
        return [default | {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": 4} | limit]
    if max_seqlen_q <= _SOME_QUERIES and tf32:
        return [default]
    if max_seqlen_q <= _SOME_QUERIES and default["BLOCK_M"] > 64:
        return [default | {"BLOCK_M": 64, "num_warps": 4}]
    limits = [_REGISTERS.get((*kind, tiles["BLOCK_N"])) for tiles in candidates]
    bounded = [
        tiles | ({} if limit is None else {"maxnreg": limit}) for tiles, limit in zip(candidates, limits, strict=True)
    ]
    return _with_room(bounded, dropout, _NOT_WITH_DROPOUT)


def _with_room(candidates: list[Tiles], dropout: bool, too_large: Sequence[Tiles]) -> list[Tiles]:
    """The candidates without those that are too large beside dropout's mask."""
    return [tiles for tiles in candidates if not (dropout and any(some.items() <= tiles.items() for some in too_large))]


def attention_bwd_tiles(
    head_dim: int, dtype: torch.dtype, max_seqlen_q: int, max_seqlen_k: int, dropout: bool = False, tf32: bool = False
) -> tuple[list[Tiles], list[Tiles]]:
    """Candidates for the kernels of dQ and of dK and dV, for sequences of at most so many tokens, the default first.

    Raises:
        ValueError: a head size above 256.
    """
    dq, dkdv = (_candidates(table, head_dim, dtype, tf32) for table in (_DQ_TILES, _DKDV_TILES))
    kind = ("tf32" if tf32 else dtype.itemsize, dq[0]["BLOCK_D"])
    if kind == ("tf32", 64):  # spilt on sm_100 where ptxas is told no limit
        dkdv = [tiles | {"maxnreg": 255} for tiles in dkdv]
    if max_seqlen_q <= FEW_QUERIES:
        # Float32 and wide heads keep their warps: with fewer they would spill, float32 heads of 64 in short chunks
        # too, and as TF32 heads of 128 where ptxas is told no limit.
        fewer = {"num_warps": 4} if dtype.itemsize == 2 and head_dim <= 128 else {}
        other: Tiles = {(4, 64): {"CHUNK_D": 32}, ("tf32", 128): {"maxnreg": 255}}.get(kind, {})
        # Told no limit, ptxas spills 16-bit heads of 64 on sm_100, under Triton 3.6.
        limit = {"maxnreg": 255} if kind == (2, 64) else {}
        dq, dkdv = [dq[0] | {"BLOCK_M": 16} | fewer | other], [tiles | {"BLOCK_M": 16} | limit for tiles in dkdv]
    elif kind in _DQ_REGISTERS:
        dq = [tiles | {"maxnreg": _DQ_REGISTERS[kind]} for tiles in dq]
    dq = _with_room(dq, dropout, _DQ_NOT_WITH_DROPOUT)
    # Of short sequences, no more rows than the smallest tile has.
    dq = [tiles for tiles in dq if max_seqlen_q > 64 or tiles["BLOCK_M"] <= 64]
    return dq, [tiles for tiles in dkdv if max_seqlen_k > 64 or tiles["BLOCK_N"] <= 64]


def choice_key(
    head_dim: int, dtype: torch.dtype, tf32: bool, dropout_p: float, max_seqlen_q: int, max_seqlen_k: int
) -> str:
    """What the fastest tiles depend on, beside the chip; lengths by their powers of two."""
    lengths = f"Q{triton.next_power_of_2(max_seqlen_q)} K{triton.next_power_of_2(max_seqlen_k)}"
    return f"{numbers_name(dtype, tf32)} D{head_dim} {lengths}" + (" dropout" if dropout_p else "")
