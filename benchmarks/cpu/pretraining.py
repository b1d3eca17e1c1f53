"""A step of pre-training, in time and in peak memory: ours on packed tokens, transformers' on the padded batch.

A step is the forward, the backward, clipping and AdamW. Both models have the same weights, 15 % of the tokens are hidden, there is
no dropout, and the learning rate is 0, so that every call of every side computes the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

import torch
from shared import lengths, sides
from shared.memory import peak_mib
from shared.models import BASE, QUICK
from shared.shapes import Batch
from shared.workers import Worker, serve
from torch import Tensor

from albert_fast import ALBERTConfig, ALBERTForPreTraining
from albert_fast.ops.linear_cross_entropy import IGNORED
from albert_fast.training.pretrain_run import PretrainingStep

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
SIZES: dict[str, ALBERTConfig] = {
    "small": BASE.replace(
        hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=4, **NO_DROPOUT
    ),
    "base": BASE.replace(**NO_DROPOUT),
    "quick": QUICK.replace(**NO_DROPOUT),
}
SIDES = (sides.FAST, "hf")
_HIDDEN = 0.15
_MASK = 4
_SEED = 0


@dataclass
class Steps:
    """Steps of a model of a size on a batch of real texts (`lengths.BATCHES`)."""

    size: str
    batch: str

    @property
    def config(self) -> ALBERTConfig:
        return SIZES[self.size]

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self._rows]

    @cached_property
    def _rows(self) -> list[list[int]]:
        return lengths.batch(self.batch, self.config.vocab_size)

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids with masks, the attention mask and the labels (B, S); the order of each text (B,)."""
        batch, draw = (
            Batch.of(self._rows, self.config.pad_token_id, torch.device("cpu")),
            torch.Generator().manual_seed(_SEED),
        )
        hidden = (torch.rand(batch.ids.shape, generator=draw) < _HIDDEN) & batch.mask.bool()
        labels = batch.ids.where(hidden, torch.tensor(IGNORED))
        order = torch.randint(2, (len(batch.ids),), generator=draw)
        return batch.ids.masked_fill(hidden, _MASK), batch.mask, labels, order

    def _theirs(self) -> Any:
        from transformers import AlbertConfig, AlbertForPreTraining

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            config = AlbertConfig(**self.config.to_dict(), attn_implementation="sdpa")
            return AlbertForPreTraining(config).train()

    def call(self, side: str) -> Callable[[], list[Tensor]]:
        """A step of a side, which returns the loss and two gradients."""
        theirs = self._theirs()
        ids, mask, labels, order = self._padded
        if side == "hf":
            model, types = theirs, torch.zeros_like(ids)
            step, encoder = model, model.albert

            def loss() -> Tensor:
                made = model(ids, mask, types, labels=labels, sentence_order_label=order)
                return made.loss
        else:
            ours = ALBERTForPreTraining.from_model(theirs).train()
            step, encoder = PretrainingStep(ours).train(), ours.albert
            kept = mask.bool()
            packed, packed_labels = ids[kept], labels[kept]
            ends = torch.tensor([0, *self.tokens]).cumsum(0).to(torch.int32).numpy()

            def loss() -> Tensor:
                types, wanted = torch.zeros_like(packed), packed_labels != IGNORED
                made = step(packed, types, packed_labels, wanted, order, ends, max(self.tokens))
                return made.loss

        optimizer = torch.optim.AdamW(step.parameters(), lr=0.0, fused=True)
        query = encoder.encoder.albert_layer_groups[0].albert_layers[0].attention.query.weight
        watched = query, encoder.embeddings.word_embeddings.weight

        def one_step() -> list[Tensor]:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
            optimizer.step()
            return [value.detach(), *(weight.grad.clone() for weight in watched)]

        return one_step

    def memory(self, side: str, threads: int) -> dict[str, float]:
        """MiB of resident memory at its peak: of a new process with the model, then after two steps."""
        worker = Worker(sys.executable, Path(__file__))
        try:
            found: dict[str, float] = worker.ask(size=self.size, batch=self.batch, side=side, threads=threads)
        finally:
            worker.close()
        return found


def _memory(size: str, batch: str, side: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    step = Steps(size, batch).call(side)
    before = peak_mib()
    step()
    step()
    return {"model_mib": before, "peak_mib": peak_mib()}


if __name__ == "__main__":
    serve(_memory)
