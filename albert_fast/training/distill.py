"""Makes soft labels for a small model that is trained from scratch: linear models label recombined training text.

    python -m albert_fast.training.distill train.tsv soft.jsonl --examples 240000 --seed 0
    python -m albert_fast.training.distill train.tsv soft.jsonl --reviews reviews.tsv.gz --examples 340000

From some ten thousand lines, a transformer with random weights learns too little about each word. Linear models learn
that well. So they label many more texts, which are made of pieces of the same lines, and the transformer learns from all
of them. Only the training file is used, unless reviews are given: longer labelled texts of the same kind. Then one more
linear model learns from the reviews, and their sentences take the place of the recombined texts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.files import replacing
from .data import read_examples

LONG = 8  # words; only lines of at least this many are cut and joined
MOST = 30  # words in a cut
CHUNK = 20_000  # texts that are labelled at once; bounds the memory for the character features


class LinearTeacher:
    """The mean of three logistic regressions for two or more classes.

    Their features are: TF-IDF of words and word pairs; the same, binary and scaled by naive Bayes' log-count ratios (Wang
    and Manning 2012, section 2.3; only for two classes); and TF-IDF of runs of 2 to 5 characters.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        """Fits the members to texts and their classes 0..C-1. ImportError: scikit-learn is not installed."""
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

    def learn_more(self, texts: Sequence[str], labels: np.ndarray) -> None:
        """Adds a member that is fitted to other texts (TF-IDF of words and word pairs), with as many votes as all others."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", min_df=2, sublinear_tf=True)
        self.members += [_fit(vectorizer, texts, labels, 10.0)] * len(self.members)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """N texts -> probabilities (N, C)."""
        chunks = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
        return np.concatenate([np.mean([member(chunk) for member in self.members], axis=0) for chunk in chunks])


def _fit(
    vectorizer: Any, texts: Sequence[str], labels: np.ndarray, strength: float, bayes: bool = False
) -> Callable[[Sequence[str]], np.ndarray]:
    """Fits one member; returns its function from texts to probabilities."""
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
    """Makes new texts from pieces of `texts`.

    There are three kinds, 2 : 2 : 1: a run of words from a long line; the start of one long line joined to the end of
    another; and any two lines in a row.
    """
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


def read_reviews(path: str | Path) -> tuple[list[str], list[int]]:
    """Reads texts and labels from a TSV file without a header, plain or .gz: the label first, the text last."""
    opener: Callable[..., Any] = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return [re.sub(r"<br\s*/?>", " ", row[-1]) for row in rows], [int(row[0]) for row in rows]


def spaced(text: str) -> str:
    """Writes a text as SST-2 does: lower case, spaces around marks and before endings such as n't and 's."""
    text = re.sub(r"([.,!?;:()\"])", r" \1 ", text.lower())
    return " ".join(re.sub(r"'(s|re|ve|ll|d|m)\b", r" '\1", re.sub(r"n't\b", " n't", text)).split())


def sentences(reviews: Sequence[str], examples: int, seed: int) -> list[str]:
    """Draws up to `examples` sentences of 3 to 40 words from the reviews."""
    found = [spaced(sentence) for review in reviews for sentence in re.split(r"(?<=[.!?])\s+", review)]
    found = [sentence for sentence in found if 3 <= len(sentence.split()) <= 40]
    random.Random(seed).shuffle(found)
    return found[:examples]


def write_soft_labels(
    train_file: str | Path, output: str | Path, *, examples: int, seed: int = 0, reviews_file: str | Path | None = None
) -> int:
    """Writes a JSONL file for `fit`, with {"text": ..., "label": [probability of each class]} on each line.

    It holds the training lines, labelled half by their own label and half by the teacher (with reviews: twice), then
    `examples` recombined texts (or sentences of the reviews), labelled by the teacher.

    Returns:
        The number of lines.

    Raises:
        ValueError: the labels are not classes.
    """
    train = read_examples(train_file)
    if train.label_names is None:
        raise ValueError(f"{train_file}: soft labels are for classes, its labels are numbers to predict")
    texts = [" ".join(str(text).split()) for text in train.texts]
    teacher = LinearTeacher(texts, train.labels)
    labels = np.asarray(train.labels)
    if reviews_file is None:
        more = recombine(texts, examples, seed)
    else:
        reviews, review_labels = read_reviews(reviews_file)
        teacher.learn_more([*texts, *map(spaced, reviews)], np.concatenate([labels, review_labels]))
        more = sentences(reviews, examples, seed)
        texts, labels = texts * 2, np.tile(labels, 2)
    given = np.eye(len(train.label_names))[labels]
    soft = np.concatenate([(given + teacher(texts)) / 2, teacher(more)])
    with replacing(Path(output)) as file:
        for text, label in zip([*texts, *more], soft.tolist(), strict=True):
            row = {"text": text, "label": [round(p, 4) for p in label]}
            file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
    return len(soft)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m albert_fast.training.distill", description=__doc__)
    parser.add_argument("train", help="labelled text: .tsv, .csv or .jsonl")
    parser.add_argument("output", help=".jsonl to write")
    parser.add_argument("--examples", type=int, default=240_000, help="recombined texts (default: %(default)s)")
    parser.add_argument(
        "--reviews", help="longer labelled texts, .tsv or .tsv.gz without a header: label first, text last"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    count = write_soft_labels(
        options.train, options.output, examples=options.examples, seed=options.seed, reviews_file=options.reviews
    )
    print(f"{options.output}: {count} texts")


if __name__ == "__main__":
    main()
