"""Cuts a tokenised corpus into pairs of segments and packs them into batches for masked words and sentence order.

A sequence is [CLS] A [SEP] B [SEP]: consecutive text of one document that fills the maximal length, or for one sequence in ten
a random shorter one (Devlin et al. 2018, appendix A.2), cut in two at a sentence end. In half of the sequences the two are
swapped (Lan et al. 2019, section 3.1). Text without a sentence end inside is one segment, without a label of the order.

All random choices of a step depend on (seed, epoch, step) alone: a run continues anywhere, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..ops.linear_cross_entropy import IGNORED
from .corpus import Corpus
from .masking import Masks

Array = npt.NDArray[Any]
SPECIAL_TOKENS = 3  # of a pair
SHORTEST = 4  # tokens of text; what is left of a document below that is dropped


def cut_segments(begins: Array, ends: Array, longest: int, short_share: float, rng: Any) -> tuple[Array, Array]:
    """Cuts documents into spans of `longest` tokens, or for a share of them a random number from SHORTEST to `longest`.

    Args:
        begins, ends: (D,), of the documents. rng: a numpy Generator.

    Returns:
        The begins and ends of the spans; each token is in one, but for ends of documents below SHORTEST tokens.
    """
    found: list[tuple[Array, Array]] = []
    begins, ends = begins.astype(np.int64), ends.astype(np.int64)
    while len(begins):  # the next span of every document
        shorter = rng.integers(SHORTEST, longest + 1, len(begins))
        length = np.where(rng.random(len(begins)) < short_share, shorter, longest)
        stops = np.minimum(begins + length, ends)
        fits = stops - begins >= SHORTEST
        found.append((begins[fits], stops[fits]))
        goes_on = stops < ends
        begins, ends = stops[goes_on], ends[goes_on]
    return np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])


@dataclass(frozen=True)
class EpochPlan:
    """The spans of an epoch in random order, begins and ends (N,), and the first span of each batch, (batches + 1,)."""

    begins: Array
    ends: Array
    batches: Array

    def __len__(self) -> int:
        return len(self.batches) - 1


Position = tuple[int, int]


class PretrainingData(torch.utils.data.Dataset[tuple[Position, list[dict[str, Any]]]]):
    """Batches of a corpus: `data[epoch, step]` is a step's position and the micro-batches of one process.

    Args:
        documents: the numbers of the documents to use.
        ids: (CLS, SEP).
        max_length: tokens of a sequence. batch_tokens: tokens of a step, over all processes and micro-batches.
        parts: micro-batches of a step, over all processes. mine: those of this process.

    Raises:
        ValueError: a batch that cannot hold a sequence for each part, a corpus with too few sequences.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: Array,
        masks: Masks,
        ids: tuple[int, int],
        *,
        max_length: int,
        batch_tokens: int,
        short_share: float = 0.1,
        parts: int = 1,
        mine: range = range(1),
        seed: int = 0,
    ) -> None:
        if batch_tokens < parts * max_length:
            raise ValueError(
                f"batch_tokens {batch_tokens} cannot hold a sequence of {max_length} tokens for each of {parts} "
                "micro-batches (processes times accumulation)"
            )
        self.corpus, self.masks, self.ids = corpus, masks, ids
        self.begins, self.ends = corpus.document_begins[documents], corpus.document_ends[documents]
        self.max_length, self.batch_tokens, self.short_share = max_length, batch_tokens, short_share
        self.parts, self.mine, self.seed = parts, mine, seed
        self._planned: tuple[int, EpochPlan] | None = None
        if len(plan := self.plan(0)) == 1 and len(plan.begins) < parts:
            raise ValueError(
                f"the text gives {len(plan.begins)} sequences for {parts} micro-batches of a step: too few"
            )

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of an epoch; the last one, if it is not full, is left out unless it is the only one."""
        if self._planned is not None and self._planned[0] == epoch:
            return self._planned[1]
        rng = np.random.default_rng([self.seed, epoch])
        begins, ends = cut_segments(self.begins, self.ends, self.max_length - SPECIAL_TOKENS, self.short_share, rng)
        if not len(begins):
            raise ValueError(f"no document has {SHORTEST} tokens or more")
        order = rng.permutation(len(begins))
        begins, ends = begins[order], ends[order]
        before = np.concatenate([[0], np.cumsum(ends - begins + SPECIAL_TOKENS)])
        batches = [0]
        while batches[-1] < len(begins):
            full = int(np.searchsorted(before, before[batches[-1]] + self.batch_tokens, side="right")) - 1
            batches.append(min(full, len(begins)))
        if len(batches) > 2 and before[-1] - before[batches[-2]] + self.max_length <= self.batch_tokens:
            batches.pop()
        plan = EpochPlan(begins, ends, np.array(batches))
        self._planned = (epoch, plan)
        return plan

    def positions(self, epoch: int = 0, step: int = 0) -> Iterator[Position]:
        """(epoch, step) from here on, without end: a sampler for `torch.utils.data.DataLoader`."""
        while True:
            steps = len(self.plan(epoch))
            yield from ((epoch, at) for at in range(step, steps))
            epoch, step = epoch + 1, 0

    def __getitem__(self, position: Position) -> tuple[Position, list[dict[str, Any]]]:
        """The position and the micro-batches of this process. Each of these has

        input_ids, token_type_ids, labels (T,) int64; wanted_tokens (T,) bool; cu_seqlens (B + 1,) int32, a numpy array, so that
        it stays on the CPU; max_seqlen; sentence_order_label (B,) int64: 0 in order, 1 swapped, -100 for one segment.
        """
        epoch, step = position
        plan = self.plan(epoch)
        spans = slice(plan.batches[step], plan.batches[step + 1])
        begins, ends = plan.begins[spans], plan.ends[spans]
        rng = np.random.default_rng([self.seed, epoch, step])
        where, swap = rng.random(len(begins)), rng.random(len(begins)) < 0.5
        first = np.searchsorted(self.corpus.sentence_ends, begins, side="right")
        inside = np.searchsorted(self.corpus.sentence_ends, ends, side="left") - first
        at = np.minimum(first + (where * inside).astype(np.int64), len(self.corpus.sentence_ends) - 1)
        middles = np.where(inside > 0, self.corpus.sentence_ends[at], ends)
        swap &= inside > 0
        lengths = ends - begins + np.where(inside > 0, SPECIAL_TOKENS, SPECIAL_TOKENS - 1)
        # Random numbers for all tokens of the step, whoever computes them: the masks do not depend on the parts.
        chance = rng.random((int(lengths.sum()), 4), dtype=np.float32)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        micro_batches = []
        for part in self.mine:
            chosen = np.arange(part, len(begins), self.parts)
            rows = [self._sequence(begins[i], middles[i], ends[i], bool(swap[i])) for i in chosen]
            chances = [chance[offsets[i] : offsets[i + 1]] for i in chosen]
            order = np.where(inside > 0, swap, IGNORED)[chosen]
            micro_batches.append(self._packed(rows, chances, order))
        return position, micro_batches

    def _sequence(self, begin: int, middle: int, end: int, swapped: bool) -> tuple[Array, int]:
        """The ids of a sequence, and how many of them are of type 0."""
        cls, sep = [self.ids[0]], [self.ids[1]]
        first, second = self.corpus.tokens[begin:middle], self.corpus.tokens[middle:end]
        if swapped:
            first, second = second, first
        pieces: list[Any] = [cls, first, sep, second, sep] if len(second) else [cls, first, sep]
        return np.concatenate(pieces).astype(np.int64), len(first) + 2

    def _packed(self, rows: list[tuple[Array, int]], chances: list[Array], order: Array) -> dict[str, Any]:
        lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int32)
        flat = np.concatenate([ids for ids, _ in rows]) if rows else np.zeros(0, np.int64)
        types = [np.arange(len(ids)) >= first for ids, first in rows]
        chance = np.concatenate(chances) if rows else np.zeros((0, 4), np.float32)
        shown, labels = self.masks.draw(flat, np.repeat(np.arange(len(rows)), lengths), chance)
        batch: dict[str, Any] = {
            "input_ids": _tensor(shown),
            "token_type_ids": _tensor(np.concatenate(types) if rows else flat),
            "labels": _tensor(labels),
            "wanted_tokens": torch.from_numpy(labels != IGNORED),
            "sentence_order_label": _tensor(order),
        }
        batch["cu_seqlens"] = np.append(0, np.cumsum(lengths)).astype(np.int32)
        batch["max_seqlen"] = int(lengths.max(initial=0))
        return batch


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def split_documents(count: int, held_out_share: float, seed: int) -> tuple[Array, Array]:
    """Numbers of the documents to train on and of those held out: at least one of each, where there are two and a share."""
    order = np.random.default_rng([seed, count]).permutation(count)
    held = min(max(1, round(held_out_share * count)), count - 1) if held_out_share and count > 1 else 0
    return np.sort(order[held:]), np.sort(order[:held])


__all__ = ["PretrainingData", "cut_segments", "split_documents"]
