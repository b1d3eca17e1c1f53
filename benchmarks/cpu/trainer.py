"""The host of training: a few steps of transformers' Trainer on a batch of real lengths, in time and in peak memory."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

import torch
from shared.memory import peak_mib
from shared.workers import Worker, serve
from torch import Tensor

from cpu.host import Host
from cpu.texts import MINILM, Texts, minilm_folder

STEPS = 3
_SEED = 0


@dataclass
class TrainerSteps(Host):
    """`Trainer.train()` of a classifier for 3 steps, of which each has all texts as its batch: loading and padding the batch,
    forward, backward, clipping, AdamW. The learning rate is 0 and there is no dropout, so that every call of every side
    computes the same."""

    name: str
    texts: Texts

    needs = ("transformers", "accelerate", MINILM)
    engines = ("hf", "albert_fast")

    def make(self) -> Any:
        from transformers import BertForSequenceClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return BertForSequenceClassification.from_pretrained(minilm_folder(), **dropouts).train()

    def encoder(self, model: Any) -> Any:
        return model.bert

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(minilm_folder())

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        rows = [dict(self._tokenizer(text, truncation=True, max_length=512)) for text in self.texts.measured()]
        return [{**row, "labels": place % 2} for place, row in enumerate(rows)]

    def call(self, model: Any) -> Callable[[], Any]:
        from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        first = model.bert.encoder.layer[0].attention.self.query.weight
        watched = [first, model.bert.embeddings.LayerNorm.weight]
        gradients: list[Tensor] = []

        class KeepGradients(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                gradients[:] = [parameter.grad.clone() for parameter in watched]

        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=len(self._rows),
            max_steps=STEPS,
            learning_rate=0.0,
            logging_steps=STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        collate = DataCollatorWithPadding(self._tokenizer)
        trainer = Trainer(
            model, arguments, data_collator=collate, train_dataset=self._rows, callbacks=[KeepGradients()]
        )
        trainer.remove_callback(PrinterCallback)

        def train() -> list[Tensor]:
            loss = trainer.train().training_loss
            return [torch.tensor(loss), *gradients]

        return train

    def answer(self, output: Any) -> tuple[Tensor, ...]:
        return tuple(output)

    def tokens(self) -> list[int]:
        return [len(row["input_ids"]) for row in self._rows] * STEPS

    def memory(self, side: str, threads: int) -> dict[str, float]:
        """MiB of resident memory at its peak: of a new process with the model, then after its training."""
        worker = Worker(sys.executable, Path(__file__))
        try:
            found: dict[str, float] = worker.ask(
                name=self.name, kind=self.texts.kind, count=self.texts.count, side=side, threads=threads
            )
        finally:
            worker.close()
        return found


def _memory(name: str, kind: str, count: int, side: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    host = TrainerSteps(name, Texts(kind, count))
    train = host.call(host.model(side, threads))
    before = peak_mib()
    train()
    return {"model_mib": before, "peak_mib": peak_mib()}


if __name__ == "__main__":
    serve(_memory)
