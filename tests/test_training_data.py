"""Labelled text files, data sets, the length-bucketed sampler and masking for language modelling."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from albert_fast.training import LengthBucketSampler, MaskedTextDataset, TextDataset, baseline, read_examples
from albert_fast.training.distill import write_soft_labels
from albert_fast.training.masking import choose_tokens, drop_contained_lines, word_starts


class Words:
    """A tokenizer of whole words with Hugging Face's arguments: enough for the data sets, without the text extra."""

    pad_token_id, unk_token_id, cls_token_id, sep_token_id, mask_token_id = 0, 1, 2, 3, 4
    all_special_ids = (0, 1, 2, 3, 4)

    def __init__(self, words: str) -> None:
        self.vocabulary = {f"▁{word}": i for i, word in enumerate(words.split(), 5)}

    def get_vocab(self) -> dict[str, int]:
        return {f"[{i}]": i for i in range(5)} | self.vocabulary

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        rows = [[self.vocabulary.get(f"▁{word}", 1) for word in text.split()][: max_length - 2] for text in texts]
        ids = [[2, *row, 3] for row in rows]
        return {"input_ids": ids, "token_type_ids": [[0] * len(row) for row in ids]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'sentence\tlabel\na "b c\t1\nd\t0\n'),
        ("a.csv", 'label,review\n1,"a ""b c"\n0,d\n'),
        ("a.jsonl", '{"text": "a \\"b c", "label": 1}\n\n{"text": "d", "label": 0}\n'),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_read_examples(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    examples = read_examples(path)
    assert examples.texts == ['a "b c', "d"]
    assert examples.labels == [1, 0]
    assert examples.label_names == ["0", "1"]
    named = read_examples(path, label_names=["negative", "positive"])
    assert (named.labels, named.label_names) == ([1, 0], ["negative", "positive"])


def test_read_examples_kinds_of_labels_and_errors(tmp_path: Path) -> None:
    def write(content: str, name: str = "x.tsv") -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    words = read_examples(write("a\tgood\nb\tbad\n"), text_column=0, label_column=1)
    assert (words.labels, words.label_names) == ([1, 0], ["bad", "good"])
    numbers = read_examples(write("a\tb\t1.5\nc\td\t3\n"), text_column=0, pair_column=1, label_column=2)
    assert (numbers.texts, numbers.labels, numbers.label_names) == ([("a", "b"), ("c", "d")], [1.5, 3.0], None)
    with pytest.raises(ValueError, match=r"x.tsv, line 3: 1 field, but the header \['text', 'label'\] has 2"):
        read_examples(write("text\tlabel\na\t1\nb\n"))
    with pytest.raises(ValueError, match=r"x.tsv, line 3: the label is 'good', expected one of \['x', 'y'\]"):
        read_examples(write("text\tlabel\nb\tx\na\tgood\n"), label_names=["x", "y"])
    with pytest.raises(ValueError, match=r"x.tsv, line 3: the label 'nan' is not a finite number"):
        read_examples(write("text\tlabel\nb\t1\na\tnan\n"))
    with pytest.raises(ValueError, match="no examples"):
        read_examples(write("text\tlabel\n"))
    with pytest.raises(ValueError, match="cannot tell the format"):
        read_examples(write("", "x.txt"))
    with pytest.raises(ValueError, match="line 1"):
        read_examples(write("{", "x.jsonl"))


def test_dataset_pads_cuts_and_drops_pieces() -> None:
    tokenizer = Words("a b c d")
    data = TextDataset(["a b c d", "b"], [1, 0], tokenizer, max_length=5)
    batch = data.collate([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 6, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert data.left_out == "1 of 2 texts fill max_length = 5 tokens; what they have beyond is cut"
    assert TextDataset(["a b c d", "b"], [1, 0], tokenizer, max_length=7).left_out is None
    torch.manual_seed(0)
    dropping = TextDataset(["a b c d"] * 500, [0] * 500, tokenizer, piece_dropout=0.3)
    ids = dropping.collate([dropping[i] for i in range(500)])["input_ids"]
    assert (ids[:, 0] == 2).all()
    assert (ids[:, -1] == 3).all()
    assert 0.25 < (ids[:, 1:-1] == tokenizer.mask_token_id).float().mean() < 0.35
    with pytest.raises(ValueError, match="2 texts but 1 labels"):
        TextDataset(["a", "b"], [1], tokenizer)


def test_position_shift_moves_whole_rows() -> None:
    data = TextDataset(["a b"] * 200, [0] * 200, Words("a b"), position_shift=3)
    torch.manual_seed(0)
    positions = data.collate([data[i] for i in range(200)])["position_ids"]
    assert torch.equal(positions - positions[:, :1], torch.arange(4).expand(200, 4))
    assert positions[:, 0].unique().tolist() == [0, 1, 2, 3]


def test_soft_labels_are_read_and_collated(tmp_path: Path) -> None:
    path = tmp_path / "soft.jsonl"
    path.write_text('{"text": "a", "label": [0.25, 0.75]}\n{"text": "b", "label": [1, 0]}\n')
    examples = read_examples(path, label_names=["negative", "positive"])
    data = TextDataset(examples.texts, examples.labels, Words("a b"))
    torch.testing.assert_close(data.collate([data[0], data[1]])["labels"], torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="expected 3 probabilities"):
        read_examples(path, label_names=["a", "b", "c"])
    path.write_text('{"text": "a", "label": [0.25, 0.75]}\n{"text": "b", "label": 1}\n')
    with pytest.raises(ValueError, match=r"line 2: the label is one value, but that of .*line 1 is a list"):
        read_examples(path)
    path.write_text('{"text": "a", "label": [0.25, 0.75]}\n{"text": "b", "label": [0.9, 0.3]}\n')
    with pytest.raises(ValueError, match=r"line 2: the label is .0.9, 0.3., expected 2 probabilities"):
        read_examples(path)


def test_teacher_labels_recombined_text(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the train extra is not installed")
    fillers = ["the", "film", "by", "this", "man", "in", "town", "with", "a", "cat"]
    lines = [" ".join([*fillers[i % 9 :], word, *fillers[: i % 9]]) for i in range(40) for word in ("good", "bad")]
    train = tmp_path / "train.tsv"
    train.write_text("text\tlabel\n" + "".join(f"{line}\t{int('good' in line)}\n" for line in lines))
    assert write_soft_labels(train, tmp_path / "soft.jsonl", examples=200, seed=1) == 280
    soft = read_examples(tmp_path / "soft.jsonl")
    assert soft.texts[:80] == lines
    known = set(" ".join(lines).split())
    for text, (_, positive) in zip(soft.texts, soft.labels, strict=True):
        assert set(text.split()) <= known
        if ("good" in text.split()) != ("bad" in text.split()):
            assert (positive > 0.5) == ("good" in text.split())
    assert len(set(soft.texts[80:])) > 100
    write_soft_labels(train, tmp_path / "again.jsonl", examples=200, seed=1)
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "soft.jsonl").read_text()


def test_reviews_teach_and_their_sentences_are_labelled(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the train extra is not installed")
    train, reviews = tmp_path / "train.tsv", tmp_path / "reviews.tsv.gz"
    train.write_text("text\tlabel\n" + "".join(f"film {i} is {['bad', 'good'][i % 2]}\t{i % 2}\n" for i in range(40)))
    rows = [f"{i % 2}\t9\tx\tIt's the {['worst', 'best'][i % 2]}!<br />I didn't sleep." for i in range(40)]
    with gzip.open(reviews, "wt", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")
    assert write_soft_labels(train, tmp_path / "soft.jsonl", examples=50, reviews_file=reviews) == 2 * 40 + 50
    soft = [json.loads(line) for line in (tmp_path / "soft.jsonl").read_text().splitlines()]
    assert {record["text"] for record in soft[80:]} <= {"it 's the worst !", "it 's the best !", "i did n't sleep ."}
    for record in soft[80:]:
        if "sleep" not in record["text"]:
            assert (record["label"][1] > 0.5) == ("best" in record["text"])


def test_baseline_finds_the_words_that_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the train extra is not installed")
    file = tmp_path / "x.tsv"
    file.write_text("text\tlabel\n" + "".join(f"film {i} is {['bad', 'good'][i % 2]}\t{i % 2}\n" for i in range(40)))
    baseline.main(["--train", str(file), "--dev", str(file), "--test", str(file)])
    assert "test accuracy 1.0000 (95 % interval 0.9124 to 1.0000, n = 40)" in capsys.readouterr().out


def test_sampler_covers_all_sorts_by_length_and_starts_anywhere() -> None:
    lengths = torch.randint(1, 60, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthBucketSampler(lengths, 16, seed=3)
    first = list(sampler)
    assert sorted(i for batch in first for i in batch) == list(range(1003))
    assert len(first) == len(sampler) == 63
    real = sum(lengths)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
    assert real / padded > 0.9
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0, 40)
    assert list(sampler) == first[40:]
    assert len(sampler) == 23


def test_masking_hides_whole_words_in_runs_and_only_ordinary_tokens() -> None:
    starts = np.array([False] * 5 + [True] * 5 + [False] * 5)
    ids = np.array([2, 5, 10, 6, 7, 11, 12, 8, 3, 2, 5, 6, 7, 8, 9, 5, 6, 7, 3])
    sequence, special = np.array([0] * 9 + [1] * 10), ids < 5
    share, rng = 0.0, np.random.default_rng(0)
    for _ in range(200):
        hidden = choose_tokens(ids, sequence, special, starts, 0.3, rng.random((len(ids), 2)))
        assert not (hidden & special).any()
        assert hidden[1] == hidden[2]
        assert hidden[4] == hidden[5] == hidden[6]
        assert hidden[:9].any()
        assert hidden[9:].any()
        share += hidden[9:].sum() / 8 / 200
    assert share == pytest.approx(round(0.3 * 8) / 8), "words of one token each: no run goes beyond the share"


def test_masking_visits_words_one_after_another() -> None:
    """The sequential rule, word by word, hides the same tokens."""
    rng = np.random.default_rng(0)
    starts = rng.random(50) < 0.6
    for _ in range(50):
        lengths = rng.integers(0, 30, 6)
        sequence = np.repeat(np.arange(6), lengths)
        ids, chance = rng.integers(0, 50, len(sequence)), rng.random((len(sequence), 2))
        special = rng.random(len(sequence)) < 0.1
        expected = np.zeros(len(ids), dtype=bool)
        for number in range(6):
            words: list[list[int]] = []
            for token in np.flatnonzero(sequence == number):
                if special[token]:
                    continue
                follows = words and words[-1][-1] == token - 1
                if starts[ids[token]] or not follows:
                    words.append([])
                words[-1].append(token)
            budget = max(1, round(0.15 * sum(map(len, words))))
            for word in sorted(range(len(words)), key=lambda word: chance[words[word][0], 0]):
                run = 1 + sum(chance[words[word][0], 1] >= limit for limit in (6 / 11, 9 / 11))
                for one in words[word : word + run]:
                    if expected[sequence == number].sum() < budget:
                        expected[one] = True
        assert np.array_equal(choose_tokens(ids, sequence, special, starts, 0.15, chance), expected)


def test_masked_batches_show_the_mask_a_random_token_or_the_token_itself() -> None:
    text = " ".join("abcdefgh")
    data = MaskedTextDataset([text] * 300, Words(text), mask_probability=0.25, with_wanted_tokens=True)
    batch = data.collate([data[i] for i in range(300)])
    chosen = batch["labels"] != -100
    assert torch.equal(chosen, batch["wanted_tokens"])
    original = torch.tensor(data.input_ids)
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert 0.7 < (batch["input_ids"][chosen] == 4).float().mean() < 0.9
    assert word_starts(Words("a")).tolist() == [False] * 5 + [True]


def test_drop_contained_lines() -> None:
    lines = ["a fine film", "fine film", "fine", "fin", "a fine film", "film a", ""]
    assert drop_contained_lines(lines) == ["a fine film", "film a", "fin"]


def test_data_loader_works_with_workers_and_collate() -> None:
    data = TextDataset(["a b", "b", "a a a"], [0, 1, 0], Words("a b"))
    sampler = LengthBucketSampler(data.lengths, 2)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate, num_workers=1)
    assert sorted(batch["input_ids"].shape[0] for batch in loader) == [1, 2]
