"""Segments of a corpus, their packed batches, and what masks and labels say."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from albert_fast.training.corpus import Corpus
from albert_fast.training.masking import Masks
from albert_fast.training.segments import SHORTEST, PretrainingData, cut_segments, split_documents

CLS, SEP, MASK, FIRST = 2, 3, 4, 5
VOCABULARY = 400
TOKENIZER = SimpleNamespace(
    mask_token_id=MASK,
    all_special_ids=[0, 1, CLS, SEP, MASK],
    get_vocab=lambda: {("\u2581" if i % 3 else "") + f"p{i}": i for i in range(VOCABULARY)},
)


def make_corpus(documents: int = 60, seed: int = 0) -> Corpus:
    """Random documents of sentences of 1 to 12 tokens; a document's tokens count upwards, modulo the vocabulary."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 13, rng.integers(1, 30)) for _ in range(documents)]
    sentence_ends = np.cumsum(np.concatenate(lengths))
    document_ends = np.cumsum([length.sum() for length in lengths])
    begins = np.repeat([0, *document_ends[:-1]], [length.sum() for length in lengths])
    tokens = FIRST + (np.arange(sentence_ends[-1]) - begins) % (VOCABULARY - FIRST)
    return Corpus(tokens.astype(np.uint16), sentence_ends, document_ends)


def make_data(corpus: Corpus, **options) -> PretrainingData:
    options = {"max_length": 24, "batch_tokens": 400, "seed": 5} | options
    return PretrainingData(corpus, np.arange(len(corpus.document_ends)), Masks(TOKENIZER, 0.15), (CLS, SEP), **options)


def sequences(batch: dict) -> list[dict]:
    """The sequences of a packed batch, with their true tokens."""
    labels = batch["labels"].numpy()
    ids = np.where(labels == -100, batch["input_ids"].numpy(), labels)
    rows = []
    for number, (begin, end) in enumerate(itertools.pairwise(batch["cu_seqlens"])):
        types = batch["token_type_ids"][begin:end].tolist()
        rows.append(
            {"ids": ids[begin:end].tolist(), "types": types, "order": int(batch["sentence_order_label"][number])}
        )
    return rows


def test_segments_cover_every_document_once() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 90, 50)
    ends = np.cumsum(lengths)
    begins, stops = cut_segments(ends - lengths, ends, 21, 0.1, rng)
    order = np.argsort(begins)
    begins, stops = begins[order], stops[order]
    assert (begins[1:] >= stops[:-1]).all()
    assert ((stops - begins >= SHORTEST) & (stops - begins <= 21)).all()
    covered = np.zeros(ends[-1], dtype=bool)
    for begin, stop in zip(begins, stops, strict=True):
        covered[begin:stop] = True
        assert np.searchsorted(ends, begin, side="right") == np.searchsorted(ends, stop, side="left")  # one document
    missing = [(~covered[end - length : end]).sum() for end, length in zip(ends, lengths, strict=True)]
    assert max(missing) < SHORTEST
    shorter = (stops - begins)[~np.isin(stops, ends)] < 21
    assert 0.02 < shorter.mean() < 0.25


def test_sequences_are_consecutive_text_cut_at_a_sentence_end_and_half_are_swapped() -> None:
    corpus = make_corpus()
    orders = []
    for position in itertools.islice(make_data(corpus).positions(), 30):
        at, (batch,) = make_data(corpus)[position]
        assert at == position
        assert batch["cu_seqlens"][-1] == len(batch["input_ids"]) <= 400
        assert batch["max_seqlen"] == np.diff(batch["cu_seqlens"]).max() <= 24
        for row in sequences(batch):
            ids, orders = row["ids"], [*orders, row["order"]]
            assert (ids[0], ids[-1]) == (CLS, SEP)
            middle = ids.index(SEP)
            first, second = ids[1:middle], ids[middle + 1 : -1]
            assert row["types"] == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
            assert (row["order"] == -100) == (middle == len(ids) - 1)
            text = second + first if row["order"] == 1 else first + second
            assert all((b - a) % (VOCABULARY - FIRST) == 1 for a, b in itertools.pairwise(text))
    assert 0.4 < np.mean([order == 1 for order in orders if order != -100]) < 0.6


def test_masks_change_with_the_epoch_and_hide_only_text() -> None:
    data = make_data(make_corpus(), batch_tokens=10**6)
    shares, shown = [], []
    for epoch in range(3):
        _, (batch,) = data[epoch, 0]
        hidden = batch["wanted_tokens"].numpy()
        assert np.array_equal(hidden, batch["labels"].numpy() != -100)
        assert not np.isin(batch["labels"].numpy(), [0, 1, CLS, SEP, MASK]).any()
        shares.append(hidden.mean())
        ids = batch["input_ids"].numpy()[hidden]
        shown.append([(ids == MASK).mean(), (ids == batch["labels"].numpy()[hidden]).mean()])
    assert len(set(shares)) == 3
    assert 0.1 < np.mean(shares) < 0.25
    assert np.abs(np.mean(shown, 0) - [0.8, 0.1]).max() < 0.03


def test_parts_of_a_step_are_the_whole_step() -> None:
    corpus = make_corpus()
    _, (whole,) = make_data(corpus)[1, 2]
    parts = [make_data(corpus, parts=4, mine=range(at, at + 2))[1, 2][1] for at in (0, 2)]
    batches = [batch for pair in parts for batch in pair]

    def rows(batch: dict) -> list[tuple]:
        names = ("input_ids", "labels", "token_type_ids")
        found = [
            tuple(tuple(batch[name][begin:end].tolist()) for name in names)
            for begin, end in itertools.pairwise(batch["cu_seqlens"])
        ]
        return [(*row, int(order)) for row, order in zip(found, batch["sentence_order_label"], strict=True)]

    assert sorted(row for batch in batches for row in rows(batch)) == sorted(rows(whole))
    sizes = [len(batch["cu_seqlens"]) for batch in batches]
    assert max(sizes) - min(sizes) <= 1


def test_an_epoch_has_each_sequence_once_and_full_batches() -> None:
    data = make_data(make_corpus())
    plan = data.plan(3)
    assert len(np.unique(plan.begins)) == len(plan.begins)
    tokens = [int((plan.ends - plan.begins + 3)[begin:end].sum()) for begin, end in itertools.pairwise(plan.batches)]
    assert all(400 - 24 < count <= 400 for count in tokens)
    positions = list(itertools.islice(data.positions(0, 2), len(data.plan(0))))
    assert positions[0] == (0, 2)
    assert positions[-2:] == [(1, 0), (1, 1)]


def test_what_cannot_fill_a_batch_is_refused() -> None:
    corpus = make_corpus(1)
    with pytest.raises(ValueError, match="batch_tokens 40 cannot hold a sequence of 24 tokens for each of 2"):
        make_data(corpus, batch_tokens=40, parts=2, mine=range(2))
    short = Corpus(corpus.tokens[:9], np.array([9]), np.array([9]))
    with pytest.raises(ValueError, match="gives 1 sequences for 2 micro-batches"):
        make_data(short, parts=2, mine=range(2))
    with pytest.raises(ValueError, match="no document has 4 tokens or more"):
        make_data(Corpus(corpus.tokens[:3], np.array([3]), np.array([3])))


def test_held_out_documents_are_apart() -> None:
    trained, held = split_documents(200, 0.1, 3)
    assert len(held) == 20
    assert sorted([*trained, *held]) == list(range(200))
    assert [len(part) for part in split_documents(2, 0.01, 0)] == [1, 1]
    assert [len(part) for part in split_documents(1, 0.5, 0)] == [1, 0]
    assert [len(part) for part in split_documents(5, 0.0, 0)] == [5, 0]
