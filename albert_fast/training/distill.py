"""Soft labels for a small model that is trained from scratch: linear models teach it on recombined training text.

    python -m albert_fast.training.distill train.tsv soft.jsonl --examples 240000 --seed 0

A transformer with random weights learns too little from some ten thousand lines about what each word is worth. Linear
models learn that well, but only for the lines as they stand. So they label many more texts, made of pieces of the same
lines, and the transformer learns from all of them. Nothing but the training file enters.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data import read_examples

LONG = 8  # words; lines of at least this many are cut and joined
MOST = 30  # words of a cut
CHUNK = 20_000  # texts that are labelled at once, which bounds the memory of the character features


class LinearTeacher:
    """The mean of three logistic regressions for two or more classes.

    Over TF-IDF of words and word pairs; over the same, binary and scaled by naive Bayes' log-count ratios (Wang and
    Manning 2012, section 2.3; two classes only); and over TF-IDF of runs of 2 to 5 characters.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        """texts and their classes 0..C-1. ImportError: scikit-learn is not installed."""
        try:
            from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
        except ImportError as error:
            raise ImportError("the teacher needs scikit-learn: pip install 'albert-fast[train]'") from error
        classes = np.asarray(labels)
        words: dict[str, Any] = {"ngram_range": (1, 2), "token_pattern": r"\S+"}
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)
        self.members = [
            _fit(TfidfVectorizer(**words), texts, classes, 10.0),
            _fit(characters, texts, classes, 3.0),
        ]
        if set(labels) == {0, 1}:
            self.members.append(_fit(CountVectorizer(binary=True, **words), texts, classes, 0.1, bayes=True))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """N texts -> probabilities (N, C)."""
        chunks = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
        return np.concatenate([np.mean([member(chunk) for member in self.members], axis=0) for chunk in chunks])


def _fit(
    vectorizer: Any, texts: Sequence[str], labels: np.ndarray, strength: float, bayes: bool = False
) -> Callable[[Sequence[str]], np.ndarray]:
    """One member: texts -> probabilities."""
    from sklearn.linear_model import LogisticRegression

    features = vectorizer.fit_transform(texts)
    ratio = np.ones(features.shape[1])
    if bayes:
        one, zero = (np.asarray(features[labels == label].sum(0)).ravel() + 1.0 for label in (1, 0))
        ratio = np.log(one / one.sum()) - np.log(zero / zero.sum())
    model = LogisticRegression(C=strength, max_iter=1000).fit(features.multiply(ratio).tocsr(), labels)

    def probabilities(more: Sequence[str]) -> np.ndarray:
        return np.asarray(model.predict_proba(vectorizer.transform(more).multiply(ratio).tocsr()))

    return probabilities


def recombine(texts: Sequence[str], examples: int, seed: int) -> list[str]:
    """New texts out of pieces of `texts`: runs of words from long lines, the start of one joined to the end of another,
    and any two lines in a row; 2 : 2 : 1."""
    generator = random.Random(seed)
    long = [words for words in (text.split() for text in texts) if len(words) >= LONG]
    if not long:
        raise ValueError(f"no line of {LONG} words or more to cut")
    made = []
    for kind in generator.choices(("run", "cross", "pair"), weights=(2, 2, 1), k=examples):
        if kind == "pair":
            words = f"{generator.choice(texts)} {generator.choice(texts)}".split()
        else:
            words = generator.choice(long)
            start = generator.randrange(len(words) - 2)
            if kind == "run":
                words = words[start : start + generator.randint(3, MOST)]
            else:
                other = generator.choice(long)
                words = words[: start + 1] + other[generator.randrange(len(other)) :]
        made.append(" ".join(words))
    return made


def write_soft_labels(train_file: str | Path, output: str | Path, *, examples: int, seed: int = 0) -> int:
    """Writes a JSONL file for `fit`: the training lines, their labels half the given ones and half the teacher's, and
    `examples` recombined texts with the teacher's labels, each {"text": ..., "label": [probability of each class]}.

    Returns the number of lines. ValueError: labels that are no classes, pairs of texts.
    """
    train = read_examples(train_file)
    if train.label_names is None:
        raise ValueError(f"{train_file}: soft labels are for classes, its labels are numbers to predict")
    texts = [" ".join(str(text).split()) for text in train.texts]
    teacher = LinearTeacher(texts, train.labels)  # type: ignore[arg-type]
    given = np.eye(len(train.label_names))[np.asarray(train.labels)]
    more = recombine(texts, examples, seed)
    soft = np.concatenate([(given + teacher(texts)) / 2, teacher(more)])
    with Path(output).open("w", encoding="utf-8") as file:
        for text, label in zip([*texts, *more], soft.tolist(), strict=True):
            file.write(json.dumps({"text": text, "label": [round(p, 4) for p in label]}, ensure_ascii=False) + "\n")
    return len(soft)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m albert_fast.training.distill", description=__doc__)
    parser.add_argument("train", help="labelled text: .tsv, .csv or .jsonl")
    parser.add_argument("output", help=".jsonl to write")
    parser.add_argument("--examples", type=int, default=240_000, help="recombined texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    count = write_soft_labels(options.train, options.output, examples=options.examples, seed=options.seed)
    print(f"{options.output}: {count} texts")


if __name__ == "__main__":
    main()
