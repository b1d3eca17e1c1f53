"""Translates texts, or rewrites them in another way that a model with an encoder and a decoder has learnt.

Translator("my-translator").translate(["Two dogs play in the snow."])  # ["Zwei Hunde spielen im Schnee."]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..generation.options import MAX_NEW_TOKENS, GenerationOptions
from ..layers.inputs import Inputs
from ..models.seq2seq import ALBERTForConditionalGeneration
from .errors import UsageError
from .loading import TextModel, checked_texts
from .token_batches import default_batch_tokens


class Translator(TextModel):
    """Writes a text for each text.

    Args:
        checkpoint: a folder that `train --task translation` or `ALBERTForConditionalGeneration.save_pretrained` wrote, with a
            tokenizer; or its name on the Hugging Face hub.
        loading: max_length of the sources, batch_size, backend, precision and device; see `TextModel`.
    """

    head = "decoder, which writes translations"

    def __init__(self, checkpoint: str | Path, **loading: Any) -> None:
        super().__init__(ALBERTForConditionalGeneration, checkpoint, **loading)

    def translate(
        self, texts: Sequence[str], *, num_beams: int = 4, max_new_tokens: int | None = None, **options: Any
    ) -> list[str]:
        """The translation of each text, in order; of a text without a word it is empty.

        Texts of similar length are translated together. The next texts are tokenised while the model computes.

        Args:
            num_beams: hypotheses that beam search keeps; 1: the likeliest token each time.
            max_new_tokens: most tokens of a translation; None: 256, or as many as the model has positions.
            options: length_penalty, early_stopping, do_sample, temperature, top_k, top_p: see `GenerationOptions`.

        Raises:
            TypeError: a text that is not a str, or one str in place of a list. ValueError: half of a surrogate pair in a text,
                options that do not go together. UsageError: more new tokens than the model has positions.
        """
        how = self.options(num_beams=num_beams, max_new_tokens=max_new_tokens, **options)
        checked = checked_texts(texts)
        for index, text in enumerate(checked):
            if not isinstance(text, str):
                raise TypeError(f"text {index} is two texts; a translation has one source")
        answers = [""] * len(checked)
        chosen = [index for index, text in enumerate(checked) if text.strip()]  # type: ignore[union-attr]
        with torch.inference_mode():
            for batch in self.token_batches([checked[i] for i in chosen], default_batch_tokens(self.device)):
                written = self.model.write(Inputs(None)._replace(**batch.packed(self.device)), how)
                for index, ids in zip(batch.indices, written, strict=True):
                    answers[chosen[index]] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return answers

    __call__ = translate

    def options(self, *, max_new_tokens: int | None = None, **options: Any) -> GenerationOptions:
        """The options of a search, checked for this model.

        Raises:
            ValueError, TypeError: as `GenerationOptions`. UsageError: more new tokens than the model has positions.
        """
        positions: int = self.model.config.longest
        if max_new_tokens is not None and max_new_tokens > positions:
            raise UsageError(
                f"--max-new-tokens {max_new_tokens} (max_new_tokens=): the model has {positions} positions"
            )
        return GenerationOptions(
            min(MAX_NEW_TOKENS, positions) if max_new_tokens is None else max_new_tokens, **options
        )
