"""The tasks as Python calls: vectors, labels and filled masks of texts, against the eager reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from albert_fast import ALBERTForMaskedLM, ALBERTForSequenceClassification
from albert_fast.models import reference
from albert_fast.tasks import token_batches
from albert_fast.tasks.classify import TextClassifier, best_label
from albert_fast.tasks.embed import TextEncoder
from albert_fast.tasks.errors import UsageError
from albert_fast.tasks.fill_mask import MaskFiller
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.batching import batches_by_length, tokenize
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer

pytest.importorskip("tokenizers", reason="the text extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a fine film, quiet and odd", "", "the plot is a mess " * 5, "dull", "film"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints: a classifier and a language model with one vocabulary."""
    tokenizer = train_tokenizer([*TEXTS, "never say never: a good, bad, new story!"] * 4, 44)
    config = small_text_config(tokenizer, "negative", "positive")
    made = {}
    for kind in (ALBERTForSequenceClassification, ALBERTForMaskedLM):
        made[kind.__name__] = save_small_model(kind, config, tokenizer, tmp_path_factory.mktemp(kind.__name__))
    return made


@pytest.mark.parametrize("pooling", [None, "cls", "pooler"])
def test_vectors_keep_the_order_of_the_texts(folders: dict[str, Path], pooling: str | None) -> None:
    folder = folders["ALBERTForSequenceClassification"]
    encoder = TextEncoder(folder, pooling=pooling, batch_size=2, device="cpu")
    vectors = encoder.encode(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), encoder.width), np.float32)
    tokenizer, plain = load_tokenizer(folder), reference.ALBERTModel.from_pretrained(folder)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            out = plain(**tokenizer(text, max_length=48, return_tensors="pt"))
        hidden = out.last_hidden_state[0]
        expected = {None: hidden.mean(0), "cls": hidden[0], "pooler": out.pooler_output[0]}[pooling]
        torch.testing.assert_close(torch.from_numpy(vector), expected, rtol=1e-4, atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.width)


def test_what_an_encoder_refuses(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="has no pooler"):
        TextEncoder(folders["ALBERTForMaskedLM"], pooling="pooler", device="cpu")
    with pytest.raises(ValueError, match=r"'median': known are cls, max, mean, .*, pooler"):
        TextEncoder(folders["ALBERTForMaskedLM"], pooling="median")
    with pytest.raises(ValueError, match="max_length 49 is more than the model's 48 positions"):
        TextEncoder(folders["ALBERTForMaskedLM"], max_length=49, device="cpu")


def test_labels_of_texts_and_pairs(folders: dict[str, Path]) -> None:
    folder = folders["ALBERTForSequenceClassification"]
    classifier = TextClassifier(folder, batch_size=2, device="cpu")
    tokenizer, plain = load_tokenizer(folder), reference.ALBERTForSequenceClassification.from_pretrained(folder)
    texts = ["a film", ("a film", "a dull plot"), ("dull", None)]
    for text, answer in zip(texts, classifier(texts), strict=True):
        with torch.no_grad():
            first, second = (text, None) if isinstance(text, str) else text
            logits = plain(**tokenizer(first, second, return_tensors="pt")).logits
        assert list(answer) == classifier.labels == ["negative", "positive"]
        assert list(answer.values()) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=2e-5)
        assert best_label(answer) == classifier.labels[int(logits.argmax())]


def test_many_texts_are_labelled_window_by_window(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = TextClassifier(folders["ALBERTForSequenceClassification"], device="cpu")
    pairs = [(f"{'film ' * (index % 9)}plot", "a dull plot" if index % 4 == 0 else None) for index in range(60)]
    texts = [pairs[index % 60] if index % 2 else list(pairs[index % 60]) for index in range(4000)]
    alone, windows = [classifier([pair])[0] for pair in pairs], []

    def counted(tokenizer: Any, window: list[Any], max_length: int) -> Any:
        windows.append(len(window))
        return tokenize(tokenizer, window, max_length)

    monkeypatch.setattr(token_batches, "tokenize", counted)
    for index, answer in enumerate(classifier(texts)):
        assert answer == pytest.approx(alone[index % 60], abs=2e-5)
    assert sum(windows) == len(texts)
    assert max(windows) < 2500, "the list is tokenised at once"
    assert classifier([]) == []


def test_what_a_classifier_refuses(folders: dict[str, Path]) -> None:
    classifier = TextClassifier(folders["ALBERTForSequenceClassification"], device="cpu")
    with pytest.raises(TypeError, match="texts must be a list of str"):
        classifier("a film")
    with pytest.raises(TypeError, match="text 1 is 3; expected a str"):
        classifier(["a film", 3])
    with pytest.raises(ValueError, match=r"text 1 holds half a surrogate pair, U\+D800"):
        classifier(["a film", "\ud800"])


def test_masks_are_filled(folders: dict[str, Path]) -> None:
    filler = MaskFiller(folders["ALBERTForMaskedLM"], device="cpu")
    found = filler("a [MASK] film is [MASK]", top_k=3)
    assert [len(row) for row in found] == [3, 3]
    for row in found:
        assert [one.score for one in row] == sorted((one.score for one in row), reverse=True)
        assert all(one.filled.count("[MASK]") == 1 for one in row)
    with pytest.raises(UsageError, match="top_k"):
        filler("a [MASK]", top_k=1000)
    with pytest.raises(ValueError, match=r"the text: no \[MASK\]"):
        filler("a film")


def test_batches_of_similar_length() -> None:
    assert batches_by_length([3, 1, 2, 1, 3], 2) == [[1, 3], [2, 0], [4]]
    assert batches_by_length([], 2) == []


def test_tokens_of_texts_and_pairs_in_any_mixture(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["ALBERTForMaskedLM"])
    texts = [("a film", "dull"), ("film", None), ("a", "b")]
    rows = tokenize(tokenizer, texts, 5)
    for index, (text, pair) in enumerate(texts):
        alone = tokenizer(text, pair, max_length=5)
        assert {key: values[index] for key, values in rows.items()} == alone
