"""Finds the likeliest pieces for each [MASK] in a text.

MaskFiller("my-albert")("The film was [MASK].", top_k=3)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.auto import AutoModelForMaskedLM
from .errors import UsageError
from .loading import TextModel


@dataclass(frozen=True)
class Candidate:
    """A piece of the vocabulary for one mask, its probability, and the text with the piece in place of that mask."""

    piece: str
    score: float
    filled: str


class MaskFiller(TextModel):
    """Fills masks with a model that has a masked-language head.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub.
        loading: backend, precision and device; see `TextModel`.

    Raises:
        UsageError: the vocabulary has no mask token.
    """

    head = "masked-language head, which fills masks"

    def __init__(self, checkpoint: str | Path, **loading: Any) -> None:
        super().__init__(AutoModelForMaskedLM, checkpoint, **loading)
        if self.tokenizer.mask_token is None:
            raise UsageError(f"{checkpoint}: its vocabulary has no mask token")
        # In the text, every special token but the mask is plain text.
        special = self.tokenizer.all_special_tokens
        self._split_tokens = [token for token in special if token != self.tokenizer.mask_token]

    def __call__(self, text: str, top_k: int = 5, name: str = "the text") -> list[list[Candidate]]:
        """The `top_k` likeliest pieces for each mask of `text`, the likeliest first.

        Args:
            name: what error messages call the text.

        Raises:
            UsageError: `top_k` is more than the vocabulary holds.
            ValueError: a text without a mask, or with more tokens than the model takes.
        """
        tokenizer = self.tokenizer
        if top_k > tokenizer.vocab_size:
            raise UsageError(f"--top-k {top_k} (top_k=): the vocabulary has {tokenizer.vocab_size} pieces")
        encoded = tokenizer(text, return_tensors="pt", split_special_tokens=self._split_tokens)
        left_out = () if self.takes_types else ("token_type_ids",)
        batch = {key: value.to(self.device) for key, value in encoded.items() if key not in left_out}
        masks = batch["input_ids"] == tokenizer.mask_token_id
        if not masks.any():
            raise ValueError(f"{name}: no {tokenizer.mask_token} in {text!r}; write it where a word is to be found")
        if masks.shape[1] > self.max_length:
            raise ValueError(f"{name}: {masks.shape[1]} tokens, the model takes {self.max_length}")
        with torch.inference_mode():
            logits = self.model(**batch, wanted_tokens=masks).logits  # (masks, vocabulary)
        scores, ids = logits.float().softmax(-1).topk(top_k)
        whole = batch["input_ids"][0].tolist()
        positions = masks[0].nonzero()[:, 0].tolist()
        return [
            [
                Candidate(tokenizer.convert_ids_to_tokens(i), score, self._filled(whole, position, i))
                for i, score in zip(row_ids, row_scores, strict=True)
            ]
            for position, row_ids, row_scores in zip(positions, ids.tolist(), scores.tolist(), strict=True)
        ]

    def _filled(self, ids: list[int], position: int, piece: int) -> str:
        """The text of `ids` without [CLS] and [SEP], with `piece` at `position`."""
        return self.tokenizer.decode([*ids[1:position], piece, *ids[position + 1 : -1]])
