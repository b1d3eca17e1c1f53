"""Calls of a tokenizer: special tokens as text, cuts and padding against transformers, bad arguments, forks."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from albert_fast.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

CORPUS = [
    "The film is a fine, quiet piece of work - and it knows it.",
    "A dull story (and a long one); nothing in 2,019 minutes made me laugh.",
    "Don't go: the plot's holes are <bigger> [than] the café in which it plays!",
] * 4
TYPED = [
    "[SEP]",
    "a [SEP] film",
    "<pad>",
    "[MASK] <unk> [CLS]",
    "<pad><pad>[SEP][SEP]",
    "the [MASK]film",
    "<PAD> [sep]",
]


@pytest.fixture(scope="module", params=["unigram", "cased", "wordpiece"])
def small(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "wordpiece":
        return train_tokenizer(CORPUS, 90, kind="wordpiece")
    return train_tokenizer(CORPUS, 62, lower_case=request.param == "unigram")


@pytest.fixture(scope="module")
def theirs(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")
    small.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "albert"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TYPED)
def test_special_tokens_that_a_user_types(small: Tokenizer, theirs: Any, text: str) -> None:
    assert small(text)["input_ids"] == theirs(text)["input_ids"]  # tokens, as in transformers
    plain = small(text, split_special_tokens=True)["input_ids"]
    assert plain[0] == small.cls_token_id
    assert plain[-1] == small.sep_token_id
    assert not {small.cls_token_id, small.sep_token_id, small.pad_token_id, small.mask_token_id} & set(plain[1:-1])
    assert small([text, text], split_special_tokens=True)["input_ids"] == [plain, plain]
    assert small(text)["input_ids"] == theirs(text)["input_ids"]  # one call does not change the next


def test_text_without_special_tokens_is_the_same_either_way(small: Tokenizer) -> None:
    for text in CORPUS[:3]:
        plain = small(text, "and <b>", split_special_tokens=True, return_offsets=True)
        assert plain == small(text, "and <b>", return_offsets=True)


def test_special_tokens_as_text_are_the_release_s_pieces(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.lower() for line in CORPUS]),
        model_writer=model,
        vocab_size=62,
        minloglevel=2,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="<pad>",
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in TYPED:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == processor.encode(text.lower())


def test_some_special_tokens_as_text(small: Tokenizer) -> None:
    text = f"the {small.mask_token} film [SEP] [CLS]"
    others = [token for token in small.all_special_tokens if token != small.mask_token]
    ids = small(text, split_special_tokens=others)["input_ids"]
    assert ids.count(small.mask_token_id) == 1
    assert ids.count(small.sep_token_id) == ids.count(small.cls_token_id) == 1
    assert set(small.all_special_tokens) >= {"[CLS]", "[SEP]", "[MASK]", small.pad_token, small.unk_token}
    with pytest.raises(ValueError, match=r"\['film'\] are not special tokens"):
        small(text, split_special_tokens=["film"])
    with pytest.raises(TypeError, match="split_special_tokens is 'yes'"):
        small(text, split_special_tokens="yes")


def test_the_attribute_is_the_default(small: Tokenizer) -> None:
    try:
        small.split_special_tokens = True
        assert small("a [SEP]") == small("a [SEP]", split_special_tokens=True)
        assert small("a [SEP]") != small("a [SEP]", split_special_tokens=False)
    finally:
        small.split_special_tokens = False


PAIRS = [("a film " * 9, "dull"), ("dull", "a film " * 9), ("a fine film " * 5, "the plot " * 6), ("a", "b")]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [4, 7, 8, 13, 30])
def test_cuts_are_transformers_(small: Tokenizer, theirs: Any, side: str, limit: int) -> None:
    small.truncation_side = small.padding_side = theirs.truncation_side = theirs.padding_side = side
    try:
        for strategy in ("longest_first", "only_first", "only_second"):
            for first, second in PAIRS:
                if strategy != "longest_first" and limit < 13:
                    continue  # the other text alone may be longer
                kept = first if strategy == "only_first" else first[:6]
                other = second[:6] if strategy == "only_first" else second
                mine = small(kept, other, max_length=limit, truncation=strategy, padding="max_length")
                expected = theirs(kept, other, max_length=limit, truncation=strategy, padding="max_length")
                assert {key: mine[key] for key in expected} == dict(expected), (kept, other, strategy)
        rows = small(PAIRS, max_length=limit, return_tensors="pt", return_offsets=True)
        expected = theirs(
            PAIRS, max_length=limit, truncation=True, padding=True, return_tensors="pt", return_offsets_mapping=True
        )
        assert all(torch.equal(rows[key], expected[key]) for key in ("input_ids", "attention_mask", "offset_mapping"))
        without = small(PAIRS[0][0], add_special_tokens=False, max_length=limit)["input_ids"]
        cut = theirs(PAIRS[0][0], add_special_tokens=False, max_length=limit, truncation=True)["input_ids"]
        assert without == cut
    finally:
        small.truncation_side = small.padding_side = theirs.truncation_side = theirs.padding_side = "right"


def test_a_text_that_must_not_be_cut(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text 1: .* cannot be cut to 8 by 'only_first'"):
        small([("a", "b"), ("a", "the film is dull " * 5)], max_length=8, truncation="only_first")


def test_half_a_surrogate_pair(small: Tokenizer) -> None:
    for texts in (["fine", "a \ud83d b"], [("fine", "fine"), ("fine", "a \ud83d b")]):
        with pytest.raises(ValueError, match=r"text 1: half a surrogate pair, U\+D83D, at position 2"):
            small(texts)
    with pytest.raises(ValueError, match=r"text 0: half a surrogate pair, U\+DC00, at position 0"):
        small("\udc00", split_special_tokens=True, return_offsets=True)
    assert small("\U0001f600 a")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((None,), {}, TypeError, "text must be a str or a list, not NoneType"),
        ((["a", None],), {}, TypeError, "row 1 is None; expected a str"),
        (([["a", "b"], ["a"]],), {}, TypeError, "row 1 is .*expected a pair"),
        (([["a", "b", "c"]],), {}, TypeError, "row 0 is .*expected a pair"),
        (({"text": "a"},), {}, TypeError, "not dict"),
        ((iter(["a"]),), {}, TypeError, "text must be a str or a list"),
        ((["a"], 5), {}, TypeError, "text_pair must be a str or a list, not int"),
        ((["a"], ["b", "c"]), {}, ValueError, "1 texts and 2 second texts"),
        (("a", b"b"), {}, TypeError, "text_pair is bytes"),
        ((["x" * 10_000, 3],), {}, TypeError, "^row 1 is 3; expected a str$"),
        (([["y" * 10_000]],), {}, TypeError, "^row 0 is .{1,100}; expected"),
        (("a",), {"max_length": "8"}, TypeError, "max_length must be an int, not str"),
        (("a",), {"max_length": 8.0}, TypeError, "max_length must be an int, not float"),
        (("a",), {"max_length": True}, TypeError, "max_length must be an int, not bool"),
        (("a",), {"max_length": -1}, ValueError, "max_length is -1"),
        (("a",), {"truncation": "longest"}, ValueError, "truncation is 'longest'; known"),
        (("a",), {"return_tensors": "np"}, ValueError, "return_tensors is 'np'"),
        (("a",), {"padding": "left"}, ValueError, "padding is 'left'"),
    ],
)
def test_bad_arguments(small: Tokenizer, arguments: tuple, options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        small(*arguments, **options)


def test_empty_inputs(small: Tokenizer) -> None:
    for options in ({}, {"truncation": True}, {"padding": True}, {"return_offsets": True}, {"max_length": 5}):
        assert small([], **options)["input_ids"] == []
        assert small([], [], **options)["input_ids"] == []
    assert small("")["input_ids"] == [small.cls_token_id, small.sep_token_id]
    assert small("", "")["input_ids"] == [small.cls_token_id, small.sep_token_id, small.sep_token_id]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_tokenizes_that_was_forked_while_a_thread_did(small: Tokenizer) -> None:
    texts = [line * 40 for line in CORPUS]
    expected = small(CORPUS, max_length=6, split_special_tokens=True)
    stop, started = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            small(texts, max_length=9)
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that waits for ever is ended, which is a failure
                same = small(CORPUS, max_length=6, split_special_tokens=True) == expected
                os._exit(0 if same else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def test_a_call_changes_nothing_that_another_could_wait_for(small: Tokenizer, tmp_path: Path) -> None:
    before = small.backend.to_str()
    small(CORPUS, max_length=5, return_tensors="pt", split_special_tokens=True)
    small.save(tmp_path)
    assert small.backend.to_str() == before
    assert small.backend.truncation is None
    assert small.backend.padding is None
