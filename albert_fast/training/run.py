"""Runs the epochs of a training run: trains, evaluates, writes the log and the state, and keeps the best model."""

from __future__ import annotations

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
from .data import LengthBucketSampler, TokenRows
from .interrupts import Interrupts
from .loop import Criterion, train
from .optimization import WeightAverage, linear_schedule, make_optimizer, set_rates
from .recipe import Recipe

LOWER_IS_BETTER = ("mse", "loss")


def counted(number: int, noun: str) -> str:
    """A number and its noun, such as "1 epoch" and "5 steps"."""
    return f"{number} {noun}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Stage:
    """A part of a run with a model and a data set of its own.

    Attributes:
        name: "pretrain" or the task's.
        criterion: None: the model computes its own loss.
        learning_rate: the highest rate.
        measure: gives the loss and the metric of a model on the dev set, after each epoch.
        keeps_best: save the best epoch's model, and average the weights if the recipe says so.
    """

    name: str
    model: PretrainedMixin
    data: TokenRows
    criterion: Criterion | None
    epochs: int
    batch_size: int
    learning_rate: float
    measure: Callable[[PretrainedMixin], dict[str, float]] | None = None
    keeps_best: bool = False


@dataclass
class Position:
    """Where a stage is: the epoch (from 0), the steps done in it, the sum of their losses, the examples in that sum."""

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    count: int = 0

    def add(self, loss: float, examples: int) -> None:
        self.step, self.total, self.count = self.step + 1, self.total + loss * examples, self.count + examples

    def as_tuple(self) -> tuple[int, int, float, int]:
        return self.epoch, self.step, self.total, self.count


class TrainingRun:
    """One run in one folder.

    Args:
        recipe: a completed one, with a learning rate and a metric.
        settings: what a resumed run must have in common with this one, for JSON.
        tokenizer: saved before the first state, so that a run which fails earlier leaves nothing; None: it is saved.
        report: called with lines about the run.

    Attributes:
        stage: the name of the current stage; of a resumed run, the one it continues with.
        saved: the state that a resumed run continues from, else None.
        history: the records of the log so far.
        best_epoch, best_value: see `FitResult`.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        settings: dict[str, Any],
        device: torch.device,
        tokenizer: Tokenizer | None,
        *,
        progress: bool,
        report: Callable[[str], None],
    ) -> None:
        self.folder, self.recipe, self.settings, self.device = folder, recipe, settings, device
        self.progress, self.report, self.tokenizer = progress, report, tokenizer
        self.stage = "pretrain"
        self.saved: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0
        self.best_value: float | None = None

    def load(self) -> None:
        """Reads the state in the folder, if there is one.

        The number of epochs may differ from before: the learning rate of each later step is then that of a run planned
        with the new number.

        Raises:
            ValueError: see `load_state`; or fewer epochs than were begun already.
        """
        self.saved = load_state(self.folder, self.settings, self.device)
        if self.saved is None:
            self.report(f"{self.folder} holds no state to continue from: a new run")
            return
        self.stage = self.saved["stage"]
        self.history = json.loads(self.saved["history"])
        self.best_epoch, self.best_value = self.saved["best"]
        epoch, step, *_ = self.saved["position"]
        begun = epoch + (step > 0)
        if self.stage != "pretrain" and self.recipe.epochs < begun:
            raise ValueError(
                f"{self.folder / STATE_NAME}: {begun} epochs are done or begun, so the run cannot end after "
                f"{self.recipe.epochs}; give epochs (--epochs) of {begun} or more"
            )
        self.report(f"continuing with {self.stage} after {counted(epoch, 'epoch')} and {counted(step, 'step')}")

    def epochs(self, stage: Stage) -> None:
        """Runs all epochs of a stage, from where the saved state left it.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the state was saved. FloatingPointError: the loss is no longer finite.
        """
        recipe, model, interrupts = self.recipe, stage.model, Interrupts()
        model.to(self.device)
        sampler = LengthBucketSampler(stage.data.lengths, stage.batch_size, seed=recipe.seed)
        # A generator of its own: a DataLoader draws a number for each pass, and a resumed pass would draw it again.
        loader = DataLoader(
            stage.data, batch_sampler=sampler, collate_fn=stage.data.collate, generator=torch.Generator()
        )
        optimizer = make_optimizer(model, stage.learning_rate, recipe.weight_decay)
        schedule = linear_schedule(optimizer, stage.epochs * sampler.batches_per_epoch, recipe.warmup_ratio)
        average = WeightAverage(model, recipe.ema_decay) if recipe.ema_decay and stage.keeps_best else None
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        if average is not None:
            parts["average"] = average
        position = self._restore(stage.name, parts)
        self.stage = stage.name

        def after_step(loss: float, examples: int) -> None:
            epoch, steps = position.epoch + 1, sampler.batches_per_epoch
            if not math.isfinite(loss):
                raise FloatingPointError(f"{stage.name}: the loss is {loss} in epoch {epoch}, step {position.step + 1}")
            position.add(loss, examples)
            if average is not None:
                average.update(model)
            every = recipe.checkpoint_steps
            is_due = every and position.step % every == 0 and position.step < steps
            if is_due or interrupts.asked:
                self._save(stage.name, parts, position)
            interrupts.check(f"in epoch {epoch} of {stage.epochs} ({stage.name}), after step {position.step}")

        while position.epoch < stage.epochs and not self._has_lost_patience(stage, position):
            epoch, started = position.epoch + 1, time.monotonic()
            with interrupts.located(f"in epoch {epoch} of {stage.epochs} ({stage.name})"):
                if position.step < sampler.batches_per_epoch:
                    sampler.set_epoch(position.epoch, position.step)
                    with interrupts:
                        train(
                            model,
                            loader,
                            stage.criterion,
                            optimizer,
                            self.device,
                            scheduler=schedule,
                            max_grad_norm=recipe.max_grad_norm,
                            after_step=after_step,
                            progress=self.progress and f"{stage.name}, epoch {epoch} of {stage.epochs}",
                        )
                    # Before the dev set, where an error would lose the epoch, and before there is a model without a state.
                    self._save(stage.name, parts, position)
                    interrupts.check(f"after epoch {epoch} of {stage.epochs} ({stage.name})")
                record: dict[str, Any] = {
                    "stage": stage.name,
                    "epoch": epoch,
                    "train_loss": position.total / position.count,
                }
                with average.applied(model) if average is not None else nullcontext():
                    self._measure(stage, record)
                record["seconds"] = round(time.monotonic() - started, 1)
                self.history.append(record)
                self.report(f"epoch {epoch} of {stage.epochs}: {_figures(record)}")
                position = Position(epoch)
                self._save(stage.name, parts, position)
                write_log(self.folder, [self.settings, *self.history])

    def _measure(self, stage: Stage, record: dict[str, Any]) -> None:
        """Adds the dev set's figures to the record of an epoch, and saves the model if it is the best so far."""
        if stage.measure is not None:
            record |= {f"dev_{name}": value for name, value in stage.measure(stage.model).items()}
        if stage.keeps_best and self._is_best(record):
            self.best_epoch, self.best_value = record["epoch"], record.get(f"dev_{self.recipe.metric}")
            stage.model.save_pretrained(self.folder)

    def _is_best(self, record: dict[str, Any]) -> bool:
        value: float | None = record.get(f"dev_{self.recipe.metric}")
        if value is None or self.best_value is None:
            return True
        return value < self.best_value if self.recipe.metric in LOWER_IS_BETTER else value > self.best_value

    def _has_lost_patience(self, stage: Stage, position: Position) -> bool:
        """Whether the best epoch is so long ago that the recipe ends the run."""
        patience = self.recipe.patience
        if patience is None or not stage.keeps_best or stage.measure is None or position.step:
            return False
        if position.epoch - self.best_epoch < patience or not self.best_epoch:
            return False
        self.report(f"no epoch after {self.best_epoch} was better: the run ends")
        return True

    def _save(self, stage: str, parts: dict[str, Any], position: Position) -> None:
        state = {name: part.state_dict() for name, part in parts.items()} | {
            "stage": stage,
            "position": position.as_tuple(),
            "random": random_state(self.device),
            "device": self.device.type,
            "settings": json.dumps(self.settings),
            "history": json.dumps(self.history),
            "best": (self.best_epoch, self.best_value),
        }
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder)
            self.tokenizer = None
        save_state(self.folder, state)

    def _restore(self, stage: str, parts: dict[str, Any]) -> Position:
        """Loads the saved state into the parts of a stage; returns where it continues: at the start without a state."""
        if self.saved is None or self.saved["stage"] != stage:
            return Position()
        for name, part in parts.items():
            part.load_state_dict(self.saved[name])
        set_rates(parts["schedule"])
        set_random_state(self.saved["random"], self.device)
        return Position(*self.saved["position"])


def dev_metrics(metric: str | None) -> list[str]:
    """The metrics that `test` must compute, besides the loss, for a recipe's metric."""
    return [] if metric in (None, "loss") else [metric]


def _figures(record: dict[str, Any]) -> str:
    """A record of the log as a line of text."""
    figures = [
        f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float) and name != "seconds"
    ]
    return f"{record['stage']}, {', '.join(figures)}, {record['seconds']} s"


__all__ = ["Stage", "TrainingRun", "dev_metrics"]
