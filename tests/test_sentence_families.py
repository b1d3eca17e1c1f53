"""Tokenizers and encoders of every family through TextEncoder and TextScorer, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from albert_fast import AutoModel, TextEncoder, TextScorer, load_tokenizer
from albert_fast.cli import build_app
from albert_fast.tasks.classify import TextClassifier
from albert_fast.tasks.quantize import quantize_checkpoint

tokenizers = pytest.importorskip("tokenizers", reason="the text extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["a", "fine", "film", "quiet", "and", "odd", "the", "plot", "is", "mess", "dull", "but", "long"]
TEXTS = [" ".join((WORDS * 9)[i : i + i * i % 37]) for i in range(15)] + ["Héllo wörld 你好", "", "  two  spaces "]
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,
}


def wordpiece() -> dict[str, int]:
    return {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}


def unigram() -> list[tuple[str, float]]:
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    model.train_from_iterator(TEXTS * 3, trainer)
    return [tuple(piece) for piece in json.loads(model.to_str())["model"]["vocab"]]


def byte_level() -> dict[str, Any]:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    model.train_from_iterator(TEXTS * 3, trainer)
    content = json.loads(model.to_str())["model"]
    return {"vocab": content["vocab"], "merges": [tuple(pair) for pair in content["merges"]]}


def camembert() -> list[tuple[str, float]]:
    pieces = [piece for piece in unigram() if not piece[0].startswith("<")]
    special = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
    return [*((name, -100.0) for name in special), *pieces, ("<mask>", 0.0)]


# Family -> its classes' prefix, the arguments of its tokenizer, fields of its configuration.
FAMILIES: dict[str, tuple[str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "bert": ("Bert", lambda: {"vocab": wordpiece()}, {}),
    "electra": ("Electra", lambda: {"vocab": wordpiece()}, {"embedding_size": 24}),
    "distilbert": ("DistilBert", lambda: {"vocab": wordpiece()}, {"hidden_dim": 48}),
    "roberta": ("Roberta", byte_level, {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", lambda: {"vocab": [*unigram(), ("<mask>", 0.0)]}, {"pad_token_id": 1}),
    "camembert": ("Camembert", lambda: {"vocab": camembert()}, {"pad_token_id": 1, "type_vocab_size": 1}),
}


def save(family: str, folder: Path, head: str) -> tuple[Any, Any]:
    """transformers' tokenizer and a tiny model of a family, saved in `folder`."""
    prefix, arguments, fields = FAMILIES[family]
    tokenizer = getattr(transformers, f"{prefix}TokenizerFast")(**arguments())
    torch.manual_seed(2)
    config = getattr(transformers, f"{prefix}Config")(vocab_size=len(tokenizer), num_labels=1, **SMALL, **fields)
    model = getattr(transformers, f"{prefix}{head}")(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, model


@pytest.mark.parametrize("bare", [False, True], ids=["with its settings", "tokenizer.json alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_of_every_family(family: str, bare: bool, tmp_path: Path) -> None:
    prefix, arguments, _ = FAMILIES[family]
    theirs = getattr(transformers, f"{prefix}TokenizerFast")(**arguments())
    theirs.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        if bare and file.name != "tokenizer.json":
            file.unlink()
    ours = load_tokenizer(tmp_path)
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    cut = theirs(firsts, seconds, truncation="longest_first", max_length=12, return_token_type_ids=True)
    for key, rows in ours(PAIRS, max_length=12).items():
        assert rows == cut[key], key
    for name in ("pad", "cls", "sep", "mask"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    text = f"the {ours.mask_token} film {ours.sep_token}"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.sep_token_id not in ours(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_of_every_family(family: str, tmp_path: Path) -> None:
    tokenizer, model = save(family, tmp_path, "Model")
    ours = TextEncoder(tmp_path, device="cpu", max_length=30)
    vectors = ours.encode(TEXTS, batch_tokens=70)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=30, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = ((states * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_family(family: str, tmp_path: Path) -> None:
    tokenizer, model = save(family, tmp_path, "ForSequenceClassification")
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    batch = tokenizer(firsts, seconds, padding=True, truncation=True, max_length=30, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[:, 0]
    expected = logits.sigmoid().numpy()
    scores = TextScorer(tmp_path, device="cpu", max_length=30).score(PAIRS, batch_tokens=90)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=2e-5)
    values = [answer["LABEL_0"] for answer in TextClassifier(tmp_path, device="cpu", max_length=30)(PAIRS)]
    np.testing.assert_allclose(values, logits.numpy(), rtol=1e-4, atol=5e-5)  # one label: a regression


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_integers_of_every_family_are_read_from_the_folder(family: str, head: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save(family, source, head)
    assert quantize_checkpoint(source, out, "int16", TEXTS, max_length=30) > 32
    assert AutoModel.from_pretrained(out).execution.quantized == "int16"
    if head == "Model":
        exact, stored = (TextEncoder(place, device="cpu", max_length=30).encode(TEXTS) for place in (source, out))
    else:
        exact, stored = (TextScorer(place, device="cpu", max_length=30).score(PAIRS) for place in (source, out))
        labels = TextClassifier(out, device="cpu", max_length=30)
        assert labels.precision == "int16"
        assert labels(["a film"])[0].keys() == {"LABEL_0"}
    rounding = np.abs(exact - stored).max()
    assert 0 < rounding < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_commands_that_compare_take_every_family(family: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save(family, source, "ForSequenceClassification")
    demo, bench = ["demo", "a film", "--rounds", "1"], ["bench", "-b", "2", "-l", "9", "--rounds", "1"]

    def run(*command: str, code: int = 0) -> str:
        result = CliRunner().invoke(build_app(), command)
        assert result.exit_code == code, result.output
        return result.output

    assert "Same answers as transformers'" in run(*demo, "-m", str(source))
    assert run(*bench, "-m", str(source)).count("fp32") == 3
    assert "random ids" in run("quantize", str(source), str(out), "--precision", "int8")
    for command in (demo, bench):
        assert "holds integers" in run(*command, "-m", str(out), code=1)
    assert "LABEL_0" in run(*demo, "--no-bench", "-m", str(out))
