"""Batches of real length: 32 texts each of SST-2 (sentences), aclImdb (reviews) and traffic that mixes both; phonemes.

Where the texts are present (`albert_fast.testing.data_dir()`) the batches are their real ids, by the vocabulary of the
English ALBERT v2 release. Elsewhere lengths.json, the numbers of tokens of the very same texts, is filled with random
ids: speed depends on the lengths alone. `python benchmarks/shared/lengths.py` writes lengths.json anew from the texts.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from albert_fast.testing import data_dir

COMMITTED = Path(__file__).with_name("lengths.json")
MAX_LENGTH = 512
FIRST_ORDINARY_ID = 5  # below: <pad>, <unk>, [CLS], [SEP], [MASK]
_VOCABULARY = Path("vocab/albert-en-30k.spiece.model")
_SEED = 0


def _sst2(folder: Path, split: str = "test") -> list[str]:
    with open(folder / f"SST-2/{split}.tsv", encoding="utf-8") as file:
        return [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]


def reviews(split: str = "test") -> list[str]:
    """The film reviews of aclImdb in the folder of data."""
    with gzip.open(data_dir() / f"aclImdb/{split}.tsv.gz", "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t")[3] for line in file]


_TEXTS: dict[str, Callable[[Path], list[str]]] = {"sst2": _sst2, "imdb": lambda folder: reviews()}
# Batch -> the number of texts from each source.
BATCHES = {"sst2-32": {"sst2": 32}, "imdb-32": {"imdb": 32}, "mixed-32": {"sst2": 24, "imdb": 8}}


def batch(name: str, vocab_size: int) -> list[list[int]]:
    """Ids of each of the 32 texts of `name` (a key of BATCHES), [CLS] and [SEP] included, at most 512 of them.

    Raises:
        ValueError: lengths.json does not hold the lengths of the texts that are there.
    """
    lengths = json.loads(COMMITTED.read_text())["batches"][name]
    if not (data_dir() / _VOCABULARY).exists():
        return _random(lengths, vocab_size, random.Random(_SEED))
    ids = _sample(name)
    if [len(row) for row in ids] != lengths:
        raise ValueError(
            f"{COMMITTED.name} holds other lengths than the texts for {name}: run `python benchmarks/shared/lengths.py`"
        )
    return ids


def calibration(count: int, vocab_size: int) -> list[list[int]]:
    """Ids of `count` sentences of SST-2's training split; random ids of the same lengths where the texts are absent."""
    draw = random.Random(f"{_SEED} calibration")
    if not (data_dir() / _VOCABULARY).exists():
        lengths = json.loads(COMMITTED.read_text())["batches"]["sst2-32"]
        return _random(draw.choices(lengths, k=count), vocab_size, draw)
    return _tokenized(draw.sample(_sst2(data_dir(), "train"), count))


def phonemes(start: int, count: int) -> list[list[int]]:
    """Ids of the phoneme sequences `start` to `start + count` of plbert/, in an order drawn once.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    symbols = json.loads((data_dir() / "plbert/vocab.json").read_text(encoding="utf-8"))["vocab"]
    # Without repeats, so that no measured sequence was calibrated on.
    lines = list(dict.fromkeys((data_dir() / "plbert/phonemes.txt").read_text(encoding="utf-8").splitlines()))
    random.Random(f"{_SEED} phonemes").shuffle(lines)
    return [[0, *(symbols[symbol] for symbol in line), 0] for line in lines[start : start + count]]


def _random(lengths: Sequence[int], vocab_size: int, draw: random.Random) -> list[list[int]]:
    return [[draw.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(length)] for length in lengths]


@cache
def _sample(name: str) -> list[list[int]]:
    draw = random.Random(f"{_SEED} {name}")
    texts = [text for source, count in BATCHES[name].items() for text in draw.sample(_TEXTS[source](data_dir()), count)]
    draw.shuffle(texts)
    return _tokenized(texts)


def _tokenized(texts: list[str]) -> list[list[int]]:
    from albert_fast.text.tokenizer import load_tokenizer

    ids: list[list[int]] = load_tokenizer(data_dir() / _VOCABULARY)(texts, max_length=MAX_LENGTH)["input_ids"]
    return ids


def write() -> None:
    """Write lengths.json from the texts; FileNotFoundError names what is missing."""
    content = {
        "source": "Tokens per text, [CLS] and [SEP] counted, cut at 512, 30k vocabulary of English ALBERT v2. "
        "sst2: GLUE SST-2, labelled development set. imdb: Large Movie Review Dataset (Maas et al. 2011), test split. "
        "mixed: 24 of the former and 8 of the latter. Drawn at random with a fixed seed by benchmarks/shared/lengths.py.",
        "batches": {name: [len(row) for row in _sample(name)] for name in BATCHES},
    }
    COMMITTED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write()
