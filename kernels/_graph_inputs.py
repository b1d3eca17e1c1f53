"""graph_inputs: copies a call's ids, types, positions and lengths to where the CUDA graph of its bucket reads them.

One launch does the work of a dozen: it leaves padding out, makes the positions and types that were not given, and fills the
rest of the bucket with token 0, which belongs to no sequence. A program copies one sequence. It reads 24 bytes and writes 24
for each token, and reads one element of the mask for each place: a few hundred KB at most, so its time is that of a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
# Sizes change with every call: Triton must not compile the kernel again for them.
_SIZES = [
    *("columns", "bound_tokens", "bound_sequences", "ids_row", "ids_col", "types_row", "types_col"),
    *("positions_row", "positions_col", "mask_row", "mask_col"),
]

# (tensor, stride of a sequence, stride of a token) of a padded batch. In packed input a sequence begins one stride further for
# every token before it, so both strides are the same. Strides of 0 repeat one element.
Strided = tuple[torch.Tensor, int, int]


@triton.jit(do_not_specialize=_SIZES)
def _graph_inputs_kernel(
    ids_ptr,  # integers, element (row, column) at row * `ids_row` + column * `ids_col`
    types_ptr,  # integers, with strides of their own
    positions_ptr,  # integers, with strides of their own
    mask_ptr,  # 0 where padded, with strides of its own; None: nothing is padded
    lengths_ptr,  # (B,) int64, the number of real tokens in each row of the mask; None without a mask
    ends_ptr,  # (B + 1,) int32, where packed sequences begin, and T; None: padded input
    indices_ptr,  # (T,) int64, written: positions of the real tokens in the flattened batch; None without a mask
    cu_seqlens_ptr,  # (B + 1,) int32, written; None: packed input
    static_ptr,  # (3, capacity) int64, written up to bound_tokens: ids, types, positions
    static_cu_seqlens_ptr,  # (capacity + 1,) int32, written up to bound_sequences
    columns,  # S, or a bound on the length of packed sequences
    bound_tokens,
    bound_sequences,
    ids_row,
    ids_col,
    types_row,
    types_col,
    positions_row,
    positions_col,
    mask_row,
    mask_col,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n_rows = tl.program_id(0), tl.num_programs(0)
    block = tl.arange(0, BLOCK)
    # The row's length, its next packed token, and its row of the input. Packed positions fit 32 bits; those of a view may not.
    length, end, first_row = columns, row * columns, row.to(tl.int64)
    if ends_ptr is not None:
        end = tl.load(ends_ptr + row)
        length = tl.load(ends_ptr + row + 1) - end
        first_row = end.to(tl.int64)
    if mask_ptr is not None:
        end = tl.zeros([], dtype=tl.int32)
        for first in range(0, row, BLOCK):
            before = first + block
            end += tl.sum(tl.load(lengths_ptr + before, mask=before < row, other=0).to(tl.int32), axis=0)

    for first in range(0, columns, BLOCK):
        column = (first + block).to(tl.int64)
        real = column < length
        packed = end + block
        if mask_ptr is not None:
            real = real & (tl.load(mask_ptr + first_row * mask_row + column * mask_col, mask=real, other=0) != 0)
            packed = end + tl.cumsum(real.to(tl.int32), axis=0) - 1
            tl.store(indices_ptr + packed, first_row * columns + column, mask=real)
        word = tl.load(ids_ptr + first_row * ids_row + column * ids_col, mask=real, other=0)
        kind = tl.load(types_ptr + first_row * types_row + column * types_col, mask=real, other=0)
        position = tl.load(positions_ptr + first_row * positions_row + column * positions_col, mask=real, other=0)
        tl.store(static_ptr + packed, word.to(tl.int64), mask=real)
        tl.store(static_ptr + CAPACITY + packed, kind.to(tl.int64), mask=real)
        tl.store(static_ptr + 2 * CAPACITY + packed, position.to(tl.int64), mask=real)
        end += tl.sum(real.to(tl.int32), axis=0)

    tl.store(static_cu_seqlens_ptr + row + 1, end)
    if cu_seqlens_ptr is not None:
        tl.store(cu_seqlens_ptr + row + 1, end)
    if row == 0:
        tl.store(static_cu_seqlens_ptr, 0)
        if cu_seqlens_ptr is not None:
            tl.store(cu_seqlens_ptr, 0)
    if row == n_rows - 1:
        nothing = tl.zeros([BLOCK], dtype=tl.int64)
        for first in range(end, bound_tokens, BLOCK):
            left = first + block < bound_tokens
            tl.store(static_ptr + first + block, nothing, mask=left)
            tl.store(static_ptr + CAPACITY + first + block, nothing, mask=left)
            tl.store(static_ptr + 2 * CAPACITY + first + block, nothing, mask=left)
        for first in range(n_rows + 1, bound_sequences + 1, BLOCK):
            tl.store(
                static_cu_seqlens_ptr + first + block, nothing.to(tl.int32) + end, mask=first + block <= bound_sequences
            )


def graph_inputs(
    ids: Strided,
    types: Strided,
    positions: Strided,
    mask: Strided | None,
    lengths: torch.Tensor | None,
    ends: torch.Tensor | None,
    indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    static: torch.Tensor,
    static_cu_seqlens: torch.Tensor,
    shape: tuple[int, int],
    bounds: tuple[int, int],
) -> None:
    """Write `static` (3, capacity) int64 and `static_cu_seqlens` (capacity + 1,) int32 for a call.

    Args:
        ids, types, positions: integers, each with its strides.
        mask, lengths: 0 where padded, and the number of real tokens (B,) int64 of each row; None: every token is real.
        ends: (B + 1,) int32 of packed input; None: a padded batch.
        indices: (T,) int64, written: positions of the real tokens in the flattened batch; only with a mask.
        cu_seqlens: (B + 1,) int32, written; None if `ends` says the same.
        shape: (B, S); in packed input S is an upper bound on a sequence's length.
        bounds: (tokens, sequences) of the bucket.
    """
    mask_tensor, *mask_strides = (None, 0, 0) if mask is None else mask
    tensors = (
        ids[0],
        types[0],
        positions[0],
        mask_tensor,
        lengths,
        ends,
        indices,
        cu_seqlens,
        static,
        static_cu_seqlens,
    )
    sizes = (shape[1], *bounds, *ids[1:], *types[1:], *positions[1:], *mask_strides)
    with torch.cuda.device_of(static):
        _graph_inputs_kernel[(shape[0],)](*tensors, *sizes, CAPACITY=static.shape[1], BLOCK=_BLOCK, num_warps=4)
