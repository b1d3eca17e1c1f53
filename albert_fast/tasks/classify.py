"""Labels texts with a trained classifier, or predicts numbers with a regression model.

TextClassifier()(["What a joy."])  # [{"negative": 0.01, "positive": 0.99}]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.weights import shipped_model
from ..models.auto import AutoModelForSequenceClassification
from ..text.batching import TextPair
from .loading import TextModel, checked_texts
from .token_batches import default_batch_tokens


class TextClassifier(TextModel):
    """Gives every text a score for each label.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub; default: the sentiment classifier in this package.
        loading: max_length, batch_size, backend, precision and device; see `TextModel`.

    Attributes:
        labels: the names of the labels, in the order of their ids.
    """

    head, instead = "classifier", "; `albert-fast encode` (TextEncoder) reads it"

    def __init__(self, checkpoint: str | Path | None = None, **loading: Any) -> None:
        super().__init__(AutoModelForSequenceClassification, checkpoint or shipped_model(), **loading)
        self.labels: list[str] = [self.model.config.label(index) for index in range(self.model.config.num_labels)]

    def __call__(self, texts: Sequence[str | TextPair]) -> list[dict[str, float]]:
        """Texts, or (text, second text or None) -> {label: score} for each; scores are probabilities, or a regression's value.

        Memory beside the answers does not grow with the number of texts. The next texts are tokenised while the model computes.

        Raises:
            TypeError: a text that is not a str, or one str in place of a list. ValueError: half of a surrogate pair in a text.
        """
        checked = checked_texts(texts)
        answers: list[dict[str, float]] = [{} for _ in checked]
        with torch.inference_mode():
            for batch in self.token_batches(checked, default_batch_tokens(self.device)):
                logits = self.model.forward_packed(**batch.packed(self.device)).logits
                for index, scores in zip(batch.indices, self._scores(logits).tolist(), strict=True):
                    answers[index] = dict(zip(self.labels, scores, strict=True))
        return answers

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (B, labels) -> probabilities, or the values of a regression."""
        problem, logits = self.model.config.problem_type, logits.float()
        if problem == "regression" or (problem is None and len(self.labels) == 1):
            return logits
        return logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)


def best_label(scores: dict[str, float]) -> str:
    """The label with the highest score."""
    return max(scores, key=scores.__getitem__)
