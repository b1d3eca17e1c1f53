"""Recipes: what they read from raw files, that a stage is done once, and a whole run in small."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from albert_fast.recipes import english, english_texts, multi30k
from albert_fast.recipes.report import Report

WORDS = {0: ["awful", "dull", "boring", "a mess"], 1: ["superb", "lovely", "touching", "a joy"]}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of data sets in the formats of the real ones, of made-up sentences."""
    rng = np.random.default_rng(3)
    data = tmp_path / "data"
    for name in ("aclImdb", "SST-2", "wikitext-2", "SubjQA"):
        (data / name).mkdir(parents=True)

    def opinion(label: int) -> str:
        subjects, words = ("film", "plot", "cast", "music", "end"), WORDS[label]
        return f"the {subjects[rng.integers(5)]} is {words[rng.integers(4)]}"

    for part, count in (("train", 40), ("test", 16), ("unsup", 20)):
        with gzip.open(data / "aclImdb" / f"{part}.tsv.gz", "wt", encoding="utf-8") as file:
            for number in range(count):
                label = number * 2 // count
                text = "<br />".join(f"{opinion(label).capitalize()}." for _ in range(3))
                file.write(f"{-1 if part == 'unsup' else label}\t7\t{part}/{number}\t{text}\n")
    for part, count in (("train", 30), ("dev", 12), ("test", 12)):
        lines = [f"{opinion(number % 2)} , it 's true \t{number % 2}" for number in range(count)]
        (data / "SST-2" / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    for part in ("valid", "test"):
        article = f" \n = {part} = \n \n The <unk> is 1 @,@ 000 years old . \n \n = = Life = = \n \n It 's well @-@ known . \n"
        (data / "wikitext-2" / f"{part}.txt").write_text(article * 2)
    with (data / "SubjQA" / "electronics.train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "review"])
        writer.writerows([["How is it?", "Works well. ANSWERNOTFOUND"]] * 2)
    return data


@pytest.mark.parametrize(
    ("apart", "together"),
    [
        ("it does n't work , does it ?", "it doesn't work, does it?"),
        ("they 've seen the town 's ( old ) walls .", "they've seen the town's (old) walls."),
        ("`` a -lrb- b -rrb- ''", "`` a (b) ''"),
    ],
)
def test_what_treebanks_write_apart_is_joined(apart: str, together: str) -> None:
    assert english_texts.joined(apart) == together


def test_documents_and_opinions(raw: Path, tmp_path: Path) -> None:
    texts = {}
    for file in english_texts.write_documents(raw, tmp_path / "texts"):
        texts[file.name] = gzip.decompress(file.read_bytes()).decode().splitlines()
    assert len(texts["films.txt.gz"]) == 60, "test reviews are not read"
    assert "<br" not in "".join(texts["films.txt.gz"])
    assert texts["articles.txt.gz"] == ["The is 1,000 years old. It's well-known."] * 4
    assert texts["electronics.txt.gz"] == ["Works well."]
    assert all(", it's true" in line for line in texts["sentences.txt.gz"])
    files = english_texts.write_opinions(raw, tmp_path / "opinions", reviews_held_out=10)
    rows = {name: [line.split("\t") for line in file.read_text().splitlines()[1:]] for name, file in files.items()}
    assert {name: len(own) for name, own in rows.items()} == {"train": 60, "dev": 22, "sst2": 12, "imdb": 16}
    assert not {text for text, _ in rows["train"][:30]} & {text for text, _ in rows["imdb"]}
    for own in rows.values():
        for text, label in own:
            assert any(word in text.lower() for word in WORDS[label == "positive"]), (text, label)


def test_a_stage_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    for _ in range(2):
        report = Report(tmp_path / "new" / "report.json")
        assert report.stage("counted", lambda: calls.append(1) or {"n": 3}, seed=1) == {"n": 3}
    assert calls == [1]
    with pytest.raises(ValueError, match=r"'counted' was done with \{'seed': 1\}, not \{'seed': 2\}"):
        report.stage("counted", lambda: None, seed=2)
    stage = json.loads((tmp_path / "new" / "report.json").read_text())["counted"]
    assert stage["cpu"]["model"]
    assert stage["libraries"]["torch"]


def test_english_from_raw_files_to_figures(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the train extra is not installed")
    pytest.importorskip("omegaconf", reason="the pretrain extra is not installed")
    real_pretraining, real_tuning = english.pretraining, english.fine_tuning

    def pretraining(*arguments):
        config = real_pretraining(*arguments)
        small = config.model | {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        data = dataclasses.replace(config.data, max_length=32)
        words = dataclasses.replace(config.vocabulary, size=60)
        return dataclasses.replace(config, model=small, data=data, vocabulary=words, batch_tokens=512)

    def fine_tuning(seed: int):
        return dataclasses.replace(real_tuning(seed), epochs=1)

    monkeypatch.setattr(english, "pretraining", pretraining)
    monkeypatch.setattr(english, "fine_tuning", fine_tuning)
    opinions = tmp_path / "opinions.tsv"
    rows = [f"The {word} film.\t{english_texts.NAMES[label]}\tplain" for label in (0, 1) for word in WORDS[label]]
    opinions.write_text("\n".join(["text\tlabel\tform", *rows]) + "\n")
    for _ in range(2):
        english.run(raw, tmp_path / "out", steps=4, seed=0, opinions=opinions)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 <= report["pretrained"]["result"]["masked_accuracy"] <= 1
    for test, examples in (("sst2", 12), ("imdb", 16)):
        figures = report[test]["result"]
        assert figures["examples"] == examples
        assert figures["interval_95"][0] <= figures["accuracy"] <= figures["interval_95"][1]
        assert report[f"linear model on {test}"]["result"]["accuracy"] > 0.8, "the words decide"
    assert report["opinions"]["result"]["plain"].endswith(" of 8")


def test_multi30k_from_raw_files_to_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sacrebleu", reason="the train extra is not installed")
    rng = np.random.default_rng(4)
    for part, count in (("train", 48), ("val", 6), (multi30k.TEST, 5)):
        numbers = rng.integers(0, 6, (count, 5))
        for language, words in (("en", "one two three four five six"), ("de", "eins zwei drei vier fünf sechs")):
            lines = [" ".join(np.array(words.split())[row]) for row in numbers]
            with gzip.open(tmp_path / f"{part}.{language}.gz", "wt", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
    small = multi30k.new_model().replace(hidden_size=16, intermediate_size=32, embedding_size=16)
    monkeypatch.setattr(multi30k, "new_model", lambda: small)
    for _ in range(2):
        multi30k.run(tmp_path, tmp_path / "out", pair="en-de", epochs=2, seed=0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["en-de trained"]["result"]) == 2
    assert 0 <= report["en-de test_2016_flickr, 4 beams"]["result"]["chrf"] <= 100
