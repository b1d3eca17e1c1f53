"""The steps of a pre-training run: trains, logs, measures held-out text, and saves everything that a resumed run needs."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..models.heads import ALBERTForPreTraining
from ..models.losses import cross_entropy
from ..models.outputs import PreTrainingOutput
from ..ops.linear_cross_entropy import IGNORED
from ..runtime.modes import mode
from .checkpointing import STATE_NAME, load_state, random_state, save_state, set_random_state, write_log
from .curves import Curves
from .distributed import Processes, load_whole_state, spread, whole_state
from .interrupts import Interrupts
from .loop import train
from .optimization import cosine_schedule, linear_schedule, make_lamb, make_optimizer, set_rates
from .pretrain_config import PretrainConfig
from .progress import tqdm_or_none
from .segments import PretrainingData

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class PretrainingStep(nn.Module):
    """The losses of one micro-batch, weighted so that the mean over micro-batches and processes is that of the whole step.

    Attributes:
        sums: over the calls in training since it was set to zero, float64 (4,): the sum of the losses of hidden tokens, and
            their number; the same for sentence order.
    """

    def __init__(self, model: ALBERTForPreTraining, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.model = model
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # no buffer: processes do not share it

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        labels: Tensor,
        wanted_tokens: Tensor,
        sentence_order_label: Tensor,
        cu_seqlens: Any,
        max_seqlen: int,
        shares: tuple[float, float] = (1.0, 1.0),
    ) -> Any:
        """The loss of a micro-batch of `PretrainingData`; in eval mode also the logits of its hidden tokens and of the order.

        Args:
            shares: weights of the two losses.
        """
        output = self.model.forward_packed(
            input_ids,
            torch.from_numpy(cu_seqlens),
            max_seqlen,
            token_type_ids,
            labels=labels,
            wanted_tokens=wanted_tokens,
            output_logits=not self.training,
            return_dict=True,
        )
        losses = output.loss, cross_entropy(output.sop_logits, sentence_order_label)
        output.loss = losses[0] * shares[0] + losses[1] * shares[1]
        if not self.training:
            return output
        hidden, ordered = wanted_tokens.sum(), (sentence_order_label != IGNORED).sum()
        self.sums += torch.stack([losses[0].detach() * hidden, hidden, losses[1].detach() * ordered, ordered])
        return PreTrainingOutput(output.loss)


class PretrainingRun:
    """One run in one folder, or one process of it.

    Args:
        model: on the CPU, with its first weights.
        settings: what a resumed run must have in common with this one, for JSON.
        held_out: measured; None: nothing is.
        say: called with lines about the run.
        bar: a bar on standard error in place of a line for each record.

    Attributes:
        step: the optimizer steps that are done. position: of the next step's batch.
        history: the records of the log so far.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: ALBERTForPreTraining,
        data: PretrainingData,
        held_out: PretrainingData | None,
        settings: dict[str, Any],
        processes: Processes,
        device: torch.device,
        say: Callable[[str], None],
        *,
        bar: bool,
    ) -> None:
        self.config, self.model, self.data, self.held_out = config, model, data, held_out
        self.settings, self.processes, self.device, self.say = settings, processes, device, say
        self.folder, self.bar = Path(config.output), bar and processes.is_first
        self.inner = PretrainingStep(model, device)
        self.module = spread(self.inner, processes, device, sharded=config.sharded)
        how = config.optimizer
        make = make_lamb if how.name == "lamb" else make_optimizer
        self.optimizer = make(self.module, how.highest_rate, how.weight_decay, (how.beta1, how.beta2))
        schedule = linear_schedule if how.schedule == "linear" else cosine_schedule
        self.schedule = schedule(self.optimizer, config.steps, how.warmup_ratio)
        self.step, self.position = 0, (0, 0)
        self.history: list[dict[str, Any]] = []
        self.curves: Curves | None = None
        self.tokens, self.since = 0, time.monotonic()

    def load(self) -> None:
        """Continues from the state in the folder, if there is one.

        Raises:
            ValueError: see `load_state`; or more steps are done than the configuration asks for.
        """
        state = load_state(self.folder, self.settings, self.device)
        if state is None:
            self.say(f"{self.folder} holds no state to continue from: a new run")
            return
        self.step, self.position = state["step"], state["position"]
        if self.step > self.config.steps:
            raise ValueError(
                f"{self.folder / STATE_NAME}: {self.step} steps are done, so the run cannot end after "
                f"{self.config.steps}; give steps of {self.step} or more"
            )
        self.history = json.loads(state["history"])
        load_whole_state(self.module, self.optimizer, state["model"], state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_rates(self.schedule)
        self.inner.sums.copy_(state["sums"][self.processes.rank % len(state["sums"])])
        if len(state["random"]) == self.processes.size:
            set_random_state(state["random"][self.processes.rank], self.device)
        else:
            self.say(f"the run had {len(state['random'])} processes: random numbers, such as of dropout, start anew")
        self.say(f"continuing after step {self.step} of {self.config.steps}")

    def run(self) -> None:
        """Takes the steps that are left.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the state was saved. FloatingPointError: the loss is no longer finite; the saved
                state is that of an earlier step. OSError: the state cannot be saved; the last one is unchanged.
        """
        config, interrupts = self.config, Interrupts()
        with contextlib.ExitStack() as stack:
            if self.processes.is_first:
                self.curves = stack.enter_context(contextlib.closing(Curves(self.folder, self.step, self.say)))
            if self.step >= config.steps:
                self.save()  # a kill right after the last state left an older model
                return
            bar = stack.enter_context(self._shown_bar())
            self.since = time.monotonic()

            def after_step(loss: float, examples: int) -> None:
                self.step += 1
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} in step {self.step}")
                ends = self.step == config.steps
                if self.step % config.log_steps == 0 or ends:
                    self._log(bar)
                stopped = time.monotonic()
                if self.held_out is not None and (self.step % config.evaluate_steps == 0 or ends):
                    self._record(self.evaluate(), bar)
                if self.step % config.save_steps == 0 or ends or interrupts.asked:
                    self.save()
                self.since += time.monotonic() - stopped  # tokens per second are those of training
                if bar is not None:
                    bar.update()
                interrupts.check(f"after step {self.step} of {config.steps}")

            # Ctrl-C reaches the processes of torchrun at different steps, where they would wait for each other.
            with interrupts if self.processes.size == 1 else contextlib.nullcontext():
                train(
                    self.module,
                    self._batches(),
                    None,
                    self.optimizer,
                    self.device,
                    scheduler=self.schedule,
                    max_grad_norm=config.optimizer.max_grad_norm,
                    accumulation=config.accumulation,
                    autocast=DTYPES[config.precision],
                    after_step=after_step,
                    progress=False,
                )

    def _batches(self) -> Iterator[dict[str, Any]]:
        """The micro-batches of the steps that are left, with the shares of their losses."""
        left = self.config.steps - self.step
        # A generator of its own: a DataLoader draws a number, which a resumed run would draw again.
        loader = DataLoader(
            self.data,
            batch_size=None,
            sampler=itertools.islice(self.data.positions(*self.position), left),
            collate_fn=_unchanged,
            num_workers=self.config.data.workers,
            generator=torch.Generator(),
        )
        for (epoch, step), micro_batches in loader:
            self.position = epoch, step + 1
            counts = [_counts(batch) for batch in micro_batches]
            total = self.processes.summed(torch.tensor(counts, dtype=torch.float64, device=self.device).sum(0))
            whole = [self.data.parts / max(1.0, number) for number in total.tolist()[:2]]
            self.tokens += int(total[2])
            for batch, (hidden, ordered, _) in zip(micro_batches, counts, strict=True):
                yield batch | {"shares": (hidden * whole[0], ordered * whole[1])}

    def _log(self, bar: Any) -> None:
        """Adds a record of the steps since the last one."""
        sums = self.processes.summed(self.inner.sums.clone()).tolist()
        self.inner.sums.zero_()
        words, order = sums[0] / max(1.0, sums[1]), sums[2] / max(1.0, sums[3])
        now = time.monotonic()
        rate, self.since, self.tokens = self.tokens / max(1e-9, now - self.since), now, 0
        record = {
            "epoch": self.position[0] + 1,
            "loss": words + order,
            "masked_loss": words,
            "order_loss": order,
            "learning_rate": self.schedule.base_lrs[0] * self.schedule.lr_lambdas[0](self.step - 1),
        }
        self._record(record, bar, rate)

    def _record(self, figures: dict[str, Any], bar: Any, rate: float | None = None) -> None:
        """Keeps figures of this step, shows them, and draws them. `rate`: tokens a second, of a training record."""
        record = {"step": self.step, **figures}
        self.history.append(record)
        if not self.processes.is_first:
            return
        speed = {} if rate is None else {"tokens_per_second": rate}
        if self.curves is not None:
            self.curves.add(record | speed)
        line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if bar is not None and rate is not None:
            bar.set_postfix_str(f"loss {figures['loss']:.4f}, {rate:,.0f} tokens/s")
        elif bar is not None:
            with bar.external_write_mode(file=sys.stderr):
                self.say(f"step {self.step}: {line}")
        else:
            self.say(f"step {self.step} of {self.config.steps}: {line}{self._outlook(rate)}")

    def _outlook(self, rate: float | None) -> str:
        if rate is None:
            return ""
        left = (self.config.steps - self.step) * self.config.batch_tokens / max(rate, 1e-9)
        return f", {rate:,.0f} tokens/s, {_duration(left)} left"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measures the held-out text, with the same hidden tokens each time; all processes must call it.

        Returns:
            held_out_loss, held_out_masked_loss, masked_accuracy, and, where a sequence has two segments, order_accuracy.
        """
        assert self.held_out is not None
        # Sums of: the losses of hidden tokens, right ones, hidden ones; the same for sentence order.
        sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        seen = 0
        with mode(self.module, training=False):
            for step in range(len(self.held_out.plan(0))):
                if seen >= self.config.evaluation_tokens:
                    break
                seen += self.held_out.batch_tokens
                for batch in self.held_out[0, step][1]:
                    sums += self._measured(batch)
        loss, right, hidden, order_loss, right_order, ordered = self.processes.summed(sums).tolist()
        words, order = loss / max(1.0, hidden), order_loss / max(1.0, ordered)
        figures = {"held_out_loss": words + order, "held_out_masked_loss": words}
        figures["masked_accuracy"] = right / max(1.0, hidden)
        if ordered:
            figures["order_accuracy"] = right_order / ordered
        return figures

    def _measured(self, batch: dict[str, Any]) -> Tensor:
        moved = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        dtype = DTYPES[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            output = self.module(**moved)
        labels, order = moved["labels"][moved["wanted_tokens"]], moved["sentence_order_label"]
        known = order != IGNORED
        figures: list[Tensor] = []
        for logits, truth in ((output.prediction_logits, labels), (output.sop_logits[known], order[known])):
            right = (logits.argmax(-1) == truth).sum()
            figures += [cross_entropy(logits, truth) * len(truth), right, torch.tensor(len(truth), device=self.device)]
        return torch.stack([figure.double() for figure in figures])

    def save(self) -> None:
        """Writes the state, then the model for `from_pretrained`, log and curves; all processes must call it."""
        model, optimizer = whole_state(self.module, self.optimizer)
        random = self.processes.gathered(random_state(self.device))
        sums = self.processes.gathered(self.inner.sums.cpu())
        if not self.processes.is_first:
            return
        state = {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "position": self.position,
            "sums": sums,
            "random": random,
            "device": self.device.type,
            "settings": json.dumps(self.settings),
            "history": json.dumps(self.history),
        }
        save_state(self.folder, state)
        self._whole_model(model).save_pretrained(self.folder)
        write_log(self.folder, [self.settings, *self.history])
        if self.curves is not None:
            self.curves.draw(self.history)

    def _whole_model(self, state: dict[str, Any]) -> ALBERTForPreTraining:
        if not self.config.sharded:
            return self.model
        whole = ALBERTForPreTraining(self.model.config)
        whole.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
        return whole

    def _shown_bar(self) -> Any:
        bar = tqdm_or_none() if self.bar else None
        if bar is None:
            return contextlib.nullcontext()
        return bar(desc="pretrain", total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True)


def _unchanged(item: Any) -> Any:
    """In place of torch's conversion, which makes tensors of numpy arrays."""
    return item


def _counts(batch: dict[str, Any]) -> tuple[int, int, int]:
    """How many tokens are hidden, how many sequences have an order, and how many tokens there are."""
    ordered = int((batch["sentence_order_label"] != IGNORED).sum())
    return int(batch["wanted_tokens"].sum()), ordered, len(batch["input_ids"])


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"


__all__ = ["PretrainingRun", "PretrainingStep"]
