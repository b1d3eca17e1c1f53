"""TextScorer and `albert-fast rerank`: the scores of sentence-transformers' CrossEncoder, and clear errors without it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from albert_fast import TextScorer
from albert_fast.cli import build_app
from albert_fast.tasks.errors import UsageError

pytest.importorskip("tokenizers", reason="the text extra is not installed")
theirs = pytest.importorskip("sentence_transformers", reason="the oracle of these tests")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["a", "fine", "film", "quiet", "and", "odd", "the", "plot", "is", "mess", "dull", "but", "long"]
TEXTS = [" ".join((WORDS * 9)[i : i + 1 + i * i % 37]) for i in range(23)]
QUERY = "the odd film"
PAIRS = [*((QUERY, text) for text in TEXTS), (TEXTS[7], QUERY), (TEXTS[21], TEXTS[22]), ("", ""), ("a", "")]
APP = build_app()


def save(folder: Path, labels: int = 1, **config: Any) -> Path:
    """A tiny BERT classifier of pairs, as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=48,
        initializer_range=0.4,
        num_labels=labels,
        **sizes,
        **config,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("scorer"))


def assert_same(folder: Path) -> Any:
    ours = TextScorer(folder, device="cpu")
    expected = theirs.CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    for how in ({}, {"batch_tokens": 60}):
        scores = ours.score(PAIRS, **how)
        assert (scores.shape, scores.dtype) == (expected.shape, np.float32)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=2e-5)
    return ours


NAMED = "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("labels", "config"),
    [
        (1, {}),
        (3, {}),
        (1, {"sentence_transformers": {"activation_fn": NAMED, "version": "4"}}),
        (2, {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}),
        (1, {"sbert_ce_default_activation_function": NAMED}),
    ],
    ids=["sigmoid", "three outputs", "identity", "two sigmoids", "the older name"],
)
def test_scores(tmp_path: Path, labels: int, config: dict[str, Any]) -> None:
    assert_same(save(tmp_path / "model", labels, **config))


def test_a_folder_that_cross_encoder_saves(scorer: Path, tmp_path: Path) -> None:
    model = theirs.CrossEncoder(str(scorer), device="cpu", max_length=20, activation_fn=torch.nn.Tanh())
    model.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modules.json").is_file()
    assert assert_same(tmp_path / "saved").max_length == 20


def test_ranks(scorer: Path) -> None:
    ours, model = TextScorer(scorer, device="cpu"), theirs.CrossEncoder(str(scorer), device="cpu")
    for top in (None, 4):
        expected = [(row["corpus_id"], row["score"]) for row in model.rank(QUERY, TEXTS, top_k=top)]
        found = ours.rank(QUERY, TEXTS, top)
        assert [index for index, _ in found] == [index for index, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=2e-5)
    assert ours.rank(QUERY, []) == []
    assert [index for index, _ in ours.rank(QUERY, ["film", "a", "film"]) if index != 1] == [0, 2]


def test_what_a_scorer_refuses(scorer: Path, tmp_path: Path) -> None:
    ours = TextScorer(scorer, device="cpu")
    assert ours.score([]).shape == (0,)
    for bad, message in (
        (["a"], "pair 0 is one text"),
        ([("a", "b"), ("a", 2)], "text 1 is"),
        ("ab", "put it in a list"),
        ([("a", "b", "c")], "text 0 is"),
    ):
        with pytest.raises(TypeError, match=message):
            ours.score(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k is 0"):
        ours.rank(QUERY, TEXTS, 0)
    with pytest.raises(TypeError, match="put it in a list"):
        ours.rank(QUERY, "film")
    three = TextScorer(save(tmp_path / "three", 3), device="cpu")
    assert three.score([]).shape == (0, 3)
    with pytest.raises(ValueError, match="gives 3 scores, LABEL_0, LABEL_1, LABEL_2: ranking needs one"):
        three.rank(QUERY, TEXTS)
    with pytest.raises(ValueError, match=r"activation 'my_code.Thing'; known"):
        TextScorer(save(tmp_path / "code", sentence_transformers={"activation_fn": "my_code.Thing"}), device="cpu")
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    vectors = tmp_path / "vectors"
    parts = [models.Transformer(str(scorer)), models.Pooling(32)]
    theirs.SentenceTransformer(modules=parts, device="cpu").save(str(vectors))
    with pytest.raises(UsageError, match="gives vectors of texts, not scores"):
        TextScorer(vectors, device="cpu")


def rerank(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(APP, ["rerank", *map(str, arguments)])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def test_the_command(scorer: Path, tmp_path: Path) -> None:
    lines, rows = tmp_path / "texts.txt", tmp_path / "texts.jsonl.gz"
    lines.write_text("\n".join(TEXTS))
    with gzip.open(rows, "wt") as file:
        file.write("".join(json.dumps({"id": f"n{i}", "body": text}) + "\n" for i, text in enumerate(TEXTS)))
    expected = TextScorer(scorer, device="cpu").rank(QUERY, TEXTS)
    found = [line.split("\t") for line in rerank(QUERY, lines, "-m", scorer).stdout.splitlines()]
    assert [(int(line) - 1, text) for _, line, text in found] == [(index, TEXTS[index]) for index, _ in expected]
    assert [float(score) for score, _, _ in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    ran = rerank(
        QUERY, rows, "-m", scorer, "--top", 3, "--text-column", "body", "--format", "jsonl", "--batch-tokens", 64
    )
    best = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["id"] for row in best] == [f"n{index}" for index, _ in expected[:3]]
    assert [row["line"] - 1 for row in best] == [index for index, _ in expected[:3]]


def test_what_the_command_refuses(scorer: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "film"}\n{"text": 3}\n')
    ran = rerank(QUERY, bad, "-m", scorer, code=1)
    assert (ran.stdout, "line 2, column 'text': expected a string" in ran.stderr) == ("", True)
    assert "no such file" in rerank(QUERY, tmp_path / "none.txt", "-m", scorer, code=1).stderr.lower()
    lines = tmp_path / "texts.txt"
    lines.write_text("film\n")
    assert "ranking needs one" in rerank(QUERY, lines, "-m", save(tmp_path / "three", 3), code=1).stderr


WITHOUT = """
import sys
for name in ("sentence_transformers", "transformers"):
    sys.modules[name] = None
import json
from albert_fast import TextScorer
print(json.dumps(TextScorer(sys.argv[1], device="cpu").rank("the odd film", ["a film", "dull"])))
"""


def test_without_the_other_libraries(scorer: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT, scorer], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = theirs.CrossEncoder(str(scorer), device="cpu").rank("the odd film", ["a film", "dull"])
    assert [row[0] for row in json.loads(ran.stdout)] == [row["corpus_id"] for row in expected]
