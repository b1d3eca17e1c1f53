"""How TextEncoder takes its texts: windows, batches of tokens, tokenising ahead, memory, and texts that are none."""

from __future__ import annotations

import json
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from albert_fast import ALBERTModel, TextEncoder, TextScorer
from albert_fast.tasks import pooling as pooling_parts
from albert_fast.tasks import token_batches
from albert_fast.tasks.classify import TextClassifier
from albert_fast.tasks.errors import UsageError
from albert_fast.tasks.fill_mask import MaskFiller
from albert_fast.tasks.pooling import MODES, pool
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.tokenizer import train_tokenizer

pytest.importorskip("tokenizers", reason="the text extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["a", "fine", "film", "quiet", "and", "odd", "the", "plot", "is", "mess", "dull", "but", "long", "query", ":"]
TEXTS = [" ".join((WORDS * 9)[i : i + i * i % 37]) for i in range(23)] + ["A FINE Film", "film"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(TEXTS * 3, 40)
    return save_small_model(
        ALBERTModel, small_text_config(tokenizer, "no", "yes"), tokenizer, tmp_path_factory.mktemp("encoder")
    )


def assert_same(ours: np.ndarray, expected: np.ndarray) -> None:
    assert (ours.shape, ours.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def test_texts_that_are_none(encoder: Path) -> None:
    ours = TextEncoder(encoder, device="cpu")
    for bad, message in (
        ("a film", "put it in a list"),
        (["a", 3], "text 1 is 3"),
        ([None], "text 0 is None"),
        ([b"a"], "text 0 is b'a'"),
        ([("a", 1)], "text 0 is"),
    ):
        with pytest.raises(TypeError, match=message):
            ours.encode(bad)  # type: ignore[arg-type]
    for settings in ({}, {"truncate_dim": 33}):
        with pytest.raises(ValueError, match="truncate_dim is 33; the vectors have 32 columns"):
            TextEncoder(encoder, device="cpu", **settings).encode(["a"], truncate_dim=33)
    for wrong in ({"batch_tokens": 0}, {"truncate_dim": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            ours.encode(["a"], **wrong)
    assert ours.encode([]).shape == (0, 32)
    assert ours.encode(["a", ("a", None), ("a", "film")]).shape == (3, 32)
    with pytest.raises(FileNotFoundError):
        TextEncoder(encoder.parent / "no-such-folder")


@pytest.mark.parametrize("kind", [TextEncoder, TextScorer])
def test_what_is_no_checkpoint(kind: type, encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a film")
    for path, message in (
        (tmp_path, "no config.json in"),
        (tmp_path / "texts.txt", "texts.txt is no checkpoint"),
        ("", "path is empty"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            kind(path)
    with pytest.raises(ValueError, match="max_length is 1, the special tokens alone take 2"):
        TextEncoder(encoder, max_length=1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TextClassifier, "has no classifier; `albert-fast encode` (TextEncoder) reads it"),
        (TextScorer, "has no classifier; `albert-fast encode` (TextEncoder) reads it"),
        (MaskFiller, "has no masked-language head, which fills masks"),
    ],
)
def test_an_encoder_alone_has_no_head(kind: type, message: str, encoder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        kind(encoder)
    assert str(caught.value) == f"{encoder} {message}"


def test_many_windows_give_the_same_vectors_in_order(encoder: Path) -> None:
    ours = TextEncoder(encoder, device="cpu")
    texts = [TEXTS[i * 7 % len(TEXTS)] for i in range(600)]
    one = ours.encode(TEXTS)
    many = ours.encode(texts, batch_tokens=64)
    assert_same(many, one[[i * 7 % len(TEXTS) for i in range(600)]])


def test_a_pooling_does_not_depend_on_the_other_texts() -> None:
    torch.manual_seed(0)
    states = torch.randn(90, 16)
    for mode in MODES:
        alone = pool(states[50:57], [7], (mode,))
        assert torch.equal(pool(states, [50, 7, 33], (mode,))[1:2], alone)
    for how in ("sum", "max"):  # a GPU sums in one kernel
        rows = torch.segment_reduce(states, how, lengths=torch.tensor([50, 7, 33]), axis=0)
        torch.testing.assert_close(pooling_parts._reduced(how, states, torch.tensor([50, 7, 33])), rows)


def test_the_next_window_is_tokenised_while_the_model_computes() -> None:
    started = [threading.Event() for _ in range(4)]
    threads = set()

    def work(item: int) -> int:
        started[item].set()
        threads.add(threading.get_ident())
        return item * 10

    for position, result in enumerate(token_batches._ahead(work, range(4))):
        assert result == position * 10
        assert position == 3 or started[position + 1].wait(30), "the next item waits for the consumer"
        assert not any(event.is_set() for event in started[position + 2 :]), "more than one item is ahead"
    assert threads.isdisjoint({threading.get_ident()})

    def fail(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(token_batches._ahead(fail, range(3)))


def test_memory_does_not_grow_with_the_number_of_texts(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = TextEncoder(encoder, device="cpu", prompt="query : ")
    # What the model itself takes depends on the batch; without it the test is quick and its memory is that of the texts.
    monkeypatch.setattr(ours, "_pooled", lambda batch, skip: torch.zeros(len(batch.lengths), ours.width))

    def peak(count: int) -> int:
        texts = ["a fine film " * 8] * count
        tracemalloc.start()
        try:
            vectors = ours.encode(texts, batch_tokens=256)
            return tracemalloc.get_traced_memory()[1] - vectors.nbytes
        finally:
            tracemalloc.stop()

    peak(64)  # what the first call keeps
    assert (peak(3000) - peak(300)) / 2700 < 100, "bytes for each text, whose ids alone take several hundred"


@pytest.mark.parametrize("how", ["mean", "cls", "lasttoken", "pooler"])
def test_a_text_without_tokens(encoder: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(encoder, tmp_path / "bare")
    file = tmp_path / "bare" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(content))
    ours = TextEncoder(tmp_path / "bare", pooling=how, device="cpu")
    found = ours.encode(["", "a film", "", "odd"])
    assert_same(found[[1, 3]], ours.encode(["a film", "odd"]))
    assert not found[[0, 2]].any()
    assert not ours.encode(["", ""]).any()


def test_a_bad_text_is_named_by_its_place(encoder: Path) -> None:
    ours = TextEncoder(encoder, device="cpu")
    texts = ["a film"] * 500
    texts[431] = "a \ud800"
    with pytest.raises(ValueError, match=r"text 431 holds half a surrogate pair, U\+D800"):
        ours.encode(texts, batch_tokens=32)
    assert ours.encode(np.array(texts[:3])).shape == (3, 32)
    assert ours.encode(iter(texts[:3])).shape == (3, 32)  # type: ignore[arg-type]
