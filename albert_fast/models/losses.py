"""The losses of the fast heads: Hugging Face's, except that a mean over nothing is 0 and labels at padding are ignored.

They are computed in float32 or float64. B rows, S columns, N classes; labels of -100 are ignored by every cross-entropy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._dtypes import widened
from ..ops.linear_cross_entropy import IGNORED
from .encoder_config import EncoderConfig


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """logits (n, N), labels (n,) -> the mean of -log softmax over the labels that are not ignored, 0 without any.

    `label_smoothing` is the share of each label's probability that is spread over all classes.
    """
    labels = _with_shape(labels, logits.shape[:1]).long()
    total = F.cross_entropy(
        widened(logits), labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def binary_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (T,), labels (T,) of 0 and 1 -> the mean binary cross-entropy, 0 without a token."""
    predicted = widened(logits)
    labels = _with_shape(labels, logits.shape).to(predicted.dtype)
    total = F.binary_cross_entropy_with_logits(predicted, labels, reduction="sum")
    return total / max(labels.numel(), 1)


def row_loss(logits: Tensor, labels: Tensor, config: EncoderConfig) -> Tensor:
    """logits (B, N); labels by `config.problem_type`: (B,) classes, (B,) or (B, N) numbers, or (B, N) zeros and ones.

    Without a problem_type one label means regression, integer labels one class of N, others any of N.
    """
    problem = config.problem_type
    if problem is None and config.num_labels == 1:
        problem = "regression"
    elif problem is None:
        classes = labels.dtype in (torch.long, torch.int)
        problem = "single_label_classification" if classes else "multi_label_classification"
    if problem == "single_label_classification":
        return cross_entropy(logits, labels.flatten())
    if problem == "regression" and config.num_labels == 1:
        labels = labels.reshape(-1, 1)
    predicted = widened(logits)
    targets = _with_shape(labels, logits.shape).to(predicted.dtype)
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return loss(predicted, targets, reduction="sum") / max(targets.numel(), 1)


def position_loss(logits: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits (B, S) over columns; positions (B,) after the last column or at padding are ignored.

    A position below 0 counts as 0, as in Hugging Face.
    """
    rows, columns = mask.shape
    positions = _with_shape(positions.flatten(), (rows,)).long().clamp(0, columns)
    # One more column, which is never real, for positions after the last one.
    real = F.pad(mask, (0, 1)).gather(1, positions[:, None]).flatten()
    return cross_entropy(logits, positions.masked_fill(~real, IGNORED))


def _with_shape(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    if labels.shape != shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit the logits, expected {tuple(shape)}")
    return labels
