"""Tags the words of texts, and finds the entities in them, with a trained token classifier.

TextTagger("my-tagger")(["Anna lives in Bern."])  # [[Entity("person", "Anna", 0, 4, 0.99), Entity("place", "Bern", 14, 18, 0.98)]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.auto import AutoModelForTokenClassification
from ..text.words import OUTSIDE, entities, marks_entities, word_rows, words_of
from .errors import UsageError
from .loading import TextModel, checked_texts
from .token_batches import batches_of_rows, default_batch_tokens

# Sentences that are tokenized at a time: memory beside the answers does not grow with their number.
SENTENCES = 1024


class Entity(NamedTuple):
    """A part of a text with its kind: characters start..end, and the mean probability of its words' tags."""

    kind: str
    text: str
    start: int
    end: int
    score: float


class WordTag(NamedTuple):
    """A word's tag and its probability."""

    tag: str
    score: float


class TextTagger(TextModel):
    """Tags every word of a text. A text that is longer than the model takes is computed in windows that overlap.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub.
        loading: max_length, batch_size, backend, precision and device; see `TextModel`.

    Attributes:
        labels: the tags, in the order of their ids.
        finds_entities: whether they are those of entities (B-, I-, O).

    Raises:
        UsageError: the checkpoint has no classifier of tokens.
    """

    head, instead = "token classifier", ""

    def __init__(self, checkpoint: str | Path, **loading: Any) -> None:
        super().__init__(AutoModelForTokenClassification, checkpoint, **loading)
        config = self.model.config
        stated = (config.architectures or ["ForTokenClassification"])[0]
        if str(stated).endswith("ForSequenceClassification"):  # its classifier has the same name
            raise UsageError(
                f"{checkpoint} labels whole texts, not words: `albert-fast classify` (TextClassifier) reads it"
            )
        self.labels: list[str] = [config.label(index) for index in range(config.num_labels)]
        self.finds_entities = marks_entities(self.labels)

    def __call__(self, texts: Sequence[str]) -> list[list[Entity]]:
        """The entities of each text, in their order; for other tags every word with its tag as its kind.

        Words are split at spaces and punctuation, as `albert_fast.text.words` does.

        Raises:
            TypeError: a text that is not a str, or one str in place of a list. ValueError: half of a surrogate pair in a text.
        """
        checked = checked_texts(texts)
        if (pair := next((i for i, text in enumerate(checked) if not isinstance(text, str)), None)) is not None:
            raise TypeError(f"text {pair} is two texts; words of one text are tagged at a time")
        found = []
        for first in range(0, len(checked), SENTENCES):
            part = [str(text) for text in checked[first : first + SENTENCES]]
            spans = [words_of(text) for text in part]
            tags = self.tags([[text[a:b] for a, b in own] for text, own in zip(part, spans, strict=True)])
            found += [self._entities(*one) for one in zip(part, spans, tags, strict=True)]
        return found

    def tags(self, sentences: Sequence[Sequence[str]]) -> list[list[WordTag]]:
        """The tag of each word of sentences that are split already; a word without a token is outside of every entity.

        Raises:
            ValueError: half of a surrogate pair in a word.
        """
        outside = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        found = [[WordTag(outside, 1.0)] * len(words) for words in sentences]
        for first in range(0, len(sentences), SENTENCES):
            for sentence, word, tag in self._computed(sentences[first : first + SENTENCES]):
                found[first + sentence][word] = tag
        return found

    def _computed(self, sentences: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, WordTag]]:
        rows = word_rows(self.tokenizer, sentences, self.max_length)
        types = [[0] * len(ids) for ids in rows.ids] if self.takes_types else None
        with torch.inference_mode():
            for batch in batches_of_rows(rows.ids, types, default_batch_tokens(self.device), self.batch_size):
                wanted = torch.zeros(len(batch.ids), dtype=torch.bool)
                starts = batch.cu_seqlens.tolist()
                for row, start in zip(batch.indices, starts, strict=False):
                    wanted[[start + column for column in rows.columns[row]]] = True
                if not bool(wanted.any()):
                    continue
                logits = self.model.forward_packed(
                    **batch.packed(self.device), wanted_tokens=wanted.to(self.device)
                ).logits
                scores, tags = logits.float().softmax(-1).max(-1)
                values = iter(zip(tags.tolist(), scores.tolist(), strict=True))
                for row in batch.indices:
                    # The scores come column by column, as the words of a row do.
                    for word in rows.words[row]:
                        tag, score = next(values)
                        yield rows.sentence[row], word, WordTag(self.labels[tag], score)

    def _entities(self, text: str, spans: Sequence[tuple[int, int]], tags: Sequence[WordTag]) -> list[Entity]:
        if self.finds_entities:
            groups = entities([one.tag for one in tags])
        else:
            groups = [(one.tag, place, place + 1) for place, one in enumerate(tags)]
        found = []
        for kind, first, last in groups:
            start, end = spans[first][0], spans[last - 1][1]
            score = sum(one.score for one in tags[first:last]) / (last - first)
            found.append(Entity(kind, text[start:end], start, end, score))
        return found
