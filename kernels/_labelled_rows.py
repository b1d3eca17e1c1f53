"""Finds the rows of linear_cross_entropy that have a label, on the device and in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import COMPILER_OPTIONS

IGNORED = tl.constexpr(-100)
# Labels of a program, and labels that it counts at a time.
_LABEL_ROWS, _COUNT_ROWS = 1024, 4096


@triton.jit(do_not_specialize=["n_rows"])
def _linear_cross_entropy_labelled_kernel(
    labels_ptr,  # (N,) int64
    rows_ptr,  # (N,) int32, written: the labelled rows in order; what follows them is not written
    targets_ptr,  # (N,) int32, written: the labels of these rows, -1 for a label outside the vocabulary
    count_ptr,  # (1,) int32, written: how many rows are labelled
    n_rows,  # N
    n_words,  # V
    BLOCK_M: tl.constexpr,  # labels of a program
    COUNT_M: tl.constexpr,  # labels that it counts at a time
):
    # A program takes BLOCK_M labels and counts the labelled rows before its own, rather than wait for other programs' counts.
    first_own = tl.program_id(0) * BLOCK_M
    before = tl.zeros([COUNT_M], dtype=tl.int32)
    for first_row in range(0, first_own, COUNT_M):
        rows = first_row + tl.arange(0, COUNT_M)
        before += (tl.load(labels_ptr + rows, mask=rows < first_own, other=IGNORED) != IGNORED).to(tl.int32)
    count = tl.sum(before, axis=0)

    rows = first_own + tl.arange(0, BLOCK_M)
    labels = tl.load(labels_ptr + rows, mask=rows < n_rows, other=IGNORED)
    labelled = labels != IGNORED
    ones = labelled.to(tl.int32)
    slots = count + tl.cumsum(ones, axis=0) - 1
    targets = tl.where((labels >= 0) & (labels < n_words), labels, -1)
    tl.store(rows_ptr + slots, rows, mask=labelled)
    tl.store(targets_ptr + slots, targets.to(tl.int32), mask=labelled)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count_ptr, count + tl.sum(ones, axis=0))


def find_labelled(labels: torch.Tensor, n_words: int, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows, targets (slots,) int32, slots >= N, and count (1,) int32 of the labelled rows."""
    n_rows = len(labels)
    rows, targets = (torch.empty(slots, dtype=torch.int32, device=labels.device) for _ in range(2))
    count = torch.empty(1, dtype=torch.int32, device=labels.device)
    options = {"BLOCK_M": _LABEL_ROWS, "COUNT_M": _COUNT_ROWS, "num_warps": 8, **COMPILER_OPTIONS}
    grid = (triton.cdiv(n_rows, _LABEL_ROWS),)
    _linear_cross_entropy_labelled_kernel[grid](labels, rows, targets, count, n_rows, n_words, **options)
    return rows, targets, count
