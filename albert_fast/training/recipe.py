"""The settings of a training run, with their defaults and allowed ranges."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .metrics import ANSWER_METRICS, METRICS, TRANSLATION_METRICS

# The highest learning rate: small steps for trained weights, larger ones for random weights. That of trained weights is for the
# width of base models; Adam's rate for hidden matrices falls as 1 / width (Yang et al. 2022, arXiv 2203.03466).
FINE_TUNING_RATE, FROM_SCRATCH_RATE = 5e-5, 5e-4
BASE_WIDTH = 768


@dataclass(frozen=True)
class Recipe:
    """How to train; `fit` is told on what. Steps are optimizer steps, lengths are tokens.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay, warmup_ratio, max_grad_norm: AdamW with linear warm-up over
            `warmup_ratio` of the steps, then linear decay to zero. learning_rate is the highest rate; None: if
            `fit` starts from a checkpoint, 5e-5 for a hidden size of 768, and in inverse proportion for others, at most 5e-4;
            5e-4 for a new model.
        max_length: longer texts are cut.
        label_smoothing: of the cross-entropy over classes, tags or choices.
        class_weights: "balanced": classes and tags weigh as much as others in sum, however rare they are; None: each example
            weighs the same.
        piece_dropout, position_shift: of the training set, see `TextDataset`.
        ema_decay: evaluate and keep a running average of the weights with this decay; None: the weights themselves.
        pretrain_epochs, pretrain_batch_size, pretrain_learning_rate, mask_probability: masked language modelling first,
            on the training lines that no longer line contains.
        metric: chooses the best epoch on the dev set: a metric of the task, or "loss"; None: "accuracy" for classes and choices,
            "mse" for numbers, "f1" for several labels, entities and answers, "bleu" for translations.
        patience: end after so many epochs that were not better than the best; None: run all epochs.
        seed: of the vocabulary's sampling, the weights, the order and every random choice; 0 to 2**32 - 1.
        checkpoint_steps: also save the state every so many steps within an epoch.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    max_length: int = 128
    label_smoothing: float = 0.0
    class_weights: str | None = None
    piece_dropout: float = 0.0
    position_shift: int = 0
    ema_decay: float | None = None
    pretrain_epochs: int = 0
    pretrain_batch_size: int = 32
    pretrain_learning_rate: float = 5e-4
    mask_probability: float = 0.15
    metric: str | None = None
    patience: int | None = None
    seed: int = 0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        known = [*dict.fromkeys(("loss", *METRICS, *ANSWER_METRICS, *TRANSLATION_METRICS))]
        if self.metric is not None and self.metric not in known:
            raise ValueError(f"unknown metric {self.metric!r}; known: {', '.join(known)}")
        if self.class_weights not in (None, "balanced"):
            raise ValueError(f"class_weights is {self.class_weights!r}; known: 'balanced', None")
        if self.epochs < 1 or self.pretrain_epochs < 0:
            raise ValueError(f"needs at least one epoch, got {self.epochs} (pre-training: {self.pretrain_epochs})")
        # Each condition is false for NaN.
        for names, fits, wanted in (
            (
                ("batch_size", "pretrain_batch_size", "checkpoint_steps", "patience"),
                lambda x: x >= 1,
                "must be at least 1",
            ),
            (("max_length",), lambda x: x >= 3, "must be at least 3: a token between [CLS] and [SEP]"),
            (
                ("learning_rate", "pretrain_learning_rate", "max_grad_norm"),
                lambda x: 0 < x < math.inf,
                "must be above 0",
            ),
            (("weight_decay",), lambda x: 0 <= x < math.inf, "must not be negative"),
            (("warmup_ratio", "label_smoothing", "piece_dropout"), lambda x: 0 <= x < 1, "must lie in [0, 1)"),
            (("ema_decay", "mask_probability"), lambda x: 0 < x < 1, "must lie in (0, 1)"),
            (("position_shift",), lambda x: x >= 0, "must not be negative"),
            (("seed",), lambda x: 0 <= x < 2**32, "must lie in [0, 2**32)"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"{name} {wanted}, got {value}")

    def completed(self, *, trained_width: int | None, metric: str) -> Recipe:
        """This recipe with the default learning rate, and the task's default `metric`, in place of None.

        Args:
            trained_width: the hidden size of the checkpoint to start from; None: a new model.
        """
        rate = FROM_SCRATCH_RATE
        if trained_width is not None:
            rate = min(rate, FINE_TUNING_RATE * BASE_WIDTH / trained_width)
        return dataclasses.replace(
            self,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            metric=self.metric or metric,
        )


__all__ = ["Recipe"]
