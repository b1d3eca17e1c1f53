"""The losses of the reference's heads, written plainly: Hugging Face's, but a label at padding is ignored.

B rows, S columns, N classes. A cross-entropy leaves out rows with the label -100, and is 0 if no row is left. Scores in 16 bits
are widened to float32 first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ALBERTConfig

NO_LABEL = -100  # torch's and Hugging Face's


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (n, N), labels (n,) -> the mean of -log softmax at the labels."""
    _check(labels, logits.shape[:1])
    labelled = labels != NO_LABEL
    logits, labels = _wide(logits)[labelled], labels[labelled].long()
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum()


def token_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits (B, S, N) at the real tokens of mask (B, S) with labels (B, S)."""
    _check(labels, mask.shape)
    return cross_entropy(logits[mask], labels[mask])


def position_loss(logits: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits (B, S) over columns, with a column for each row: positions (B,).

    A position below 0 counts as 0. Rows whose position is behind the last column or at padding are left out.
    """
    _check(positions.flatten(), mask.shape[:1])
    rows, columns = [], []
    for row, position in enumerate(positions.flatten().tolist()):
        column = max(int(position), 0)
        if column < mask.shape[1] and mask[row, column]:
            rows.append(row)
            columns.append(column)
    chosen = torch.tensor(rows, dtype=torch.long, device=logits.device)
    return cross_entropy(logits[chosen], torch.tensor(columns, dtype=torch.long, device=logits.device))


def row_loss(logits: Tensor, labels: Tensor, config: ALBERTConfig) -> Tensor:
    """The loss of logits (B, N) that `config.problem_type` names; without one the labels decide, as in Hugging Face.

    | problem_type | without one | labels | loss |
    |---|---|---|---|
    | single_label_classification | integers, N above 1 | (B,) | cross-entropy |
    | regression | N = 1 | (B, N), or (B,) | mean squared error |
    | multi_label_classification | other numbers, N above 1 | (B, N) zeros and ones | mean binary cross-entropy |
    """
    problem, one = config.problem_type, config.num_labels == 1
    if problem == "single_label_classification" or (
        problem is None and not one and labels.dtype in (torch.int, torch.long)
    ):
        return cross_entropy(logits, labels.flatten())
    regression = problem == "regression" or (problem is None and one)
    if regression and one:
        labels = labels.reshape(-1, 1)
    _check(labels, logits.shape)
    logits = _wide(logits)
    if not logits.numel():
        return logits.sum()
    loss = F.mse_loss if regression else F.binary_cross_entropy_with_logits
    return loss(logits, labels.to(logits.dtype))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check(labels: Tensor, shape: tuple[int, ...]) -> None:
    if labels.shape != shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit the logits, expected {tuple(shape)}")
