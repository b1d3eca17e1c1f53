"""Scores pairs of texts with a cross-encoder, and ranks texts by how well they answer a query.

TextScorer("my-cross-encoder").rank("who wrote it?", ["A novel by Harper Lee.", "A film."])  # [(0, 0.97), (1, 0.02)]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import sentence_modules
from ..models.auto import AutoModelForSequenceClassification
from .errors import UsageError
from .loading import TextModel, checked_texts, checkpoint_path, progress_bar
from .sentence_steps import activation
from .token_batches import default_batch_tokens


class TextScorer(TextModel):
    """Scores pairs of texts with a classifier of pairs, as `CrossEncoder` of sentence-transformers does, without it.

    A score is what the folder's activation makes of the model's output: the one that config.json or
    config_sentence_transformers.json names, else the sigmoid for a model with one output, and the output itself for more.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub.
        batch_size: most pairs of a batch; None: as many as its tokens allow.
        loading: max_length, backend, precision and device; see `TextModel`.

    Attributes:
        labels: the names of the outputs, in their order.

    Raises:
        UsageError: a folder that gives vectors of texts. ValueError: an activation, a module or a prompt that is not
            applied here; the message names it.
    """

    head, instead = "classifier", "; `albert-fast encode` (TextEncoder) reads it"

    def __init__(self, checkpoint: str | Path, *, batch_size: int | None = None, **loading: Any) -> None:
        folder = checkpoint_path(checkpoint)
        asked = sentence_modules.read(folder if folder.is_dir() else folder.parent)
        if asked is not None:
            if asked.kind == "SentenceTransformer":
                raise UsageError(
                    f"{checkpoint} gives vectors of texts, not scores: TextEncoder (albert-fast encode) reads it"
                )
            if asked.modules:
                raise ValueError(f"{asked.modules[0].name}: {asked.modules[0].kind} is not applied to scores")
            if asked.default_prompt and asked.prompts[asked.default_prompt]:
                raise ValueError(f"{asked.root}: the prompt {asked.default_prompt!r} is not put before pairs")
            folder = asked.encoder if folder.is_dir() else folder
        super().__init__(AutoModelForSequenceClassification, folder, batch_size=batch_size, **loading)
        if asked is not None and asked.max_length is not None and loading.get("max_length") is None:
            self.max_length = min(asked.max_length, self.model.config.longest)
        config = self.model.config
        self.labels: list[str] = [config.label(index) for index in range(config.num_labels)]
        self.activation = activation(_activation_name(asked, config), str(folder))

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Pairs of texts -> scores, float32, in the order of the pairs: (N,) for a model with one output, else (N, labels).

        Memory beside the result does not grow with N. The next pairs are tokenised while the model computes. Where a pair is
        longer than max_length, its longer text is cut.

        Args:
            batch_tokens: tokens that are computed at a time, without padding. Default: what suits the device.
            show_progress: a bar on standard error, in pairs per second; it needs tqdm.

        Raises:
            TypeError: an element that is not two str. ValueError: batch_tokens below 1; half of a surrogate pair in a text.
        """
        checked = checked_texts(pairs)
        single = (index for index, pair in enumerate(checked) if isinstance(pair, str) or pair[1] is None)
        if (alone := next(single, None)) is not None:
            raise TypeError(f"pair {alone} is one text; expected two of them")
        most = default_batch_tokens(self.device) if batch_tokens is None else batch_tokens
        out = np.empty((len(checked), len(self.labels)), dtype=np.float32)
        with torch.inference_mode(), progress_bar(len(checked), show_progress, " pairs") as done:
            for batch in self.token_batches(checked, most):
                logits = self.model.forward_packed(**batch.packed(self.device)).logits
                out[batch.indices] = self.activation(logits.float()).cpu().numpy()
                done(len(batch.indices))
        return out[:, 0] if len(self.labels) == 1 else out

    def rank(self, query: str, texts: Sequence[str], top_k: int | None = None, **how: Any) -> list[tuple[int, float]]:
        """(index of a text, its score with `query`), best first; equal scores in the order of the texts.

        Args:
            top_k: how many to return; None: all.
            how: batch_tokens and show_progress, as `score` takes them.

        Raises:
            ValueError: a model with more than one output; top_k below 1. What `score` raises.
        """
        self.check_ranks()
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected at least 1")
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"texts must be a list of str; it is a {type(texts).__name__}: put it in a list")
        scores = self.score([(query, text) for text in texts], **how)
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [(int(index), float(scores[index])) for index in order]

    def check_ranks(self) -> None:
        """ValueError for a model with more than one output, whose answers have no order."""
        if len(self.labels) != 1:
            raise ValueError(
                f"{self.folder} gives {len(self.labels)} scores, {', '.join(self.labels)}: ranking needs one"
            )


def _activation_name(asked: sentence_modules.SentenceFolder | None, config: Any) -> Any:
    """The activation's class, as the folder names it. Source: `CrossEncoder.get_default_activation_fn`."""
    if asked is not None and asked.activation is not None:
        return asked.activation
    stated = config.extra.get("sentence_transformers")
    if isinstance(stated, dict) and "activation_fn" in stated:
        return stated["activation_fn"]
    older = config.extra.get("sbert_ce_default_activation_function")
    if older is not None:
        return older
    return "torch.nn.Sigmoid" if config.num_labels == 1 else None
