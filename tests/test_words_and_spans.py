"""Words, windows and spans of texts, and the models that tag and answer, against the eager reference token by token."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from albert_fast import ALBERTForQuestionAnswering, ALBERTForSequenceClassification, ALBERTForTokenClassification
from albert_fast.models import reference
from albert_fast.tasks.answer import QuestionAnswerer
from albert_fast.tasks.errors import UsageError
from albert_fast.tasks.tag import TextTagger
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.spans import (
    Span,
    answer_text,
    best_spans,
    context_rows,
    span_columns,
    trimmed,
    widest_window,
    windows,
)
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer
from albert_fast.text.words import entities, marks_entities, word_rows, words_of

pytest.importorskip("tokenizers", reason="the text extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
LINES = [
    "anna lives in bern, near the old bridge",
    "who lives in bern?",
    "the bridge is old and odd. nobody saw it",
] * 4
TAGS = ("O", "B-person", "I-person", "B-place", "I-place")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints: of a tagger, an answerer and a classifier, with one vocabulary."""
    tokenizer = train_tokenizer(LINES, 38)
    made = {}
    for kind, labels in (
        (ALBERTForTokenClassification, TAGS),
        (ALBERTForQuestionAnswering, ()),
        (ALBERTForSequenceClassification, ("bad", "good")),
    ):
        config = small_text_config(tokenizer, *labels) if labels else small_text_config(tokenizer, "LABEL_0", "LABEL_1")
        made[kind.__name__] = save_small_model(kind, config, tokenizer, tmp_path_factory.mktemp(kind.__name__))
    return made


def test_windows_cover_everything_and_overlap() -> None:
    for count in range(40):
        for room in range(1, 12):
            for shared in range(room):
                found = windows(count, room, shared)
                assert sorted({place for window in found for place in window}) == list(range(count))
                assert all(len(window) <= room for window in found)
                assert all(one.stop - two.start == shared for one, two in itertools.pairwise(found))
                for place in range(count):
                    home = widest_window(found, place)
                    margins = [min(place - w.start, w.stop - 1 - place) for w in found if place in w]
                    assert min(place - found[home].start, found[home].stop - 1 - place) == max(margins)
    with pytest.raises(ValueError, match="windows of 3 tokens cannot share 3"):
        windows(9, 3, 3)


def test_words_of_a_text() -> None:
    text = "Anna's 3.5 cats, @anna #cats at https://a.b/c?d=1 \u6211\u7231Bern!"
    assert [text[a:b] for a, b in words_of(text)] == [
        "Anna", "'s", "3.5", "cats", ",", "@anna", "#cats", "at", "https://a.b/c?d=1", "\u6211", "\u7231", "Bern", "!",
    ]  # fmt: skip
    assert words_of("") == words_of(" \n") == []


def test_entities_are_those_of_seqeval() -> None:
    library = pytest.importorskip("seqeval.metrics.sequence_labeling")
    generator = random.Random(0)
    for _ in range(300):
        tags = [generator.choice(TAGS) for _ in range(generator.randint(0, 9))]
        expected = [(kind, start, end + 1) for kind, start, end in library.get_entities(tags)]
        assert entities(tags) == expected, tags
    assert marks_entities(TAGS)
    assert not marks_entities(["O"])
    assert not marks_entities(["NOUN", "B-person"])


def test_every_word_belongs_to_one_row_and_its_first_token(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["ALBERTForTokenClassification"])
    words = [line.split() for line in LINES[:3]] + [["\u200d", "anna", "\u6211"], ["the", "odd", "bridge"] * 20, []]
    rows = word_rows(tokenizer, words, 20)
    found: dict[tuple[int, int], str] = {}
    for ids, sentence, own, columns in zip(rows.ids, rows.sentence, rows.words, rows.columns, strict=True):
        assert len(ids) <= 20
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        for word, column in zip(own, columns, strict=True):
            assert (sentence, word) not in found
            found[sentence, word] = tokenizer.convert_ids_to_tokens(ids[column])
    expected = {(s, w) for s, one in enumerate(words) for w, word in enumerate(one) if tokenizer.tokenize(word)}
    assert {key for key in expected if words[key[0]][key[1]] != "\u200d"} == set(found) - {(3, 0)}
    for (sentence, word), piece in found.items():
        pieces = tokenizer.tokenize(words[sentence][word])
        assert piece in pieces[:2], (words[sentence][word], piece)  # the first may be the space before it alone


def test_tags_are_the_references(folders: dict[str, Path]) -> None:
    folder = folders["ALBERTForTokenClassification"]
    tagger, plain = (
        TextTagger(folder, device="cpu", batch_size=3),
        reference.ALBERTForTokenClassification.from_pretrained(folder),
    )
    sentences = [line.split() for line in LINES[:3]] + [[], ["the", "odd", "bridge", "is", "old"] * 12]
    rows = word_rows(tagger.tokenizer, sentences, 48)
    assert len(rows.ids) > len(sentences), "the last one needs windows"
    found = tagger.tags(sentences)
    assert [len(tags) for tags in found] == [len(words) for words in sentences]
    for ids, sentence, own, columns in zip(rows.ids, rows.sentence, rows.words, rows.columns, strict=True):
        with torch.no_grad():
            scores = plain(torch.tensor([ids])).logits[0].softmax(-1)
        for word, column in zip(own, columns, strict=True):
            assert found[sentence][word].tag == TAGS[int(scores[column].argmax())]
            assert found[sentence][word].score == pytest.approx(float(scores[column].max()), abs=2e-5)
    for text, one in zip(LINES[:3], tagger(LINES[:3]), strict=True):
        assert all(text[part.start : part.end] == part.text for part in one)
    assert tagger([]) == tagger.tags([]) == []
    with pytest.raises(TypeError, match="text 1 is two texts"):
        tagger(["a", ("b", "c")])
    with pytest.raises(UsageError, match="labels whole texts, not words"):
        TextTagger(folders["ALBERTForSequenceClassification"], device="cpu")


def test_contexts_become_the_rows_of_pairs(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["ALBERTForQuestionAnswering"])
    pairs = [("who?", LINES[0]), ("", ""), ("who lives " * 30, LINES[2]), ("who?", f"{LINES[0]} {LINES[2]} " * 3)]
    rows = context_rows(tokenizer, pairs, 40)
    alone = tokenizer([pairs[0]])
    assert (rows.ids[0], rows.types[0]) == (alone["input_ids"][0], alone["token_type_ids"][0])
    assert max(map(len, rows.ids)) == 40
    for row, example in enumerate(rows.example):
        context = pairs[example][1]
        for column, (start, end) in enumerate(rows.offsets[row], rows.first[row]):
            piece = tokenizer.convert_ids_to_tokens(rows.ids[row][column]).replace("\u2581", "")
            assert piece in ("", "<unk>", context[start:end].strip().lower())
    covered = {span for row, example in enumerate(rows.example) if example == 3 for span in rows.offsets[row]}
    assert covered == set(tokenizer(pairs[3][1], add_special_tokens=False, return_offsets=True)["offset_mapping"])
    start = pairs[0][1].index("bern")
    columns = span_columns(rows, 0, start, start + 4)
    assert tokenizer.decode(rows.ids[0][columns[0] : columns[1] + 1]) == "bern"
    with pytest.raises(ValueError, match="leaves no room for a context"):
        context_rows(tokenizer, [("who lives there", "a")], 4)


def test_the_best_span_is_the_best_of_all(folders: dict[str, Path]) -> None:
    folder = folders["ALBERTForQuestionAnswering"]
    tokenizer = load_tokenizer(folder)
    generator = np.random.default_rng(0)
    pairs = [("who?", LINES[0]), ("who?", f"{LINES[0]} {LINES[2]} " * 2), ("who?", "")]
    rows = context_rows(tokenizer, pairs, 30)
    for absent in (False, True):
        scores = [(generator.normal(size=len(ids)), generator.normal(size=len(ids))) for ids in rows.ids]
        best = best_spans(rows, scores, len(pairs), longest=3, may_be_absent=absent)
        for example, (_, context) in enumerate(pairs):
            every, nothing = [], []
            for row in (row for row, owner in enumerate(rows.example) if owner == example):
                starts, ends = scores[row]
                nothing.append((starts[0] + ends[0], 0, 0))
                count = len(rows.offsets[row])
                for first in range(count):
                    for last in range(first, min(first + 3, count)):
                        value = starts[rows.first[row] + first] + ends[rows.first[row] + last]
                        every.append((value, rows.offsets[row][first][0], rows.offsets[row][last][1]))
            every += [min(nothing)] if absent else []
            expected = max(every)[1:] if every else (0, 0)
            assert (best[example].start, best[example].end) == expected
            assert 0 < best[example].score <= 1
            assert answer_text(context, best[example]) == context[slice(*trimmed(context, best[example])[:2])]
    assert trimmed("a  b ", Span(1, 5, 1.0)) == Span(3, 4, 1.0)


def test_answers_are_the_references(folders: dict[str, Path]) -> None:
    folder = folders["ALBERTForQuestionAnswering"]
    plain = reference.ALBERTForQuestionAnswering.from_pretrained(folder)
    pairs = [("who lives in bern?", LINES[0]), ("who?", f"{LINES[0]} {LINES[2]} " * 3), ("what is old?", LINES[2])]
    for absent in (False, True):
        answerer = QuestionAnswerer(folder, device="cpu", batch_size=2, may_be_absent=absent)
        rows = context_rows(answerer.tokenizer, pairs, 48)
        scores = []
        for ids, types in zip(rows.ids, rows.types, strict=True):
            with torch.no_grad():
                out = plain(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
            scores.append((out.start_logits[0].numpy(), out.end_logits[0].numpy()))
        spans = best_spans(rows, scores, len(pairs), may_be_absent=absent)
        for found, span, (_, context) in zip(answerer(pairs), spans, pairs, strict=True):
            assert found.text == answer_text(context, span) == context[found.start : found.end]
            assert found.score == pytest.approx(span.score, abs=1e-4)
    assert answerer([]) == []
    with pytest.raises(TypeError, match="pair 0 is one text; expected a question and a context"):
        answerer(["who?"])
