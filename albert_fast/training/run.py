"""The epochs of a run: training, evaluation, the log, the state to go on from, and the best model."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..models.pretrained import PretrainedMixin
from ..text.tokenizer import Tokenizer
from .checkpointing import STATE_NAME, load_state, random_state, save_state, set_random_state, write_log
from .data import LengthBucketSampler, TextDataset
from .interrupts import Interrupts
from .loop import Criterion, test, train
from .metrics import METRICS
from .optimization import WeightAverage, linear_schedule, make_optimizer, set_rates

LOWER_IS_BETTER = ("mse", "loss")
# Peak learning rates: small steps for weights that are good already, larger ones for random weights.
FINE_TUNING_RATE, FROM_SCRATCH_RATE = 5e-5, 5e-4


@dataclass(frozen=True)
class Recipe:
    """How to train; `fit` says on what. Steps count optimiser steps, lengths count tokens.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay, warmup_ratio, max_grad_norm: AdamW with linear warm-up over
            `warmup_ratio` of the steps and linear decay to zero. learning_rate is the highest rate; None: 5e-5 where
            `fit` starts from a checkpoint, 5e-4 for a new model.
        max_length: longer texts are cut.
        label_smoothing: of the cross-entropy over classes.
        piece_dropout, position_shift: of the training set, see `TextDataset`.
        ema_decay: evaluate and keep a running average of the weights with this decay; None: the weights themselves.
        pretrain_epochs, pretrain_batch_size, pretrain_learning_rate, mask_probability: masked language modelling first,
            on the training text without the lines that others contain.
        metric: what chooses the best epoch on the dev set: a metric of `test`, or "loss"; None: "accuracy" for classes,
            "mse" for numbers.
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
    piece_dropout: float = 0.0
    position_shift: int = 0
    ema_decay: float | None = None
    pretrain_epochs: int = 0
    pretrain_batch_size: int = 32
    pretrain_learning_rate: float = 5e-4
    mask_probability: float = 0.15
    metric: str | None = None
    seed: int = 0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS and self.metric != "loss":
            raise ValueError(f"unknown metric {self.metric!r}; known: loss, {', '.join(METRICS)}")
        if self.epochs < 1 or self.pretrain_epochs < 0:
            raise ValueError(f"needs at least one epoch, got {self.epochs} (pre-training: {self.pretrain_epochs})")
        # Each range is written so that NaN lies outside it.
        for names, fits, wanted in (
            (("batch_size", "pretrain_batch_size", "checkpoint_steps"), lambda x: x >= 1, "must be at least 1"),
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

    def completed(self, *, from_checkpoint: bool, numbers: bool) -> Recipe:
        """The recipe with the learning rate and the metric that None stands for."""
        rate = FINE_TUNING_RATE if from_checkpoint else FROM_SCRATCH_RATE
        return dataclasses.replace(
            self,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            metric=self.metric or ("mse" if numbers else "accuracy"),
        )


class Run:
    """One run in one folder.

    Args:
        recipe: without None for learning rate and metric.
        settings: what a resumed run must have in common with this one, for JSON.
        report: called with a line of news.
        tokenizer: saved before the first state, so that a run which fails earlier leaves nothing; None: it is there.

    Attributes:
        stage: "pretrain" or "classify", where a resumed run stands. saved: the state that it goes on from.
        history: the log's records so far. best_epoch, best_value: see `FitResult`.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, settings: dict[str, Any], device: torch.device, progress: bool,
        report: Callable[[str], None], tokenizer: Tokenizer | None,
    ) -> None:  # fmt: skip
        self.folder, self.recipe, self.settings, self.device = folder, recipe, settings, device
        self.progress, self.report, self.tokenizer = progress, report, tokenizer
        self.stage = "pretrain"
        self.saved: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0
        self.best_value: float | None = None

    def load(self) -> None:
        """Takes up the state in the folder, if there is one.

        The number of epochs may be another than before: the learning rate of each later step is then that of a run
        which was planned with the new number.

        Raises:
            ValueError: see `load_state`; fewer epochs than were begun already.
        """
        self.saved = load_state(self.folder, self.settings, self.device)
        if self.saved is None:
            self.report(f"{self.folder} holds no state to go on from: a new run")
            return
        self.stage = self.saved["stage"]
        self.history = json.loads(self.saved["history"])
        self.best_epoch, self.best_value = self.saved["best"]
        epoch, step, *_ = self.saved["position"]
        begun = epoch + (step > 0)
        if self.stage == "classify" and self.recipe.epochs < begun:
            raise ValueError(
                f"{self.folder / STATE_NAME}: {begun} epochs are done or begun, so that the run cannot end after "
                f"{self.recipe.epochs}; give epochs (--epochs) of {begun} or more"
            )
        self.report(f"going on with {self.stage} after {epoch} epochs and {step} steps")

    def epochs(
        self,
        stage: str,
        model: PretrainedMixin,
        data: TextDataset,
        criterion: Criterion | None,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        dev_loader: DataLoader[Any] | None = None,
        keep: bool = False,
    ) -> None:
        """All epochs of a stage, from where the saved state left it; `keep`: the best model goes to the folder.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the state was saved. FloatingPointError: the loss is not finite any more.
        """
        recipe, interrupts = self.recipe, Interrupts()
        model.to(self.device)
        sampler = LengthBucketSampler(data.lengths, batch_size, seed=recipe.seed)
        # Its own generator: DataLoader draws a number at the start of each pass, which a resumed pass draws once more.
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate, generator=torch.Generator())
        optimizer = make_optimizer(model, learning_rate, recipe.weight_decay)
        schedule = linear_schedule(optimizer, epochs * sampler.batches_per_epoch, recipe.warmup_ratio)
        average = WeightAverage(model, recipe.ema_decay) if recipe.ema_decay and keep else None
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        if average is not None:
            parts["average"] = average
        epoch, step, total, count = self._restore(stage, parts)
        self.stage = stage

        def after_step(loss: float, examples: int) -> None:
            nonlocal step, total, count
            if not math.isfinite(loss):
                raise FloatingPointError(f"{stage}: the loss is {loss} in epoch {epoch + 1}, step {step + 1}")
            step, total, count = step + 1, total + loss * examples, count + examples
            if average is not None:
                average.update(model)
            due = recipe.checkpoint_steps and step % recipe.checkpoint_steps == 0 and step < sampler.batches_per_epoch
            if due or interrupts.asked:
                self._save(stage, parts, (epoch, step, total, count))
            interrupts.check(f"in epoch {epoch + 1} of {epochs} ({stage}), after step {step}")

        while epoch < epochs:
            started = time.monotonic()
            if step < sampler.batches_per_epoch:
                sampler.set_epoch(epoch, step)
                with interrupts:
                    train(
                        model, loader, criterion, optimizer, self.device, scheduler=schedule,
                        max_grad_norm=recipe.max_grad_norm, after_step=after_step, progress=self.progress,
                    )  # fmt: skip
                # Before the dev set, where an error would lose the epoch, and before there is a model without a state.
                self._save(stage, parts, (epoch, step, total, count))
                interrupts.check(f"after epoch {epoch + 1} of {epochs} ({stage})")
            record: dict[str, Any] = {"stage": stage, "epoch": epoch + 1, "train_loss": total / count}
            with average.applied(model) if average is not None else nullcontext():
                if dev_loader is not None:
                    record |= self._evaluate(model, dev_loader)
                if keep and self._is_best(record):
                    self.best_epoch, self.best_value = epoch + 1, record.get(f"dev_{recipe.metric}")
                    model.save_pretrained(self.folder)
            record["seconds"] = round(time.monotonic() - started, 1)
            self.history.append(record)
            self.report(f"epoch {epoch + 1} of {epochs}: {_figures(record)}")
            epoch, step, total, count = epoch + 1, 0, 0.0, 0
            self._save(stage, parts, (epoch, step, total, count))
            write_log(self.folder, [self.settings, *self.history])

    def _evaluate(self, model: PretrainedMixin, loader: DataLoader[Any]) -> dict[str, float]:
        metrics = dev_metrics(self.recipe.metric)
        loss, values = test(model, loader, None, self.device, metrics=metrics, progress=self.progress)
        return {"dev_loss": loss} | {f"dev_{name}": value for name, value in values.items()}

    def _is_best(self, record: dict[str, Any]) -> bool:
        value: float | None = record.get(f"dev_{self.recipe.metric}")
        if value is None or self.best_value is None:
            return True
        return value < self.best_value if self.recipe.metric in LOWER_IS_BETTER else value > self.best_value

    def _save(self, stage: str, parts: dict[str, Any], position: tuple[int, int, float, int]) -> None:
        state = {name: part.state_dict() for name, part in parts.items()} | {
            "stage": stage, "position": position, "random": random_state(self.device), "device": self.device.type,
            "settings": json.dumps(self.settings), "history": json.dumps(self.history),
            "best": (self.best_epoch, self.best_value),
        }  # fmt: skip
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder)
            self.tokenizer = None
        save_state(self.folder, state)

    def _restore(self, stage: str, parts: dict[str, Any]) -> tuple[int, int, float, int]:
        """(epoch, steps done in it, sum of its losses, examples in the sum) to go on from; zeros at a stage's start."""
        if self.saved is None or self.saved["stage"] != stage:
            return 0, 0, 0.0, 0
        for name, part in parts.items():
            part.load_state_dict(self.saved[name])
        set_rates(parts["schedule"])
        set_random_state(self.saved["random"], self.device)
        epoch, step, total, count = self.saved["position"]
        return epoch, step, total, count


def dev_metrics(metric: str | None) -> list[str]:
    """What `test` computes besides the loss for a recipe's metric."""
    return [] if metric in (None, "loss") else [metric]


def _figures(record: dict[str, Any]) -> str:
    """A record of the log as words."""
    figures = [
        f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float) and name != "seconds"
    ]
    return f"{record['stage']}, {', '.join(figures)}, {record['seconds']} s"


__all__ = ["Recipe", "Run", "dev_metrics"]
