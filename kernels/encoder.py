"""encoder: all layers of a small batch in one launch, whose programs stay and wait for each other between phases.

With few tokens a layer's kernels take less time than the gaps between launches. So one grid, no larger than the number of
multiprocessors, goes through the phases of every layer. Each phase is divided into tiles and ends with a barrier of all programs:

    0  qkv = LayerNorm(sums) Wqkv^T + b             tiles of rows and columns
    1  context = attention(qkv)                     tiles of a head and BLOCK_Q queries
    2  attended = context Wo^T + b + LayerNorm(sums)
    3  middle = act(LayerNorm(attended) Wup^T + b)
    4  sums = middle Wdown^T + b + LayerNorm(attended)

After the last layer out = LayerNorm(sums). LayerNorms need no phase of their own: the program that writes a tile of `attended`
or `sums` also writes each row's mean and sum of squares within the tile, and programs that read a row combine them (Chan et
al. 1979). The last layer computes only the wanted rows from attention on; phase 0 still computes the queries of all tokens.

If a product has fewer tiles than PROGRAMS, its inner dimension is split: every program writes its partial sums, and the
last one to finish a tile adds all of them, in the order of the splits. Tiles and splits depend on the shape alone,
so a result does not depend on the chip or on timing.

Bytes: the weights are read once from memory, then from the L2 cache (14 MB of ALBERT-base in 16 bits), where activations stay
too. A tile of a product reads BLOCK_M + BLOCK_N rows of its inner dimension: at 128 tokens of ALBERT-base a layer reads 57 MB
from the L2 cache: 14 MB for qkv, 5 for the attention's output, 19 for each of the FFN's. Partial sums add 7 MB, written and
read.

The barrier: `tl.debug_barrier` (bar.sync) orders the stores of all threads of a program before its thread 0. Thread 0 adds 1
to a counter with release at the scope of the GPU, and then reads it with acquire (Triton's form of this is an addition of 0)
until all programs have arrived. Triton hands the value that thread 0 read to the other threads through shared memory and
another bar.sync. Causality is transitive in PTX's memory model, so any load after the barrier sees what any thread stored
before it; on the chip the acquire empties the L1 cache. This holds for ordinary loads and cp.async. It does not hold for
ld.global.nc, which Triton does not emit (tests/test_encoder.py reads the PTX). The launch is cooperative: it fails if not all
programs can run at once. The counter is zeroed in the stream ahead of each launch, so a replayed graph, a launch on another
stream and a launch after an aborted one each begin with a clean counter. A program that has polled 2^22 times, some seconds,
traps: a bug ends in a CUDA error, not in a GPU that hangs or in a wrong result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._attention_tiles import FEW_QUERIES, attention_tiles
from ._common import ACT_CODES, COMPILER_OPTIONS
from ._encoder_phases import (
    NO_ACT,
    Linear,
    NormedRows,
    ProductTile,
    SplitSums,
    Wanted,
    attention_phase,
    barrier,
    chosen,
    norm_phase,
    product_phase,
)
from ._encoder_weights import WEIGHTS, DistinctLayers, LayerWeights, distinct_layers, layer_weight
from ._precision import multiplies_tf32
from ._tuning import Tiles
from .attention import LOG2_E, HeadTile

MAX_HEAD_DIM = 128
# Upper bound on the programs that share a product. It is a constant, so that sums are the same on every chip.
PROGRAMS = 128
# Steps of BLOCK_K below which a split of the inner dimension costs more than it saves.
_MIN_STEPS = 3
_PHASES = 5
# The barrier's counter has a cache line of its own; each split tile's count of programs follows it.
_ARRIVALS_AT = tl.constexpr(32)


class Buffers(NamedTuple):
    """What phases write and later phases read; one argument of the kernel."""

    qkv_ptr: Any  # (T, 3H)
    context_ptr: Any  # (T, H)
    attended_ptr: Any  # (T, H)
    attended_statistics_ptr: Any  # (T, 2, blocks) float32
    middle_ptr: Any  # (T, I)
    sums_ptr: Any  # (T, H)
    sums_statistics_ptr: Any  # (T, 2, blocks) float32
    partials_ptr: Any  # (PROGRAMS, BLOCK_M, BLOCK_N) float32
    state_ptr: Any  # (_ARRIVALS_AT + PROGRAMS,) int32, zeros


@triton.jit(
    do_not_specialize=[
        *("n_tokens", "n_wanted", "n_sequences", "n_layers", "first_phase", "end_phase"),
        *("qkv_steps", "dense_steps", "ffn_steps", "ffn_output_steps"),
    ]
)
def _encoder_fwd_kernel(
    hidden_ptr,  # (T, H)
    weights,  # LayerWeights, of the first layer
    distinct,  # DistinctLayers
    cu_seqlens_ptr,  # (B + 1,) int32
    wanted_rows_ptr,  # (Tq,) int64, or None for all tokens
    cu_wanted_ptr,  # (B + 1,) int32, or None
    buffers,  # Buffers
    out_ptr,  # (Tq, H)
    n_tokens,  # T
    n_wanted,  # Tq
    n_sequences,  # B
    width,  # H
    middle_width,  # I
    num_heads,
    n_layers,
    first_phase,  # of 5 n_layers + 1
    end_phase,
    qkv_steps,  # this and the next three: steps of BLOCK_K in a split of the inner dimension of each product
    dense_steps,
    ffn_steps,
    ffn_output_steps,
    scale_log2,  # softmax_scale * log2(e)
    eps,
    ACT: tl.constexpr,  # a value of ACT_CODES
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM padded to a power of two
    CHUNK_D: tl.constexpr,  # columns of a head multiplied at a time
    BLOCK_Q: tl.constexpr,  # queries of a tile of attention
    BLOCK_S: tl.constexpr,  # keys of attention at a time
    BLOCK_M: tl.constexpr,  # this and the next three: as in ProductTile
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    TF32: tl.constexpr,  # whether float32 is multiplied as TF32
):
    # Every program takes part in every phase.
    TILE: tl.constexpr = ProductTile(BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS, TF32)
    HEAD_TILE: tl.constexpr = HeadTile(HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_S, CHUNK_D, TF32)
    split_sums = SplitSums(buffers.partials_ptr, buffers.state_ptr + _ARRIVALS_AT)
    # Without disable_licm the compiler keeps addresses of all phases in registers during each phase, and spills.
    for phase in tl.range(first_phase, end_phase, disable_licm=True):
        layer = phase // 5
        kind = phase % 5
        is_sum = layer > 0
        gather = layer == n_layers - 1
        n_rows = tl.where(layer >= n_layers - 1, n_wanted, n_tokens)
        # The LayerNorm at a layer's end is applied where its result is read: in the next layer.
        before = tl.maximum(layer - 1, 0)
        full_norm_weight_ptr = layer_weight(distinct, before, weights.full_norm_weight_ptr, 14)
        full_norm_bias_ptr = layer_weight(distinct, before, weights.full_norm_bias_ptr, 15)
        own = tl.minimum(layer, n_layers - 1)
        norm_weight_ptr = layer_weight(distinct, own, weights.norm_weight_ptr, 8)
        norm_bias_ptr = layer_weight(distinct, own, weights.norm_bias_ptr, 9)
        z_ptr = chosen(is_sum, buffers.sums_ptr, hidden_ptr)
        z_normed = NormedRows(z_ptr, buffers.sums_statistics_ptr, full_norm_weight_ptr, full_norm_bias_ptr, is_sum)
        attended_normed = NormedRows(
            buffers.attended_ptr, buffers.attended_statistics_ptr, norm_weight_ptr, norm_bias_ptr, True
        )
        if layer == n_layers:
            norm_phase(
                NormedRows(
                    buffers.sums_ptr, buffers.sums_statistics_ptr, full_norm_weight_ptr, full_norm_bias_ptr, True
                ),
                out_ptr,
                n_rows,
                width,
                eps,
                TILE,
            )
        elif kind == 0:
            product_phase(
                z_ptr,
                z_normed,
                Linear(
                    layer_weight(distinct, own, weights.query_ptr, 0),
                    layer_weight(distinct, own, weights.query_bias_ptr, 1),
                ),
                Linear(
                    layer_weight(distinct, own, weights.key_ptr, 2),
                    layer_weight(distinct, own, weights.key_bias_ptr, 3),
                ),
                Linear(
                    layer_weight(distinct, own, weights.value_ptr, 4),
                    layer_weight(distinct, own, weights.value_bias_ptr, 5),
                ),
                buffers.qkv_ptr,
                None,
                split_sums,
                Wanted(None, False, n_tokens),
                n_tokens,
                width,
                width,
                qkv_steps,
                eps,
                False,
                NO_ACT,
                TILE,
            )
        elif kind == 1:
            cu_queries_ptr = cu_seqlens_ptr
            if wanted_rows_ptr is not None:
                cu_queries_ptr = chosen(gather, cu_wanted_ptr, cu_seqlens_ptr)
            attention_phase(
                buffers.qkv_ptr,
                buffers.context_ptr,
                cu_seqlens_ptr,
                cu_queries_ptr,
                Wanted(wanted_rows_ptr, gather, n_tokens),
                n_rows,
                n_sequences,
                width,
                num_heads,
                scale_log2,
                HEAD_TILE,
            )
        elif kind == 2:
            product_phase(
                buffers.context_ptr,
                z_normed,
                Linear(
                    layer_weight(distinct, own, weights.dense_ptr, 6),
                    layer_weight(distinct, own, weights.dense_bias_ptr, 7),
                ),
                None,
                None,
                buffers.attended_ptr,
                buffers.attended_statistics_ptr,
                split_sums,
                Wanted(wanted_rows_ptr, gather, n_tokens),
                n_rows,
                width,
                width,
                dense_steps,
                eps,
                True,
                NO_ACT,
                TILE,
            )
        elif kind == 3:
            product_phase(
                buffers.attended_ptr,
                attended_normed,
                Linear(
                    layer_weight(distinct, own, weights.ffn_ptr, 10),
                    layer_weight(distinct, own, weights.ffn_bias_ptr, 11),
                ),
                None,
                None,
                buffers.middle_ptr,
                None,
                split_sums,
                Wanted(None, False, n_tokens),
                n_rows,
                middle_width,
                width,
                ffn_steps,
                eps,
                False,
                ACT,
                TILE,
            )
        else:
            product_phase(
                buffers.middle_ptr,
                attended_normed,
                Linear(
                    layer_weight(distinct, own, weights.ffn_output_ptr, 12),
                    layer_weight(distinct, own, weights.ffn_output_bias_ptr, 13),
                ),
                None,
                None,
                buffers.sums_ptr,
                buffers.sums_statistics_ptr,
                split_sums,
                Wanted(None, False, n_tokens),
                n_rows,
                width,
                middle_width,
                ffn_output_steps,
                eps,
                True,
                NO_ACT,
                TILE,
            )
        if phase + 1 < end_phase:
            barrier(buffers.state_ptr, (phase + 1 - first_phase) * tl.num_programs(0))


# (bytes per element or "tf32", whether there are few tokens) -> (BLOCK_M, BLOCK_N, BLOCK_K, num_stages). Not compared on a GPU
# yet. For tensor cores the tiles are as large as possible while about a hundred programs have work at 128 tokens, with 36 to
# 48 KiB of loads in flight.
FEW_TOKENS = 16
_TILES: dict[tuple[int | str, bool], tuple[int, int, int, int]] = {
    (2, True): (16, 32, 128, 4),
    (2, False): (64, 64, 64, 4),
    (4, True): (16, 32, 16, 2),
    (4, False): (32, 32, 16, 2),
    ("tf32", True): (16, 32, 64, 4),
    ("tf32", False): (64, 64, 32, 4),
}


def encoder_tiles(head_dim: int, dtype: torch.dtype, n_tokens: int, tf32: bool = False) -> Tiles:
    """The kernel's tiles, as keywords.

    Raises:
        ValueError: a head size above 128.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"encoder: head size {head_dim}; the Triton kernel takes up to {MAX_HEAD_DIM}")
    heads = attention_tiles(head_dim, dtype, FEW_QUERIES, tf32=tf32)[0]
    block_m, block_n, block_k, num_stages = _TILES["tf32" if tf32 else dtype.itemsize, n_tokens <= FEW_TOKENS]
    return {
        "TF32": tf32,
        "BLOCK_D": heads["BLOCK_D"],
        "CHUNK_D": heads["CHUNK_D"],
        "BLOCK_Q": heads["BLOCK_M"],
        "BLOCK_S": heads["BLOCK_N"],
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "maxnreg": 255,
        "num_warps": 8,
        "num_stages": num_stages,
    }


def _tile_count(tiles: Tiles, n_rows: int, n_cols: int) -> int:
    return triton.cdiv(n_rows, tiles["BLOCK_M"]) * triton.cdiv(n_cols, tiles["BLOCK_N"])


def split_depth(n_tiles: int, depth: int, block_k: int) -> tuple[int, int]:
    """(splits, steps): the number of splits of a product's inner dimension, and the steps of BLOCK_K in each."""
    steps = triton.cdiv(depth, block_k)
    wanted = max(1, min(PROGRAMS // n_tiles, steps // _MIN_STEPS))
    steps_of_each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, steps_of_each), steps_of_each


def _programs(device: torch.device) -> int:
    """The number of programs that can wait for each other: one per multiprocessor; one in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _run(
    hidden: torch.Tensor,
    layer: Sequence[torch.Tensor],
    distinct: DistinctLayers,
    n_layers: int,
    cu_seqlens: torch.Tensor,
    wanted_rows: torch.Tensor | None,
    cu_wanted: torch.Tensor | None,
    num_heads: int,
    softmax_scale: float,
    eps: float,
    act: str,
    step_programs: int,
) -> torch.Tensor:
    """Run `n_layers` layers, all with the weights of `layer` or with those of `distinct`; the other arguments are those of
    `encoder_fwd`."""
    (n_tokens, width), middle_width = hidden.shape, len(layer[WEIGHTS.index("ffn")])
    n_wanted, head_dim = n_tokens if wanted_rows is None else len(wanted_rows), width // num_heads
    tiles = encoder_tiles(head_dim, hidden.dtype, n_tokens, multiplies_tf32(hidden.dtype))
    counts = [_tile_count(tiles, n_tokens, n) for n in (width, width, middle_width, width)]
    counts[0] *= 3  # query, key and value each begin with a whole tile
    depths = (width, width, width, middle_width)
    splits = [split_depth(n, depth, tiles["BLOCK_K"]) for n, depth in zip(counts, depths, strict=True)]
    steps = [steps_of_each for _, steps_of_each in splits]
    blocks = triton.cdiv(width, tiles["BLOCK_N"])

    def empty(rows: int, *columns: int, dtype: torch.dtype = hidden.dtype) -> torch.Tensor:
        return torch.empty((rows, *columns), dtype=dtype, device=hidden.device)

    qkv, context, attended, middle, sums = (empty(n_tokens, n) for n in (3 * width, width, width, middle_width, width))
    attended_statistics, sums_statistics = (empty(n_tokens, 2, blocks, dtype=torch.float32) for _ in range(2))
    partials = empty(PROGRAMS, tiles["BLOCK_M"], tiles["BLOCK_N"], dtype=torch.float32)
    state = torch.zeros(_ARRIVALS_AT.value + PROGRAMS, dtype=torch.int32, device=hidden.device)
    buffers = Buffers(qkv, context, attended, attended_statistics, middle, sums, sums_statistics, partials, state)
    out = empty(n_wanted, width)
    tensors = (hidden, LayerWeights(*layer), distinct, cu_seqlens, wanted_rows, cu_wanted, buffers, out)
    sizes = (n_tokens, n_wanted, len(cu_seqlens) - 1, width, middle_width, num_heads, n_layers)
    constants = {"ACT": ACT_CODES[act], "HEAD_DIM": head_dim, "BLOCKS": triton.next_power_of_2(blocks), **tiles}
    options = {"launch_cooperative_grid": not step_programs, **COMPILER_OPTIONS}

    def launch(programs: int, *phases: int) -> None:
        numbers = (*sizes, *phases, *steps, softmax_scale * LOG2_E, eps)
        _encoder_fwd_kernel[(programs,)](*tensors, *numbers, **constants, **options)

    n_phases = _PHASES * n_layers + 1
    with torch.cuda.device_of(hidden):
        if step_programs:
            for phase in range(n_phases):
                launch(step_programs, phase, phase + 1)
        else:
            heads = triton.cdiv(n_tokens, tiles["BLOCK_Q"]) * num_heads
            most = max(heads, *(n * parts for n, (parts, _) in zip(counts, splits, strict=True)))
            launch(min(_programs(hidden.device), most), 0, n_phases)
    return out


def encoder_fwd(
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    layer_indices: Sequence[int],
    cu_seqlens: torch.Tensor,
    wanted_rows: torch.Tensor | None,
    cu_wanted: torch.Tensor | None,
    num_heads: int,
    softmax_scale: float,
    eps: float,
    act: str,
    step_programs: int = 0,
) -> torch.Tensor:
    """The hidden states after all layers (Lan et al. 2019, section 3.1), in one launch.

    Layers that differ take a launch each where a weight begins at no multiple of 16 bytes, as a view into a larger tensor may.

    Args:
        hidden: (T, H), packed tokens.
        weights: 16 tensors of each distinct layer, in the order of `LayerWeights` and in hidden's dtype.
        layer_indices: which distinct layer runs at each step.
        cu_seqlens: (B + 1,) int32, each sequence's first row, and the end.
        wanted_rows, cu_wanted: the rows (Tq,) int64 that the caller wants of the last layer, and where each sequence's begin
            among them, (B + 1,) int32; None: all rows.
        num_heads: H / num_heads is the head size, 1 to 128.
        softmax_scale: factor on the scores.
        eps: of every LayerNorm.
        act: a key of ACT_CODES.
        step_programs: 0: all phases in one launch. Otherwise every phase is a launch of that many programs, without a barrier.

    Returns:
        (T, H), or (Tq, H), in hidden's dtype.

    Raises:
        ValueError: a head size above 128.
    """
    hidden, cu_seqlens = hidden.contiguous(), cu_seqlens.contiguous()
    weights = [weight.contiguous() for weight in weights]
    if wanted_rows is not None and cu_wanted is not None:
        wanted_rows, cu_wanted = wanted_rows.contiguous(), cu_wanted.contiguous()
    runs = [(number, len(list(equal))) for number, equal in itertools.groupby(layer_indices)]
    if len(hidden) == 0 or (wanted_rows is not None and len(wanted_rows) == 0):
        return torch.empty((0, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    distinct = distinct_layers(weights, layer_indices) if len(runs) > 1 else None
    if distinct is not None:
        runs = [(0, len(layer_indices))]
    for i, (number, n_layers) in enumerate(runs):
        rows, ends = (wanted_rows, cu_wanted) if i == len(runs) - 1 else (None, None)
        layer = weights[len(WEIGHTS) * number : len(WEIGHTS) * (number + 1)]
        own, numbers = distinct or DistinctLayers(None, None), (num_heads, softmax_scale, eps, act, step_programs)
        hidden = _run(hidden, layer, own, n_layers, cu_seqlens, rows, ends, *numbers)
    return hidden
