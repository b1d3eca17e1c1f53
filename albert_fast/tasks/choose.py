"""Chooses the text that continues or answers a first one best, with a trained multiple choice model.

TextChooser("my-chooser")([("She opened the", ["door.", "sky."])])  # [[0.98, 0.02]]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.saving import config_path
from ..models.auto import AutoModelForMultipleChoice, config_of
from .errors import UsageError
from .loading import TextModel, checked_texts, checkpoint_path
from .token_batches import default_batch_tokens


class TextChooser(TextModel):
    """Gives every choice a probability. A text and a choice that are longer than the model takes are cut.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub.
        loading: max_length, batch_size, backend, precision and device; see `TextModel`.

    Raises:
        UsageError: the checkpoint is for another task.
    """

    head, instead = "head for choices", ""

    def __init__(self, checkpoint: str | Path, **loading: Any) -> None:
        folder = checkpoint_path(checkpoint)
        stated = config_of(folder).architectures if config_path(folder).is_file() else None
        # By its name: the classifiers of other tasks have tensors of the same names.
        if stated and not str(stated[0]).endswith("ForMultipleChoice"):
            raise UsageError(f"{checkpoint} does not choose between texts: its config.json names the class {stated[0]}")
        super().__init__(AutoModelForMultipleChoice, folder, **loading)

    def __call__(self, examples: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """(first text, choices) -> the probability of each choice. Numbers of choices may differ.

        Raises:
            TypeError: a text that is not a str. ValueError: an example without a choice; half of a surrogate pair in a text.
        """
        if (empty := next((place for place, (_, choices) in enumerate(examples) if not choices), None)) is not None:
            raise ValueError(f"example {empty} has no choices")
        pairs = checked_texts([(first, choice) for first, choices in examples for choice in choices])
        scores = torch.empty(len(pairs), dtype=torch.float32)
        with torch.inference_mode():
            for batch in self.token_batches(pairs, default_batch_tokens(self.device)):
                logits = self.model.forward_packed(**batch.packed(self.device)).logits
                scores[batch.indices] = logits[:, 0].float().cpu()
        return [own.softmax(0).tolist() for own in scores.split([len(choices) for _, choices in examples])]
