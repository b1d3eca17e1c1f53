"""fit and evaluate for every task: what is read, learnt, measured and stored; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from albert_fast import ALBERTConfig
from albert_fast.tasks.answer import QuestionAnswerer
from albert_fast.tasks.choose import TextChooser
from albert_fast.tasks.classify import TextClassifier, best_label
from albert_fast.tasks.tag import TextTagger
from albert_fast.text.tokenizer import load_tokenizer
from albert_fast.training import Recipe, evaluate, fit
from albert_fast.training.data import Examples
from albert_fast.training.tasks import TASKS

for library in ("tokenizers", "seqeval", "torchmetrics", "sklearn"):
    pytest.importorskip(library, reason="an extra that [test] brings is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ALBERTConfig(
    embedding_size=16,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=64,
    num_hidden_layers=1,
    max_position_embeddings=40,
    hidden_act="relu",
)
WORDS = ["kalu", "misti", "penor", "robar", "tupil", "salu", "nemo", "dira"]
Rows = list[dict[str, Any]]


def tagged(count: int, generator: np.random.Generator) -> Rows:
    """A name of one or two words is marked by the word before it."""
    rows = []
    for _ in range(count):
        words, tags = list(generator.choice(WORDS, 3)), ["O", "O", "O"]
        for kind in ("person", "place")[: generator.integers(1, 3)]:
            words += [f"the{kind}", *generator.choice(["Anna", "Bern"], 2)]
            tags += ["O", f"B-{kind}", f"I-{kind}"]
        rows.append({"tokens": words, "tags": tags})
    return rows


def asked(count: int, generator: np.random.Generator) -> Rows:
    """The answer is the word between "it is" and a full stop; without that there is none."""
    rows = []
    for number in range(count):
        before, after = (
            " ".join(generator.choice(WORDS, 4)),
            " ".join(generator.choice(WORDS, generator.integers(1, 60))),
        )
        answer = str(generator.choice(["anna", "bern"]))
        has = bool(number % 4)
        context = f"{before} it is {answer}. {after}" if has else f"{before} {after}"
        rows.append({"question": "who is it?", "context": context, "answer": answer if has else "", "id": str(number)})
    return rows


def labelled(count: int, generator: np.random.Generator) -> Rows:
    rows = []
    for _ in range(count):
        topics = [topic for topic in ("film", "money") if generator.random() < 0.5]
        rows.append({"text": " ".join([*topics, *generator.choice(WORDS, 3), *topics]), "label": topics})
    return rows


def chosen(count: int, generator: np.random.Generator) -> Rows:
    rows = []
    for number in range(count):
        choices = [" ".join(generator.choice(WORDS, generator.integers(1, 5))) for _ in range(3)]
        choices[number % 3] += " right"
        rows.append({"text": " ".join(generator.choice(WORDS, 2)), "choices": choices, "label": number % 3})
    return rows


MADE = {"tag": tagged, "answer": asked, "multilabel": labelled, "choose": chosen}


def write(rows: Rows, path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("task", "metric", "epochs"),
    [("tag", "f1", 6), ("answer", "f1", 6), ("multilabel", "f1", 20), ("choose", "accuracy", 6)],
)
def test_a_model_learns_its_task_and_is_measured_for_it(tmp_path: Path, task: str, metric: str, epochs: int) -> None:
    generator = np.random.default_rng(0)
    train, dev = (write(MADE[task](n, generator), tmp_path / f"{n}.jsonl") for n in (160, 40))
    recipe = Recipe(epochs=epochs, batch_size=8, learning_rate=3e-3, max_length=40, seed=1)
    arguments = {"config": CONFIG, "vocab_size": 90, "device": "cpu", "progress": False}
    result = fit(train, tmp_path / "model", dev_file=dev, test_file=dev, recipe=recipe, **arguments)
    assert (result.metric, result.best_value) == (metric, result.test.metrics[metric])
    assert result.best_value > 0.9, result.history
    assert result.test.task == task
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["architectures"][0].endswith(TASKS[task].architecture)
    measured = evaluate(tmp_path / "model", dev, device="cpu", progress=False, batch_size=8)
    assert measured == result.test
    equal = [one == two for one, two in zip(measured.expected, measured.predicted, strict=True)]
    assert len(equal) == 40
    if task == "answer":
        equal = [two in (one or [""]) for one, two in zip(measured.expected, measured.predicted, strict=True)]
        assert stored["answer_may_be_absent"] is True
    assert sum(equal) > 30
    if task == "tag":
        tagger = TextTagger(tmp_path / "model", device="cpu")
        sentences = [row["tokens"] for row in map(json.loads, dev.read_text().splitlines())]
        assert [[word.tag for word in words] for words in tagger.tags(sentences)] == measured.predicted
        found = tagger(["kalu misti penor theperson Anna Bern"])[0]
        assert [(one.kind, one.text, one.start, one.end) for one in found] == [("person", "Anna Bern", 27, 36)]
    if task == "choose":
        chooser = TextChooser(tmp_path / "model", device="cpu")
        scores = chooser([(row["text"], row["choices"]) for row in map(json.loads, dev.read_text().splitlines())])
        assert [own.index(max(own)) for own in scores] == measured.predicted
    if task == "answer":
        answerer = QuestionAnswerer(tmp_path / "model", device="cpu", batch_size=3)
        pairs = [(row["question"], row["context"]) for row in map(json.loads, dev.read_text().splitlines())]
        answers = answerer(pairs)
        assert [answer.text for answer in answers] == measured.predicted
        assert [
            context[one.start : one.end] for one, (_, context) in zip(answers, pairs, strict=True)
        ] == measured.predicted


@pytest.mark.parametrize("labels", [1, 3])
def test_metrics_of_several_labels_count_every_label(labels: int) -> None:
    """F1, precision and recall are over all labels of all examples, for a single label too."""
    generator = np.random.default_rng(labels)
    truth, found = (generator.random((40, labels)) < share for share in (0.4, 0.6))
    examples = Examples(["x"] * 40, truth.astype(float).tolist(), [f"l{number}" for number in range(labels)])
    scores = list(torch.from_numpy(np.where(found, 1.0, -1.0)))
    measured = TASKS["multilabel"].measured(
        0.0, None, examples, scores, ["f1", "accuracy", "precision", "recall"], None
    )
    right, precision, recall = (
        (truth & found).sum(),
        (truth & found).sum() / found.sum(),
        (truth & found).sum() / truth.sum(),
    )
    expected = [2 * right / (truth.sum() + found.sum()), (truth == found).all(1).mean(), precision, recall]
    assert list(measured.metrics.values()) == pytest.approx(expected)
    nothing = TASKS["multilabel"].measured(0.0, None, examples, [-torch.ones(labels)] * 40, ["f1"], None)
    assert nothing.metrics == {"f1": 0.0}, "no label is found"


def test_chinese_from_scratch_by_characters(tmp_path: Path) -> None:
    good, bad = "\u5f88\u597d", "\u5f88\u5dee"  # very good, very bad
    nouns = ["\u623f\u95f4", "\u670d\u52a1", "\u65e9\u9910", "\u4f4d\u7f6e"]
    rows = [{"text": f"{nouns[i % 4]}{(good, bad)[i // 4 % 2]}\u3002", "label": i // 4 % 2} for i in range(64)]
    recipe = Recipe(epochs=6, batch_size=8, max_length=16, learning_rate=5e-3)
    arguments = {"config": CONFIG, "vocab_kind": "wordpiece", "vocab_size": 60, "device": "cpu", "progress": False}
    result = fit(rows, tmp_path / "model", dev_file=rows, recipe=recipe, **arguments)
    assert result.best_value == 1.0
    assert load_tokenizer(tmp_path / "model").tokenize(rows[0]["text"]) == list(rows[0]["text"])
    found = TextClassifier(tmp_path / "model", device="cpu")([rows[1]["text"], rows[5]["text"]])
    assert [best_label(scores) for scores in found] == ["0", "1"]
