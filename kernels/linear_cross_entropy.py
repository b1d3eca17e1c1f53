"""linear_cross_entropy: the mean of cross_entropy(x W^T + bias, labels) over labelled rows; logits stay in registers.

N is the number of labelled rows, E of columns, V of words. The forward takes 2 N V E operations: a program owns some rows and
walks over a share of the vocabulary, a block of words at a time, with the running maximum and sum of each row (Milakov &
Gimelshein 2018); a second pass merges the shares, a third takes the mean. The backward takes 8 N V E operations, of which 4
compute the logits again, from the saved maximum and sum: programs that own rows walk over the vocabulary for dx, programs that
own words walk over the gathered rows for dW and dbias, so no sum needs an atomic. If E is above 128, the gradients are computed
in chunks of 128 columns, and each chunk computes all logits again.

With the logits in memory, training takes 6 N V E operations and at least six passes over N V numbers. Here the passes
are over W, 2 V E bytes (bfloat16) for every block of rows, and W stays in the L2 cache. Every logit costs a walk one
exponential: at E = 128 that is as much work for the special-function units (16 a clock) as its 256 operations are for
Hopper's tensor cores (4096 a clock).

With label smoothing the forward sums logit - maximum of each row beside exp(logit - maximum); the gradient of every logit
loses a constant.

The labelled rows are found on the device, in order, so that no launch waits for their number. A grid has programs for N
rows; those behind the last labelled row return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import COMPILER_OPTIONS, product, round_to, rows_contiguous
from ._labelled_rows import find_labelled
from ._precision import multiplies_tf32
from ._vocabulary import (
    UNIT,
    GradientInputs,
    LossInputs,
    OwnedRows,
    VocabularyTile,
    finite_max,
    linear_cross_entropy_tiles,
    load_whole,
    logit_gradients,
    multiply,
    out_columns,
    power,
    vocabulary_shares,
)

_LN_2 = tl.constexpr(0.6931471805599453)
# Rows per program of the kernels that do not multiply.
_MERGE_ROWS, _MEAN_ROWS, _GATHER_ROWS = 128, 1024, 16


@triton.jit(do_not_specialize=["n_rows", "n_row_blocks"])
def _linear_cross_entropy_fwd_kernel(
    inputs,  # LossInputs
    max_ptr,  # (shares, N) float32, written: the largest logit of each labelled row in each share
    sum_ptr,  # (shares, N) float32, written: the sum of exp(logit - largest)
    below_ptr,  # (shares, N) float32, written: the sum of logit - largest; None without label smoothing
    target_ptr,  # (N,) float32, written: the logit of each labelled row's label
    stride_x_row,
    n_rows,  # N
    n_words,  # V
    n_row_blocks,
    share_words,  # words of a share
    WIDTH: tl.constexpr,  # this and the next four: as in VocabularyTile; here rows are owned and words are walked over
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,  # not used: the forward computes no columns of a gradient
    TF32: tl.constexpr,  # whether float32 is multiplied as TF32
):
    # A program takes BLOCK_M labelled rows and a share of the vocabulary; programs of a share are neighbours, for the L2 cache.
    TILE: tl.constexpr = VocabularyTile(WIDTH, BLOCK_M, BLOCK_N, BLOCK_E, CHUNK_E, TF32)
    share = tl.program_id(0) // n_row_blocks
    slots = tl.program_id(0) % n_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(inputs.count_ptr)
    if tl.program_id(0) % n_row_blocks * BLOCK_M >= count:
        return
    live = slots < count
    x_ptrs = inputs.x_ptr + tl.load(inputs.rows_ptr + slots, mask=live, other=0).to(tl.int64) * stride_x_row
    targets = tl.load(inputs.targets_ptr + slots, mask=live, other=-1)
    owned = OwnedRows(load_whole(x_ptrs, live, TILE), x_ptrs, live)

    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_below = tl.zeros([BLOCK_M], dtype=tl.float32)
    target_logits = tl.zeros([BLOCK_M], dtype=tl.float32)
    first_word = share * share_words
    last_word = tl.minimum(first_word + share_words, n_words)
    for word in range(first_word, last_word, BLOCK_N):
        words = word + tl.arange(0, BLOCK_N)
        known = words < n_words
        # A bias of -inf gives words behind the last one a probability of zero.
        bias = tl.load(inputs.bias_ptr + words, mask=known, other=float("-inf")).to(tl.float32)
        weight_ptrs = inputs.weight_ptr + words.to(tl.int64) * WIDTH
        logits, _ = multiply(owned, weight_ptrs, known, TILE)
        logits += bias[None, :]
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * power(row_max, new_max) + tl.sum(power(logits, new_max[:, None]), axis=1)
        if below_ptr is not None:
            shift = finite_max(new_max)
            row_below += (finite_max(row_max) - shift) * (word - first_word)
            row_below += tl.sum(tl.where(known[None, :], logits - shift[:, None], 0.0), axis=1)
        row_max = new_max
        target_logits += tl.sum(tl.where(words[None, :] == targets[:, None], logits, 0.0), axis=1)

    tl.store(max_ptr + share * n_rows + slots, row_max, mask=live)
    tl.store(sum_ptr + share * n_rows + slots, row_sum, mask=live)
    if below_ptr is not None:
        tl.store(below_ptr + share * n_rows + slots, row_below, mask=live)
    tl.store(target_ptr + slots, target_logits, mask=live & (targets >= first_word) & (targets < last_word))


@triton.jit(do_not_specialize=["n_rows", "n_shares", "n_words", "share_words"])
def _linear_cross_entropy_fwd_merge_kernel(
    max_ptr,  # (shares, N) float32, as the first pass wrote them
    sum_ptr,  # (shares, N) float32
    below_ptr,  # (shares, N) float32, or None without label smoothing
    target_ptr,  # (N,) float32
    rows_ptr,  # (N,) int32, the labelled rows
    targets_ptr,  # (N,) int32, their labels
    count_ptr,  # (1,) int32
    loss_ptr,  # (N,) float32, written: the loss of each labelled row
    row_max_ptr,  # (N,) float32, written: each row's largest logit; rows without a label are left unchanged
    row_sum_ptr,  # (N,) float32, written: the sum of exp(logit - largest); rows without a label are left unchanged
    n_rows,  # N
    n_shares,
    n_words,  # V
    share_words,  # words of a share
    label_smoothing,
    BLOCK_M: tl.constexpr,
):
    # A program takes BLOCK_M labelled rows and merges their shares.
    slots = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = slots < tl.load(count_ptr)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_below = tl.zeros([BLOCK_M], dtype=tl.float32)
    for share in range(n_shares):
        share_max = tl.load(max_ptr + share * n_rows + slots, mask=live, other=0.0)
        share_sum = tl.load(sum_ptr + share * n_rows + slots, mask=live, other=1.0)
        new_max = tl.maximum(row_max, share_max)
        row_sum = row_sum * power(row_max, new_max) + share_sum * power(share_max, new_max)
        if below_ptr is not None:
            share_below = tl.load(below_ptr + share * n_rows + slots, mask=live, other=0.0)
            shift, before = finite_max(new_max), share * share_words
            own_words = tl.minimum(n_words - before, share_words)
            row_below += (finite_max(row_max) - shift) * before
            row_below += share_below + (finite_max(share_max) - shift) * own_words
        row_max = new_max
    # A label outside the vocabulary has no logit: NaN reaches the loss and, by the maximum, every gradient.
    inside = tl.load(targets_ptr + slots, mask=live, other=-1) >= 0
    target_logits = tl.load(target_ptr + slots, mask=live & inside, other=float("nan"))
    # The large numbers are subtracted first, so that a loss near zero is not lost in the rounding of a log-sum-exp.
    loss = row_max - target_logits
    if below_ptr is not None:
        loss = loss * (1.0 - label_smoothing) - row_below / n_words * label_smoothing
    loss += tl.log2(row_sum) * _LN_2
    tl.store(loss_ptr + slots, loss, mask=live)
    rows = tl.load(rows_ptr + slots, mask=live, other=0)
    tl.store(row_max_ptr + rows, tl.where(inside, row_max, float("nan")), mask=live)
    tl.store(row_sum_ptr + rows, row_sum, mask=live)


@triton.jit
def _linear_cross_entropy_fwd_mean_kernel(
    losses_ptr,  # (N,) float32, of the labelled rows
    count_ptr,  # (1,) int32
    loss_ptr,  # () float32, written
    BLOCK_M: tl.constexpr,
):
    # One program takes all rows, so that the order of the sum is fixed.
    count = tl.load(count_ptr)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first_slot in range(0, count, BLOCK_M):
        slots = first_slot + tl.arange(0, BLOCK_M)
        total += tl.load(losses_ptr + slots, mask=slots < count, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0) / tl.maximum(count, 1))


@triton.jit
def _linear_cross_entropy_bwd_gather_kernel(
    x_ptr,  # (N, WIDTH), rows `stride_x_row` elements apart
    row_max_ptr,  # (N,) float32
    row_sum_ptr,  # (N,) float32
    rows_ptr,  # (N,) int32, the labelled rows
    targets_ptr,  # (slots,) int32, their labels; -1 is written behind the last one
    count_ptr,  # (1,) int32
    x_out_ptr,  # (slots, WIDTH), contiguous, written: the labelled rows, then zeros
    max_out_ptr,  # (slots,) float32, written: their largest logits, then infinity, which makes all probabilities there zero
    factor_out_ptr,  # (slots,) float32, written: 2^15 / their sums of exponentials, then 0
    stride_x_row,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # A program copies BLOCK_M labelled rows, so that the walks over rows read whole blocks of neighbours without a mask.
    slots, cols = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    live = slots < tl.load(count_ptr)
    rows = tl.load(rows_ptr + slots, mask=live, other=0)
    row_max = tl.load(row_max_ptr + rows, mask=live, other=float("inf"))
    row_sum = tl.load(row_sum_ptr + rows, mask=live, other=float("inf"))
    inside = (cols < WIDTH)[None, :]
    x_rows = x_ptr + rows.to(tl.int64) * stride_x_row
    x = tl.load(x_rows[:, None] + cols[None, :], mask=live[:, None] & inside, other=0.0)
    x_out_rows = x_out_ptr + slots.to(tl.int64) * WIDTH
    tl.store(x_out_rows[:, None] + cols[None, :], x, mask=tl.broadcast_to(inside, x.shape))
    tl.store(max_out_ptr + slots, row_max)
    tl.store(factor_out_ptr + slots, 1.0 / row_sum * UNIT)
    tl.store(targets_ptr + slots, tl.full([BLOCK_M], -1, dtype=tl.int32), mask=slots >= tl.load(count_ptr))


@triton.jit(do_not_specialize=["n_rows", "n_row_blocks"])
def _linear_cross_entropy_bwd_x_kernel(
    inputs,  # GradientInputs
    shares_ptr,  # (shares, N, WIDTH) float32, written: each share's part of dx of each labelled row, times 2^15 N / grad
    n_rows,  # N
    n_words,  # V
    n_row_blocks,
    share_words,  # words of a share
    on_label,  # 2^15 (1 - label_smoothing), what the label's logit loses
    uniform,  # 2^15 label_smoothing / V, what every logit loses
    WIDTH: tl.constexpr,  # this and the next four: as in VocabularyTile; here rows are owned and words are walked over
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,  # columns of dx that a program computes
    TF32: tl.constexpr,  # whether float32 is multiplied as TF32
):
    # A program takes BLOCK_M labelled rows, one share of the vocabulary and BLOCK_O columns of dx.
    TILE: tl.constexpr = VocabularyTile(WIDTH, BLOCK_M, BLOCK_N, BLOCK_E, CHUNK_E, TF32)
    share = tl.program_id(0) // n_row_blocks
    slots = tl.program_id(0) % n_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(inputs.count_ptr)
    if tl.program_id(0) % n_row_blocks * BLOCK_M >= count:
        return
    x_ptrs = inputs.x_ptr + slots.to(tl.int64) * WIDTH
    targets = tl.load(inputs.targets_ptr + slots)
    row_max, factor = tl.load(inputs.row_max_ptr + slots), tl.load(inputs.factor_ptr + slots)
    owned = OwnedRows(load_whole(x_ptrs, None, TILE), x_ptrs, None)
    lost = tl.where(targets < 0, 0.0, uniform)  # rows behind the last one have no gradient
    cols = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)

    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    first_word = share * share_words
    last_word = tl.minimum(first_word + share_words, n_words)
    for word in range(first_word, last_word, BLOCK_N):
        words = word + tl.arange(0, BLOCK_N)
        known = words < n_words
        bias = tl.load(inputs.bias_ptr + words, mask=known, other=float("-inf")).to(tl.float32)
        weight_ptrs = inputs.weight_ptr + words.to(tl.int64) * WIDTH
        logits, weight = multiply(owned, weight_ptrs, known, TILE)
        is_label = words[None, :] == targets[:, None]
        gradients = logit_gradients(
            logits + bias[None, :], row_max[:, None], factor[:, None], lost[:, None], is_label, on_label
        )
        weight = out_columns(weight, weight_ptrs, known, cols, TILE)
        acc = product(round_to(gradients, weight.dtype), weight, acc, TF32)

    share_rows = shares_ptr + (share * n_rows + slots).to(tl.int64) * WIDTH
    tl.store(share_rows[:, None] + cols[None, :], acc, mask=(slots < count)[:, None] & (cols < WIDTH)[None, :])


@triton.jit(do_not_specialize=["n_rows", "n_shares"])
def _linear_cross_entropy_bwd_sum_kernel(
    shares_ptr,  # (shares, N, WIDTH) float32, of the labelled rows
    grad_ptr,  # () float32, gradient of the loss
    rows_ptr,  # (N,) int32, the labelled rows
    count_ptr,  # (1,) int32
    dx_ptr,  # (N, WIDTH), contiguous, written; rows without a label are left unchanged
    n_rows,  # N
    n_shares,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # A program takes BLOCK_M labelled rows and adds their shares of dx.
    count = tl.load(count_ptr)
    slots = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    live, cols = slots < count, tl.arange(0, BLOCK_E)
    mask = live[:, None] & (cols < WIDTH)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for share in range(n_shares):
        share_rows = shares_ptr + (share * n_rows + slots).to(tl.int64) * WIDTH
        acc += tl.load(share_rows[:, None] + cols[None, :], mask=mask, other=0.0)
    dx = acc * (tl.load(grad_ptr) / count / UNIT)
    dx_rows = dx_ptr + tl.load(rows_ptr + slots, mask=live, other=0).to(tl.int64) * WIDTH
    tl.store(dx_rows[:, None] + cols[None, :], round_to(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_cross_entropy_bwd_weight_kernel(
    inputs,  # GradientInputs
    grad_ptr,  # () float32, gradient of the loss
    dweight_ptr,  # (V, WIDTH), contiguous, written
    dbias_ptr,  # (V,), written
    n_words,  # V
    on_label,  # this and the next: as in the kernel of dx
    uniform,
    WIDTH: tl.constexpr,  # this and the next four: as in VocabularyTile; here words are owned and rows are walked over
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,  # columns of dweight that a program computes
    TF32: tl.constexpr,  # whether float32 is multiplied as TF32
):
    # A program takes BLOCK_M words and BLOCK_O columns of dweight.
    TILE: tl.constexpr = VocabularyTile(WIDTH, BLOCK_M, BLOCK_N, BLOCK_E, CHUNK_E, TF32)
    words = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = words < n_words
    # A bias of -inf gives words behind the last one a probability of zero.
    bias = tl.load(inputs.bias_ptr + words, mask=known, other=float("-inf")).to(tl.float32)
    weight_ptrs = inputs.weight_ptr + words.to(tl.int64) * WIDTH
    owned = OwnedRows(load_whole(weight_ptrs, known, TILE), weight_ptrs, known)
    cols = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    count = tl.load(inputs.count_ptr)

    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first_slot in range(0, count, BLOCK_N):
        slots = first_slot + tl.arange(0, BLOCK_N)
        x_ptrs = inputs.x_ptr + slots.to(tl.int64) * WIDTH
        targets = tl.load(inputs.targets_ptr + slots)
        row_max, factor = tl.load(inputs.row_max_ptr + slots), tl.load(inputs.factor_ptr + slots)
        logits, x = multiply(owned, x_ptrs, None, TILE)
        lost, is_label = tl.where(targets < 0, 0.0, uniform), words[:, None] == targets[None, :]
        gradients = logit_gradients(
            logits + bias[:, None], row_max[None, :], factor[None, :], lost[None, :], is_label, on_label
        )
        dbias += tl.sum(gradients, axis=1)
        x = out_columns(x, x_ptrs, None, cols, TILE)
        acc = product(round_to(gradients, x.dtype), x, acc, TF32)

    scale = tl.load(grad_ptr) / tl.maximum(count, 1) / UNIT
    dweight_rows = dweight_ptr + words.to(tl.int64) * WIDTH
    dweight = round_to(acc * scale, dweight_ptr.dtype.element_ty)
    tl.store(dweight_rows[:, None] + cols[None, :], dweight, mask=known[:, None] & (cols < WIDTH)[None, :])
    if tl.program_id(1) == 0:
        tl.store(dbias_ptr + words, round_to(dbias * scale, dbias_ptr.dtype.element_ty), mask=known)


def linear_cross_entropy_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean over labelled rows of -log softmax(x @ weight^T + bias)[label].

    Args:
        x: (N, E), E up to 1024; rows may be strided.
        weight: (V, E); bias: (V,); in x's dtype.
        labels: (N,) int64; -100 is ignored, any other number outside [0, V) makes the loss and all gradients NaN.
        label_smoothing: in [0, 1], the weight of each label that all words share.

    Returns:
        loss () float32, 0 without a label; row_max and row_sum (N,) float32, each row's largest logit and its sum of
        exp(logit - row_max), 0 where the label is ignored. Two numbers are returned instead of their log-sum-exp, whose
        rounding would scale a whole row of probabilities.

    Raises:
        ValueError: E above 1024.
    """
    x, weight, labels, bias = rows_contiguous(x), weight.contiguous(), labels.contiguous(), bias.contiguous()
    (n_rows, width), n_words = x.shape, len(weight)
    tiles = linear_cross_entropy_tiles(width, x.dtype, multiplies_tf32(x.dtype), label_smoothing > 0.0)
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    row_max, row_sum = (torch.zeros(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if n_rows == 0:
        return loss, row_max, row_sum
    row_blocks, shares, share_words = vocabulary_shares(n_rows, n_words, tiles)
    largest, sums = (torch.empty((shares, n_rows), dtype=torch.float32, device=x.device) for _ in range(2))
    below = torch.empty_like(sums) if label_smoothing else None
    logits, losses = (torch.empty(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        rows, targets, count = find_labelled(labels, n_words, n_rows)
        inputs = LossInputs(x, weight, bias, rows, targets, count)
        sizes = (x.stride(0), n_rows, n_words, row_blocks, share_words)
        _linear_cross_entropy_fwd_kernel[(row_blocks * shares,)](
            inputs, largest, sums, below, logits, *sizes, WIDTH=width, **tiles, **COMPILER_OPTIONS
        )
        labelled, shared = (rows, targets, count), (n_rows, shares, n_words, share_words, label_smoothing)
        merge_options = {"BLOCK_M": _MERGE_ROWS, "num_warps": 4, **COMPILER_OPTIONS}
        _linear_cross_entropy_fwd_merge_kernel[(triton.cdiv(n_rows, _MERGE_ROWS),)](
            largest, sums, below, logits, *labelled, losses, row_max, row_sum, *shared, **merge_options
        )
        mean_options = {"BLOCK_M": _MEAN_ROWS, "num_warps": 8, **COMPILER_OPTIONS}
        _linear_cross_entropy_fwd_mean_kernel[(1,)](losses, count, loss, **mean_options)
    return loss, row_max, row_sum


def linear_cross_entropy_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (N, E), weight (V, E) and bias (V,), in their dtypes.

    Args:
        grad: () float32, the gradient of the loss.
        x, weight, bias, labels, label_smoothing: as given to the forward.
        row_max, row_sum: (N,) float32, as the forward returned them.

    Raises:
        ValueError: E above 1024.
    """
    x, weight, bias, labels = rows_contiguous(x), weight.contiguous(), bias.contiguous(), labels.contiguous()
    (n_rows, width), n_words = x.shape, len(weight)
    tiles = linear_cross_entropy_tiles(width, x.dtype, multiplies_tf32(x.dtype))
    dx = torch.zeros((n_rows, width), dtype=x.dtype, device=x.device)
    if n_rows == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    row_blocks, shares, share_words = vocabulary_shares(n_rows, n_words, tiles)
    dx_shares = torch.empty((shares, n_rows, width), dtype=torch.float32, device=x.device)
    out_chunks = triton.cdiv(width, tiles["BLOCK_O"])
    slots = row_blocks * tiles["BLOCK_M"]  # a multiple of BLOCK_N, too
    gathered = torch.empty((slots, width), dtype=x.dtype, device=x.device)
    largest, factors = (torch.empty(slots, dtype=torch.float32, device=x.device) for _ in range(2))
    uniform = torch.tensor(UNIT.value * label_smoothing / n_words, dtype=torch.float32).item()
    lost = (
        UNIT.value - uniform * n_words,
        uniform,
    )  # what a row loses adds up to UNIT, also once it is rounded to float32
    row_tile = {"WIDTH": width, "BLOCK_M": _GATHER_ROWS, "BLOCK_E": tiles["BLOCK_E"]}
    with torch.cuda.device_of(x):
        rows, targets, count = find_labelled(labels, n_words, slots)
        outputs = (gathered, largest, factors, x.stride(0))
        _linear_cross_entropy_bwd_gather_kernel[(triton.cdiv(slots, _GATHER_ROWS),)](
            x, row_max, row_sum, rows, targets, count, *outputs, **row_tile, num_warps=4, **COMPILER_OPTIONS
        )
        inputs = GradientInputs(gathered, weight, bias, targets, count, largest, factors)
        sizes = (n_rows, n_words, row_blocks, share_words, *lost)
        _linear_cross_entropy_bwd_x_kernel[(row_blocks * shares, out_chunks)](
            inputs, dx_shares, *sizes, WIDTH=width, **tiles, **COMPILER_OPTIONS
        )
        _linear_cross_entropy_bwd_sum_kernel[(triton.cdiv(n_rows, _GATHER_ROWS),)](
            dx_shares, grad, rows, count, dx, n_rows, shares, **row_tile, num_warps=4, **COMPILER_OPTIONS
        )
        _linear_cross_entropy_bwd_weight_kernel[(triton.cdiv(n_words, tiles["BLOCK_M"]), out_chunks)](
            inputs, grad, dweight, dbias, n_words, *lost, WIDTH=width, **tiles, **COMPILER_OPTIONS
        )
    return dx, dweight, dbias
