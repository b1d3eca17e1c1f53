"""The baseline that a text classifier must beat: logistic regression on TF-IDF of words and word pairs.

Example:

    python -m albert_fast.training.baseline --train train.tsv --dev dev.tsv --test test.tsv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .data import read_examples
from .distill import read_reviews, spaced
from .metrics import confidence_interval

# Patterns of a word: scikit-learn's default, and everything between spaces ('s and n't included).
WORDS = (r"(?u)\b\w\w+\b", r"\S+")
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Baseline:
    """The model that was best on the dev set: its word pattern, its strength C, and its accuracies."""

    words: str
    strength: float
    dev_accuracy: float
    test_accuracy: float
    test_examples: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the test accuracy."""
        return confidence_interval(round(self.test_accuracy * self.test_examples), self.test_examples)


def train_baseline(
    train_file: str | Path,
    dev_file: str | Path,
    test_file: str | Path,
    reviews_file: str | Path | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> Baseline:
    """Fits a model for each word pattern and strength, and tests the one that is best on the dev set.

    Args:
        reviews_file: more labelled texts to learn from, in the format that `distill` reads.
        strengths: the values of C to try: the larger, the less the weights are held down.

    Raises:
        ImportError: scikit-learn is not installed. ValueError: files that do not fit, see `read_examples`.
    """
    train, dev = read_examples(train_file), read_examples(dev_file)
    texts, labels = list(train.texts), list(train.labels)
    if reviews_file is not None:
        reviews, review_labels = read_reviews(reviews_file)
        texts, labels = [*texts, *map(spaced, reviews)], [*labels, *review_labels]
    models = [_fit(words, strength, texts, labels) for words, strength in product(WORDS, strengths)]
    scores = [float(model.score(dev.texts, dev.labels)) for model in models]
    best = scores.index(max(scores))
    words, strength = list(product(WORDS, strengths))[best]
    test = read_examples(test_file)
    return Baseline(words, strength, scores[best], float(models[best].score(test.texts, test.labels)), len(test.texts))


def _fit(words: str, strength: float, texts: Any, labels: Any) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ImportError("the baseline needs scikit-learn: pip install 'albert-fast[train]'") from error
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=words)
    return make_pipeline(vectorizer, LogisticRegression(C=strength, max_iter=1000)).fit(texts, labels)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m albert_fast.training.baseline", description=__doc__)
    for name in ("train", "dev", "test"):
        parser.add_argument(f"--{name}", required=True, help="labelled text: .tsv, .csv or .jsonl")
    parser.add_argument(
        "--reviews", help="longer labelled texts, .tsv or .tsv.gz without a header: label first, text last"
    )
    options = parser.parse_args(arguments)
    result = train_baseline(options.train, options.dev, options.test, options.reviews)
    low, high = result.interval
    print(f"words {result.words}  C {result.strength:g}  dev accuracy {result.dev_accuracy:.4f}")
    interval = f"95 % interval {low:.4f} to {high:.4f}, n = {result.test_examples}"
    print(f"test accuracy {result.test_accuracy:.4f} ({interval})")


if __name__ == "__main__":
    main()
