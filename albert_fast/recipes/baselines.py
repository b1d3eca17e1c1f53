"""Simple answers to the tasks of tasks.py, for a model to be compared with; the settings of those that learn are chosen on dev."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..text.documents import split_sentences
from ..training.metrics import METRICS, answer_metrics, tag_metrics
from .task_texts import Row, Split

Baseline = Callable[[Split], float]
# Patterns of a word: scikit-learn's, and one that keeps short words, endings and marks.
WORDS = (r"(?u)\b\w\w+\b", r"\w+(?:'\w+)?|[^\w\s]")
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)  # of logistic regression: the larger, the less the weights are held down
OUTSIDE = "O"


class LinearModel:
    """Logistic regression on TF-IDF of words or characters and pairs of them; the best on `dev` of several settings.

    Args:
        train, dev: rows with text and label. metric: of METRICS. unit: "word" or "char".

    Attributes:
        settings: the pattern of a word, and the strength C.
    """

    def __init__(
        self, train: list[Row], dev: list[Row], metric: str, unit: str = "word", strengths: Sequence[float] = STRENGTHS
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.metric, best = METRICS[metric], -math.inf
        texts, labels = [row["text"] for row in train], [row["label"] for row in train]
        for pattern in WORDS if unit == "word" else (None,):
            vectorizer = TfidfVectorizer(analyzer=unit, ngram_range=(1, 2), token_pattern=pattern)
            features = vectorizer.fit_transform(texts)
            for strength in strengths:
                classifier = LogisticRegression(C=strength, max_iter=1000).fit(features, labels)
                model = make_pipeline(vectorizer, classifier)
                if (score := self._measured(model, dev)) > best:
                    best, self.model = score, model
                    self.settings = {"words": pattern, "C": strength}

    def _measured(self, model: Any, rows: list[Row]) -> float:
        labels = np.array([row["label"] for row in rows])
        return float(self.metric(labels, model.predict([row["text"] for row in rows])))

    def measured(self, rows: list[Row]) -> float:
        """The metric on rows."""
        return self._measured(self.model, rows)


def linear_model(metric: str, unit: str = "word") -> Baseline:
    """A `LinearModel` on the test set."""
    return lambda split: LinearModel(split.train, split.dev, metric, unit).measured(split.test)


def cosine_of_words(split: Split) -> float:
    """Spearman's correlation of the cosine of both texts' TF-IDF of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer().fit(row[side] for row in split.train for side in ("text", "text_pair"))
    one, other = (vectorizer.transform(row[side] for row in split.test) for side in ("text", "text_pair"))
    cosines = np.asarray(one.multiply(other).sum(axis=1)).ravel()
    return METRICS["spearman"](np.array([row["label"] for row in split.test]), cosines)


def known_entities(split: Split) -> float:
    """Entity F1 of the entities of the training text, found again word by word, the longest first."""
    kinds: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in split.train:
        for first, last, kind in _entities(row["tags"]):
            kinds[tuple(word.lower() for word in row["tokens"][first:last])][kind] += 1
    longest = max(map(len, kinds), default=0)
    predicted = []
    for row in split.test:
        words, tags, place = [word.lower() for word in row["tokens"]], [], 0
        while place < len(words):
            found = (length for length in range(longest, 0, -1) if tuple(words[place : place + length]) in kinds)
            length = min(next(found, 0), len(words) - place)
            kind = kinds[tuple(words[place : place + length])].most_common(1)[0][0] if length else ""
            tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1)] if length else [OUTSIDE]
            place += length or 1
        predicted.append(tags)
    return tag_metrics(["f1"], [row["tags"] for row in split.test], predicted)["f1"]


def _entities(tags: list[str]) -> list[tuple[int, int, str]]:
    """(first, last + 1, kind) of the entities in tags of the form B-kind, I-kind, O."""
    found: list[tuple[int, int, str]] = []
    for place, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "I" and found and found[-1][1:] == (place, kind):
            found[-1] = found[-1][0], place + 1, kind
        elif mark != OUTSIDE:
            found.append((place, place + 1, kind))
    return found


def no_answer(split: Split) -> float:
    """F1 of finding no question answered."""
    return _answers_f1(split, [""] * len(split.test))


def likest_sentence(split: Split) -> float:
    """F1 of the sentence that has most words of the question."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    return _answers_f1(
        split,
        [
            max(split_sentences(row["context"]), key=lambda sentence: len(words(sentence) & asked))
            for row in split.test
            for asked in [words(row["question"])]
        ],
    )


def _answers_f1(split: Split, written: list[str]) -> float:
    expected = [[answer["text"] for answer in row["answers"]] for row in split.test]
    return answer_metrics(["f1"], expected, written)["f1"]


__all__ = [
    "Baseline",
    "LinearModel",
    "cosine_of_words",
    "known_entities",
    "likest_sentence",
    "linear_model",
    "no_answer",
]
