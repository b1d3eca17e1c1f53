"""encoder: all layers of a small batch in one launch, by programs that stay and wait for each other.

At few tokens a layer's kernels are shorter than what lies between two kernels. So one grid, no larger than the number of
multiprocessors, goes through the phases of every layer, each divided into tiles, with a barrier of all programs behind it:

    0  qkv = LayerNorm(sums) Wqkv^T + b             tiles of rows and columns
    1  context = attention(qkv)                     tiles of a head and BLOCK_Q queries
    2  attended = context Wo^T + b + LayerNorm(sums)
    3  middle = act(LayerNorm(attended) Wup^T + b)
    4  sums = middle Wdown^T + b + LayerNorm(attended)

and behind the last layer out = LayerNorm(sums). LayerNorms cost no phase: who writes a tile of `attended` or `sums` writes
each row's mean and sum of squares within the tile too, and who reads a row joins those (Chan et al. 1979). Of the last
layer only the rows that are asked for are computed, from attention on: phase 0 computes their queries among all keys.

Where a product has fewer tiles than PROGRAMS its inner dimension is split: every program writes its partial sums, and the
one that comes last to a tile adds all of them, in the order of the splits. Tiles and splits follow from the shape alone,
so a result does not depend on the chip or on timing.

Bytes: the weights once from memory, then from the L2 cache (14 MB of ALBERT-base in 16 bits), where activations stay too.
A tile of a product reads BLOCK_M + BLOCK_N rows of its inner dimension: at 128 tokens of ALBERT-base 57 MB a layer
from the L2 cache, 14 MB for qkv, 5 for the attention's output, 19 for each of the FFN's; partial sums are 7 MB more,
there and back.

The barrier. `tl.debug_barrier` (bar.sync) orders the stores of all threads of a program before its thread 0, which
adds 1 to a counter with release at the scope of the GPU, and then reads it with acquire, which Triton spells as an
addition of 0, until all have come; Triton hands what thread 0 has read to the others through shared memory and another
bar.sync. Causality is transitive in PTX's memory model, so what any thread stored before its barrier is seen by what
any thread loads behind it; on the chip the acquire empties the L1 cache. It holds for ordinary loads and cp.async, and
not for ld.global.nc, which Triton does not emit (tests/test_encoder.py reads the PTX). The launch is cooperative: it
fails where not all programs can run at once. The counter is zeroed in the stream ahead of each launch, so a replayed
graph, a launch on another stream and one behind an aborted launch each begin with a clean one. A program that has
polled 2^22 times, some seconds, traps: a bug ends in a CUDA error, not in a GPU that hangs or in a wrong result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._attention_tiles import FEW_QUERIES, attention_tiles
from ._common import ACT_CODES, COMPILER_OPTIONS
from ._encoder_phases import NO_ACT, attention_phase, barrier, chosen, norm_phase, product_phase
from ._precision import multiplies_tf32
from ._tuning import Tiles
from .attention import LOG2_E

MAX_HEAD_DIM = 128
# What products are divided among at most; a constant, so that sums are the same on every chip.
PROGRAMS = 128
# Steps of BLOCK_K below which a split of the inner dimension costs more than it saves.
_MIN_STEPS = 3
_PHASES = 5
# The counter of the barrier has a line of the cache for itself; behind it each split tile's count of programs.
_ARRIVALS_AT = tl.constexpr(32)


@triton.jit(
    do_not_specialize=[
        *("n_tokens", "n_queries", "n_sequences", "n_layers", "first_phase", "end_phase", "qkv_splits", "qkv_steps"),
        *("dense_splits", "dense_steps", "ffn_splits", "ffn_steps", "ffn_output_splits", "ffn_output_steps"),
    ]
)
def _encoder_fwd_kernel(
    hidden_ptr,  # (T, H)
    query_ptr,  # (H, H)
    query_bias_ptr,  # (H,)
    key_ptr,  # (H, H)
    key_bias_ptr,  # (H,)
    value_ptr,  # (H, H)
    value_bias_ptr,  # (H,)
    dense_ptr,  # (H, H)
    dense_bias_ptr,  # (H,)
    norm_weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    ffn_ptr,  # (I, H)
    ffn_bias_ptr,  # (I,)
    ffn_output_ptr,  # (H, I)
    ffn_output_bias_ptr,  # (H,)
    full_norm_weight_ptr,  # (H,)
    full_norm_bias_ptr,  # (H,)
    cu_seqlens_ptr,  # (B + 1,) int32
    rows_ptr,  # (Tq,) int64, or None for all tokens
    cu_rows_ptr,  # (B + 1,) int32, or None
    qkv_out_ptr,  # (T, 3H)
    context_ptr,  # (T, H)
    attended_ptr,  # (T, H)
    attended_statistics_ptr,  # (T, 2, blocks) float32
    middle_ptr,  # (T, I)
    sums_ptr,  # (T, H)
    sums_statistics_ptr,  # (T, 2, blocks) float32
    partials_ptr,  # (PROGRAMS, BLOCK_M, BLOCK_N) float32
    state_ptr,  # (_ARRIVALS_AT + PROGRAMS,) int32, zeros
    out_ptr,  # (Tq, H)
    n_tokens,  # T
    n_queries,  # Tq
    n_sequences,  # B
    width,  # H
    middle_width,  # I
    num_heads,
    n_layers,
    first_phase,  # of 5 n_layers + 1
    end_phase,
    qkv_splits,  # of the inner dimension of each product, and the steps of BLOCK_K in a split
    qkv_steps,
    dense_splits,
    dense_steps,
    ffn_splits,
    ffn_steps,
    ffn_output_splits,
    ffn_output_steps,
    scale_log2,  # softmax_scale * log2(e)
    eps,
    ACT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM padded to a power of two
    CHUNK_D: tl.constexpr,  # columns of a head multiplied at a time
    BLOCK_Q: tl.constexpr,  # queries of a tile of attention
    BLOCK_S: tl.constexpr,  # its keys at a time
    BLOCK_M: tl.constexpr,  # rows of a tile of a product
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of BLOCK_N columns in a row of H, up to a power of two
    TF32: tl.constexpr,  # whether float32 is multiplied so
):
    arrivals_ptr = state_ptr + _ARRIVALS_AT
    # Told nothing, the compiler keeps addresses of all phases in registers while one runs, and spills.
    for phase in tl.range(first_phase, end_phase, disable_licm=True):
        layer = phase // 5
        kind = phase % 5
        is_sum = layer > 0
        gather = layer == n_layers - 1
        n_rows = tl.where(layer >= n_layers - 1, n_queries, n_tokens)
        z_ptr = chosen(is_sum, sums_ptr, hidden_ptr)
        if layer == n_layers:
            norm_phase(
                sums_ptr, sums_statistics_ptr, full_norm_weight_ptr, full_norm_bias_ptr, out_ptr, n_rows, width, eps, BLOCK_M,
                BLOCK_N, BLOCKS,
            )  # fmt: skip
        elif kind == 0:
            product_phase(
                z_ptr, z_ptr, sums_statistics_ptr, full_norm_weight_ptr, full_norm_bias_ptr, query_ptr, query_bias_ptr,
                key_ptr, key_bias_ptr, value_ptr, value_bias_ptr, qkv_out_ptr, None, partials_ptr, arrivals_ptr, None,
                n_tokens, n_tokens, width, width, qkv_splits, qkv_steps, eps, is_sum, False, 3, False, NO_ACT, BLOCK_M,
                BLOCK_N, BLOCK_K, BLOCKS, TF32,
            )  # fmt: skip
        elif kind == 1:
            cu_queries_ptr = cu_seqlens_ptr
            if rows_ptr is not None:
                cu_queries_ptr = chosen(gather, cu_rows_ptr, cu_seqlens_ptr)
            attention_phase(
                qkv_out_ptr, context_ptr, cu_seqlens_ptr, cu_queries_ptr, rows_ptr, n_tokens, n_rows, n_sequences, width, num_heads,
                scale_log2, gather, HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_Q, BLOCK_S, TF32,
            )  # fmt: skip
        elif kind == 2:
            product_phase(
                context_ptr, z_ptr, sums_statistics_ptr, full_norm_weight_ptr, full_norm_bias_ptr, dense_ptr, dense_bias_ptr,
                None, None, None, None, attended_ptr, attended_statistics_ptr, partials_ptr, arrivals_ptr, rows_ptr, n_tokens,
                n_rows, width, width, dense_splits, dense_steps, eps, is_sum, gather, 1, True, NO_ACT, BLOCK_M, BLOCK_N,
                BLOCK_K, BLOCKS, TF32,
            )  # fmt: skip
        elif kind == 3:
            product_phase(
                attended_ptr, attended_ptr, attended_statistics_ptr, norm_weight_ptr, norm_bias_ptr, ffn_ptr, ffn_bias_ptr,
                None, None, None, None, middle_ptr, None, partials_ptr, arrivals_ptr, None, n_tokens, n_rows, middle_width,
                width, ffn_splits, ffn_steps, eps, True, False, 1, False, ACT, BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS, TF32,
            )  # fmt: skip
        else:
            product_phase(
                middle_ptr, attended_ptr, attended_statistics_ptr, norm_weight_ptr, norm_bias_ptr, ffn_output_ptr,
                ffn_output_bias_ptr, None, None, None, None, sums_ptr, sums_statistics_ptr, partials_ptr, arrivals_ptr, None,
                n_tokens, n_rows, width, middle_width, ffn_output_splits, ffn_output_steps, eps, True, False, 1, True, NO_ACT,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS, TF32,
            )  # fmt: skip
        if phase + 1 < end_phase:
            barrier(state_ptr, (phase + 1 - first_phase) * tl.num_programs(0))


# A layer's weights, in the order of the kernel's arguments.
WEIGHTS = tuple(
    name.removesuffix("_ptr")
    for name in itertools.takewhile(lambda name: name != "cu_seqlens_ptr", _encoder_fwd_kernel.arg_names[1:])
)

# (bytes an element or "tf32", whether tokens are few) -> (BLOCK_M, BLOCK_N, BLOCK_K, num_stages). Not compared on a GPU
# yet. On tensor cores as large as leaves work for about a hundred programs at 128 tokens, and 36 to 48 KiB of loads on
# their way.
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
        "TF32": tf32, "BLOCK_D": heads["BLOCK_D"], "CHUNK_D": heads["CHUNK_D"],
        "BLOCK_Q": heads["BLOCK_M"], "BLOCK_S": heads["BLOCK_N"],
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "maxnreg": 255, "num_warps": 8, "num_stages": num_stages,
    }  # fmt: skip


def _tile_count(tiles: Tiles, n_rows: int, n_cols: int) -> int:
    return triton.cdiv(n_rows, tiles["BLOCK_M"]) * triton.cdiv(n_cols, tiles["BLOCK_N"])


def split_depth(n_tiles: int, depth: int, block_k: int) -> tuple[int, int]:
    """(splits, steps): into how many parts the inner dimension of a product is split, and the steps of each."""
    steps = triton.cdiv(depth, block_k)
    wanted = max(1, min(PROGRAMS // n_tiles, steps // _MIN_STEPS))
    steps_of_each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, steps_of_each), steps_of_each


def _programs(device: torch.device) -> int:
    """As many as can wait for each other: one a multiprocessor; one in Triton's interpreter, which runs one at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _run(
    hidden: torch.Tensor, layer: Sequence[torch.Tensor], n_layers: int, cu_seqlens: torch.Tensor, rows: torch.Tensor | None,
    cu_rows: torch.Tensor | None, num_heads: int, softmax_scale: float, eps: float, act: str, step_programs: int,
) -> torch.Tensor:  # fmt: skip
    """`n_layers` times the layer of these weights."""
    (n_tokens, width), middle_width = hidden.shape, len(layer[WEIGHTS.index("ffn")])
    n_queries, head_dim = n_tokens if rows is None else len(rows), width // num_heads
    tiles = encoder_tiles(head_dim, hidden.dtype, n_tokens, multiplies_tf32(hidden.dtype))
    counts = [_tile_count(tiles, n_tokens, n) for n in (width, width, middle_width, width)]
    counts[0] *= 3  # each of query, key and value from a whole tile on
    depths = (width, width, width, middle_width)
    splits = [split_depth(n, depth, tiles["BLOCK_K"]) for n, depth in zip(counts, depths, strict=True)]
    blocks = triton.cdiv(width, tiles["BLOCK_N"])

    def empty(rows: int, *columns: int, dtype: torch.dtype = hidden.dtype) -> torch.Tensor:
        return torch.empty((rows, *columns), dtype=dtype, device=hidden.device)

    qkv, context, attended, middle, sums = (empty(n_tokens, n) for n in (3 * width, width, width, middle_width, width))
    attended_statistics, sums_statistics = (empty(n_tokens, 2, blocks, dtype=torch.float32) for _ in range(2))
    partials = empty(PROGRAMS, tiles["BLOCK_M"], tiles["BLOCK_N"], dtype=torch.float32)
    state = torch.zeros(_ARRIVALS_AT.value + PROGRAMS, dtype=torch.int32, device=hidden.device)
    out = empty(n_queries, width)

    def launch(programs: int, first_phase: int, end_phase: int) -> None:
        _encoder_fwd_kernel[(programs,)](
            hidden, *layer, cu_seqlens, rows, cu_rows, qkv, context, attended, attended_statistics, middle, sums,
            sums_statistics, partials, state, out, n_tokens, n_queries, len(cu_seqlens) - 1, width, middle_width,
            num_heads, n_layers, first_phase, end_phase, *itertools.chain(*splits), softmax_scale * LOG2_E, eps,
            ACT=ACT_CODES[act], HEAD_DIM=head_dim, BLOCKS=triton.next_power_of_2(blocks), **tiles,
            launch_cooperative_grid=not step_programs, **COMPILER_OPTIONS,
        )  # fmt: skip

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
    hidden: torch.Tensor, weights: Sequence[torch.Tensor], layer_indices: Sequence[int], cu_seqlens: torch.Tensor,
    wanted_rows: torch.Tensor | None, cu_wanted: torch.Tensor | None, num_heads: int, softmax_scale: float, eps: float, act: str,
    step_programs: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The embeddings after all layers (Lan et al. 2019, section 3.1): one launch for each run of equal numbers in `layer_indices`.

    Args:
        hidden: (T, H), packed tokens.
        weights: 16 of each distinct layer, in hidden's dtype: query, key and value (H, H), each with its bias behind it,
            dense (H, H), its bias, LayerNorm's weight and bias, ffn (I, H), its bias, ffn_output (H, I), its bias, the second
            LayerNorm's weight and bias.
        layer_indices: which distinct layer runs at each step.
        cu_seqlens: (B + 1,) int32, each sequence's first row, and the end.
        wanted_rows, cu_wanted: the tokens (Tq,) int64 that the last layer is asked for, and where each sequence's begin among them,
            (B + 1,) int32; None: all.
        num_heads: H / num_heads is the head size, 1 to 128. softmax_scale: factor on the scores.
        eps: of every LayerNorm. act: of ACT_CODES.
        step_programs: so many programs in a launch for every phase, with no barrier in it; 0: all phases in one launch.

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
    for i, (number, n_layers) in enumerate(runs):
        wanted = (wanted_rows, cu_wanted) if i == len(runs) - 1 else (None, None)
        layer = weights[len(WEIGHTS) * number : len(WEIGHTS) * (number + 1)]
        hidden = _run(hidden, layer, n_layers, cu_seqlens, *wanted, num_heads, softmax_scale, eps, act, step_programs)
    return hidden
