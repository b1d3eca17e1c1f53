"""Answers questions with spans of their contexts, with a trained question answering model.

QuestionAnswerer("my-answerer")([("Who wrote it?", "A novel by Harper Lee.")])  # [Answer("Harper Lee", 11, 21, 0.97)]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.auto import AutoModelForQuestionAnswering
from ..text.spans import best_spans, context_rows, trimmed
from .loading import TextModel, checked_texts
from .token_batches import batches_of_rows, default_batch_tokens

# Questions that are tokenized at a time: memory beside the answers does not grow with their number.
QUESTIONS = 256


class Answer(NamedTuple):
    """Characters start..end of a context, and the probability of the answer. text is "" where the context has no answer."""

    text: str
    start: int
    end: int
    score: float


class QuestionAnswerer(TextModel):
    """Finds the answer to a question in its context. A long context is computed in windows that overlap.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub.
        may_be_absent: whether a context may have no answer; None: as the training set had it, which config.json states.
        longest: tokens of an answer, at most.
        loading: max_length, batch_size, backend, precision and device; see `TextModel`.
    """

    head, instead = "head for answers", ""

    def __init__(
        self, checkpoint: str | Path, *, may_be_absent: bool | None = None, longest: int = 30, **loading: Any
    ) -> None:
        super().__init__(AutoModelForQuestionAnswering, checkpoint, **loading)
        stated = bool(getattr(self.model.config, "answer_may_be_absent", False))
        self.may_be_absent = stated if may_be_absent is None else may_be_absent
        self.longest = longest

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
        """(question, context) -> the answer to each.

        Raises:
            TypeError: an element that is not two str. ValueError: half of a surrogate pair in a text.
        """
        checked = checked_texts(pairs)
        alone = (index for index, pair in enumerate(checked) if isinstance(pair, str) or pair[1] is None)
        if (index := next(alone, None)) is not None:
            raise TypeError(f"pair {index} is one text; expected a question and a context")
        found: list[Answer] = []
        for first in range(0, len(checked), QUESTIONS):
            found += self._answers([(str(pair[0]), str(pair[1])) for pair in checked[first : first + QUESTIONS]])
        return found

    def _answers(self, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
        rows = context_rows(self.tokenizer, pairs, self.max_length)
        types = rows.types if self.takes_types else None
        scores: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(rows.ids)
        with torch.inference_mode():
            for batch in batches_of_rows(rows.ids, types, default_batch_tokens(self.device), self.batch_size):
                out = self.model.forward_packed(**batch.packed(self.device))
                starts, ends = (part.float().cpu().split(batch.lengths) for part in (out.start_logits, out.end_logits))
                for row, start, end in zip(batch.indices, starts, ends, strict=True):
                    scores[row] = start.numpy(), end.numpy()
        spans = best_spans(rows, scores, len(pairs), longest=self.longest, may_be_absent=self.may_be_absent)
        answers = []
        for (_, context), span in zip(pairs, spans, strict=True):
            start, end, score = trimmed(context, span)
            answers.append(Answer(context[start:end], start, end, score))
        return answers
