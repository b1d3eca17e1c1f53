"""Prepares lines of text for masked language modelling: chooses the hidden tokens and makes batches.

Words are hidden in runs of 1 to 3; a run of n has a probability proportional to 1/n (Lan et al. 2019, section 4.1). 80 %
of the hidden tokens become the mask token, 10 % a random token, and 10 % stay (Devlin et al. 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_cross_entropy import IGNORED
from .data import TextDataset

RUN_WEIGHTS = torch.tensor([1.0, 1 / 2, 1 / 3], dtype=torch.float32)


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
        if tokenizer.mask_token_id is None:
            raise ValueError("masked language modelling needs a tokenizer with a mask token")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must lie in (0, 1), got {mask_probability}")
        self.mask_probability, self.with_wanted_tokens = mask_probability, with_wanted_tokens
        self.starts_word = word_starts(tokenizer)
        self.ordinary_ids = torch.tensor(sorted(set(range(len(self.starts_word))) - set(self.special_ids.tolist())))

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch, each (B, S): input_ids with hidden tokens, labels (-100 elsewhere), attention_mask, token_type_ids."""
        batch = super().collate(items)
        ids = batch["input_ids"]
        hidden = choose_tokens(ids, torch.isin(ids, self.special_ids), self.starts_word, self.mask_probability)
        batch["labels"] = torch.where(hidden, ids, IGNORED)
        if self.with_wanted_tokens:
            batch["wanted_tokens"] = hidden
        fate = torch.rand(ids.shape, dtype=torch.float32)
        other = self.ordinary_ids[torch.randint(len(self.ordinary_ids), ids.shape)]
        assert self.mask_id is not None
        ids = torch.where(hidden & (fate < 0.8), self.mask_id, ids)
        batch["input_ids"] = torch.where(hidden & (fate >= 0.9), other, ids)
        return batch


def choose_tokens(ids: Tensor, special: Tensor, starts_word: Tensor, probability: float) -> Tensor:
    """Chooses the tokens to hide; returns bool (B, S).

    Args:
        ids: (B, S).
        special: (B, S) bool, tokens that are never hidden, padding included.
        starts_word: (V,) bool, the pieces that begin a word; the others continue one.
        probability: share of a row's ordinary tokens to hide; the last run of words may exceed it.
    """
    hidden = torch.zeros_like(special)
    begins = starts_word[ids] | special.roll(1, 1)
    for row in range(ids.shape[0]):
        ordinary = (~special[row]).nonzero()[:, 0]
        if not len(ordinary):
            continue
        word_of = begins[row, ordinary].cumsum(0) - 1
        word_of -= word_of[0].clone()  # the first piece of a cut text may continue a word
        words = int(word_of[-1]) + 1
        budget = max(1, round(probability * len(ordinary)))
        runs = (torch.multinomial(RUN_WEIGHTS, words, replacement=True) + 1).tolist()
        chosen = torch.zeros(words, dtype=torch.bool)
        sizes = torch.bincount(word_of, minlength=words)
        for first, run in zip(torch.randperm(words).tolist(), runs, strict=True):
            chosen[first : first + run] = True
            if int(sizes[chosen].sum()) >= budget:
                break
        hidden[row, ordinary[chosen[word_of]]] = True
    return hidden


def word_starts(tokenizer: Any) -> Tensor:
    """The pieces that begin a word, (V,) bool: those with SentencePiece's mark, or those without WordPiece's."""
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    marked = any(piece.startswith("▁") for piece in pieces.values())
    begins = [
        pieces.get(i, "").startswith("▁") if marked else not pieces.get(i, "").startswith("##")
        for i in range(max(pieces) + 1)
    ]
    return torch.tensor(begins)


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


__all__ = ["MaskedTextDataset", "choose_tokens", "drop_contained_lines", "word_starts"]
