"""Prepares text for masked language modelling: chooses the hidden tokens and makes batches.

Words are hidden in runs of 1 to 3; a run of n has a probability proportional to 1/n (Lan et al. 2019, section 4.1). 80 %
of the hidden tokens become the mask token, 10 % a random token, and 10 % stay (Devlin et al. 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..ops.linear_cross_entropy import IGNORED
from .data import TextDataset

Array = npt.NDArray[Any]


class MaskedTextDataset(TextDataset):
    """A data set for masked language modelling; `collate` draws new hidden tokens each time, with torch's random numbers.

    Args:
        texts, tokenizer, max_length, token_types: as in TextDataset.
        mask_probability: share of the tokens of a text to hide: at least one, never special tokens.
        with_wanted_tokens: batches also hold `wanted_tokens`, the hidden tokens; this package's models then compute the last
            layer and the scores only for them.

    Raises:
        ValueError: a tokenizer without a mask token, mask_probability outside (0, 1).
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Any,
        max_length: int = 512,
        *,
        mask_probability: float = 0.15,
        with_wanted_tokens: bool = False,
        token_types: bool = True,
    ) -> None:
        super().__init__(texts, [0] * len(texts), tokenizer, max_length, token_types=token_types)
        self.masks, self.with_wanted_tokens = Masks(tokenizer, mask_probability), with_wanted_tokens

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch, each (B, S): input_ids with hidden tokens, labels (-100 elsewhere), attention_mask, token_type_ids."""
        batch = super().collate(items)
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        rows = torch.arange(len(ids))[:, None].expand_as(ids)
        chance = torch.rand((int(real.sum()), 4), dtype=torch.float32).numpy()
        shown, labels = self.masks.draw(ids[real].numpy(), rows[real].numpy(), chance)
        batch["labels"] = torch.full_like(ids, IGNORED)
        ids[real], batch["labels"][real] = torch.from_numpy(shown), torch.from_numpy(labels)
        if self.with_wanted_tokens:
            batch["wanted_tokens"] = batch["labels"] != IGNORED
        return batch


class Masks:
    """Hides tokens of packed sequences.

    Args:
        tokenizer: its vocabulary, mask token and special tokens.
        probability: share of a sequence's ordinary tokens to hide.
        longest_run: words in a run, at most: 1, 2 or 3.

    Raises:
        ValueError: a tokenizer without a mask token, a probability outside (0, 1).
    """

    def __init__(self, tokenizer: Any, probability: float, longest_run: int = 3) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError("masked language modelling needs a tokenizer with a mask token")
        if not 0 < probability < 1:
            raise ValueError(f"mask_probability must lie in (0, 1), got {probability}")
        self.probability, self.longest_run = probability, longest_run
        self.mask_id = int(tokenizer.mask_token_id)
        self.starts_word = word_starts(tokenizer)
        self.is_special = np.zeros(len(self.starts_word), dtype=bool)
        self.is_special[[int(i) for i in tokenizer.all_special_ids]] = True
        self.ordinary_ids = np.flatnonzero(~self.is_special)

    def draw(self, ids: Array, sequence: Array, chance: Array) -> tuple[Array, Array]:
        """Chooses the tokens to hide and what hides them.

        Args:
            ids: (T,), the sequences one after another. sequence: (T,), the number of each token's sequence, ascending.
            chance: (T, 4) random numbers in [0, 1). The result depends on them alone.

        Returns:
            (T,) ids with hidden tokens, and (T,) labels: the true ids of the hidden tokens, -100 elsewhere.
        """
        special = self.is_special[ids]
        hidden = choose_tokens(
            ids, sequence, special, self.starts_word, self.probability, chance[:, :2], self.longest_run
        )
        fate = chance[:, 2]
        shown = np.where(hidden & (fate < 0.8), self.mask_id, ids)
        other = self.ordinary_ids[(chance[:, 3] * len(self.ordinary_ids)).astype(np.int64)]
        return np.where(hidden & (fate >= 0.9), other, shown), np.where(hidden, ids, IGNORED)


def choose_tokens(
    ids: Array,
    sequence: Array,
    special: Array,
    starts_word: Array,
    probability: float,
    chance: Array,
    longest_run: int = 3,
) -> Array:
    """Chooses the tokens to hide in packed sequences; returns bool (T,).

    In each sequence words are visited in random order; each begins a run of 1 to `longest_run` words that is hidden, until
    enough tokens are. All sequences are computed at once: a word is hidden at the first visit of a run that covers it.

    Args:
        ids: (T,). sequence: (T,), the number of each token's sequence, ascending.
        special: (T,) bool, tokens that are never hidden.
        starts_word: (V,) bool, the pieces that begin a word; the others continue one.
        probability: share of a sequence's ordinary tokens to hide, at least one; the last run is cut there, between words.
        chance: (T, 2) random numbers in [0, 1).
    """
    hidden = np.zeros(len(ids), dtype=bool)
    at = np.flatnonzero(~special)
    if not len(at):
        return hidden
    owner = sequence[at]
    begins = starts_word[ids[at]]
    begins[0] = True
    begins[1:] |= (np.diff(at) > 1) | (np.diff(owner) > 0)
    first = np.flatnonzero(begins)  # of each word
    sizes = np.diff(np.append(first, len(at)))
    word_owner, chance = owner[first], chance[at[first]]
    weights = np.cumsum(1 / np.arange(1, longest_run + 1))
    run = 1 + np.searchsorted(weights[:-1] / weights[-1], chance[:, 1], side="right")
    # Sorting by this number sorts the words by sequence, then by the visit that hides them.
    visit = word_owner + chance[:, 0].astype(np.float64)
    hides = visit.copy()
    for step in range(1, longest_run):
        reaches = (run[:-step] > step) & (word_owner[step:] == word_owner[:-step])
        hides[step:] = np.where(reaches, np.minimum(hides[step:], visit[:-step]), hides[step:])
    order = np.argsort(hides, kind="stable")
    owners = word_owner[order]
    before = np.cumsum(sizes[order]) - sizes[order]  # tokens hidden by earlier words, of all sequences
    sequence_begins = np.diff(owners, prepend=-1) > 0
    before_sequence = np.maximum.accumulate(np.where(sequence_begins, before, 0))
    budget = np.maximum(1, np.round(probability * np.bincount(owner)))[owners]
    chosen = np.empty(len(first), dtype=bool)
    chosen[order] = before - before_sequence < budget
    hidden[at] = np.repeat(chosen, sizes)
    return hidden


def word_starts(tokenizer: Any) -> Array:
    """The pieces that begin a word, (V,) bool: those with SentencePiece's mark, or those without WordPiece's."""
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    marked = any(piece.startswith("▁") for piece in pieces.values())
    begins = [
        pieces.get(i, "").startswith("▁") if marked else not pieces.get(i, "").startswith("##")
        for i in range(max(pieces) + 1)
    ]
    return np.array(begins)


def drop_contained_lines(lines: Sequence[str]) -> list[str]:
    """Drops every line that is a run of whole words in a longer line, and duplicates; the longest lines come first.

    SST-2's lines are phrases of parsed sentences; for language modelling the sentences are enough.
    """
    kept: list[str] = []
    where: dict[str, list[int]] = {}
    for line in sorted({" ".join(line.split()) for line in lines} - {""}, key=lambda line: (-len(line), line)):
        words = set(line.split())
        candidates = min((where.get(word, []) for word in words), key=len)
        if any(f" {line} " in f" {kept[i]} " for i in candidates):
            continue
        for word in words:
            where.setdefault(word, []).append(len(kept))
        kept.append(line)
    return kept


__all__ = ["MaskedTextDataset", "Masks", "choose_tokens", "drop_contained_lines", "word_starts"]
