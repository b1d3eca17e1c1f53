"""Recipes: what they read from raw files, that a stage is done once, and a whole run in small."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from albert_fast import ALBERTConfig, ALBERTForMaskedLM
from albert_fast.recipes import baselines, english, english_texts, multi30k, task_texts, tasks
from albert_fast.recipes.report import Report
from albert_fast.text.tokenizer import train_tokenizer

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
        assert report["linear model"]["result"][test] > 0.8, "the words decide"
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


def test_small_tasks_from_raw_files_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("sklearn", "seqeval", "torchmetrics"):
        pytest.importorskip(library, reason="the train extra is not installed")
    data = tmp_path / "data"
    write_small_tasks(data)
    splits = {one.name: one.read(data) for one in tasks.EXPERIMENTS}
    assert {name: tuple(map(len, split)) for name, split in splits.items()} == {
        "trec": (18, 2, 4),
        "cola": (6, 4, 4),
        "stsb": (6, 6, 6),
        "wnut17": (4, 2, 2),
        "subjqa": (4, 4, 4),
        "xquad": (14, 2, 4),
        "chnsenticorp": (16, 2, 2),
    }
    assert splits["trec"].train[0] == {"text": "Who is Zoë ?", "label": "HUM"}
    assert {row["label"] for row in splits["chnsenticorp"].test} == {"negative", "positive"}
    assert not {row["context"] for row in splits["xquad"].train} & {row["context"] for row in splits["xquad"].test}
    assert splits["subjqa"].train[0]["answers"] == [{"text": "slim", "answer_start": 8}]
    assert splits["subjqa"].train[1] == {"question": "How heavy is it?", "context": "It is a slim one. ", "answers": []}

    start = tmp_path / "start"
    tokenizer = train_tokenizer([row["text"] for row in splits["trec"].train] * 5, 60, at_most=True)
    config = ALBERTConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=16,
        embedding_size=8,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=256,
    )
    ALBERTForMaskedLM(config).save_pretrained(start)
    tokenizer.save(start)
    quick = [dataclasses.replace(one, epochs=1, max_length=min(one.max_length, 48)) for one in tasks.EXPERIMENTS]
    monkeypatch.setattr(tasks, "EXPERIMENTS", quick)
    for _ in range(2):
        tasks.run(data, tmp_path / "out", init_from=start, seeds=2)
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [one.title for one in quick]
    assert all("(2 seeds)" in row for row in rows[2:])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.json", "table.md"]


def write_small_tasks(data: Path) -> None:
    """The raw files of the seven small tasks, in the formats of the real ones."""
    for name in ("TREC", "CoLA", "STS-B", "WNUT17", "SubjQA", "XQuAD", "ChnSentiCorp"):
        (data / name).mkdir(parents=True)
    asked = ["LOC:city Where is Bern ?", "HUM:ind Who is Zoë ?"]
    for part, count in (("train", 10), ("test", 2)):
        (data / "TREC" / f"TREC.{part}").write_text("\n".join(asked * count) + "\n", encoding="latin-1")
    for part, count in (("in_domain_train", 3), ("in_domain_dev", 2), ("out_of_domain_dev", 2)):
        lines = ["gj04\t1\t\tThe sailors rode the breeze.", "gj04\t0\t*\tThe breeze sailors the rode."]
        (data / "CoLA" / f"{part}.tsv").write_text("\n".join(lines * count) + "\n")
    for part in ("train", "dev", "test"):
        with (data / "STS-B" / f"stsb-en-{part}.csv").open("w", newline="") as file:
            pairs = [
                ("A man, old, walks.", "An old man walks."),
                ("A dog runs.", "A dog is running."),
                ("A cat.", "Rain."),
            ]
            csv.writer(file).writerows((*pair, score) for pair, score in zip(pairs * 2, (5.0, 4.2, 0) * 2, strict=True))
        with (data / "SubjQA" / f"electronics.{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "review", "human_ans_spans", "human_ans_indices"])
            review = "It is a slim one. ANSWERNOTFOUND"
            rows = [
                ("How is it?", review, "slim", "(8, 12)"),
                ("How heavy is it?", review, "ANSWERNOTFOUND", "(18, 32)"),
            ]
            writer.writerows(rows * 2)
    sentence = "Anna\tB-person\nBerg\tI-person\nsleeps\tO\n\n"
    for name, count in (("wnut17train.conll", 4), ("emerging.dev.conll", 2), ("emerging.test.annotated", 2)):
        (data / "WNUT17" / name).write_text(sentence * count)
    paragraphs = []
    for number in range(10):
        context = f"House {number} is red. It was built in 19{number}0."
        answers = [{"text": f"19{number}0", "answer_start": context.index(" 19") + 1}]
        qas = [{"id": f"{number}-{k}", "question": "When was it built?", "answers": answers} for k in range(2)]
        paragraphs.append({"context": context, "qas": qas})
    (data / "XQuAD" / "xquad.en.json").write_text(json.dumps({"data": [{"title": "", "paragraphs": paragraphs}]}))
    with (data / "ChnSentiCorp" / "ChnSentiCorp_htl_all.csv").open("w", newline="") as file:
        rows = [("label", "review"), *[(1, "房间很大,不错!")] * 10, (1, " "), *[(0, "酒店不好,很差。")] * 10]
        csv.writer(file).writerows(rows)


def test_known_entities_are_found_the_longest_first() -> None:
    pytest.importorskip("seqeval", reason="the train extra is not installed")
    train = [
        {"tokens": ["New", "York", "Times"], "tags": ["B-group", "I-group", "I-group"]},
        {"tokens": ["York", "is", "New", "York"], "tags": ["B-place", "O", "B-place", "I-place"]},
    ]
    test = [
        {
            "tokens": ["the", "new", "york", "times", "of", "York"],
            "tags": ["O", "B-group", "I-group", "I-group", "O", "B-place"],
        }
    ]
    assert baselines.known_entities(task_texts.Split(train, [], test)) == 1
    test[0]["tags"][-1] = "O"
    assert baselines.known_entities(task_texts.Split(train, [], test)) == pytest.approx(2 / 3)
