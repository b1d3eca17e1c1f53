"""What a pass over a data set says of itself: a bar on a terminal, lines without one, early stopping and class weights."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from albert_fast import ALBERTConfig
from albert_fast.training import Recipe, fit, progress, train
from albert_fast.training.data import Examples
from albert_fast.training.tasks.base import class_weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Half(torch.nn.Module):
    """A model of one weight, whose loss is always 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.weight * 0 + torch.full((len(input_ids),), 0.5)


BATCHES = [{"input_ids": torch.zeros(3, 2), "labels": torch.zeros(3)} for _ in range(4)]


def run(shown: bool | str) -> None:
    model = Half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, BATCHES, lambda outputs, labels: outputs.mean(), optimizer, "cpu", progress=shown)


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run("epoch 1 of 2")
    assert capsys.readouterr().err == "", "less than half a minute"
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    run("epoch 1 of 2")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert re.fullmatch(r"epoch 1 of 2: step 3 of 4, loss 0\.5000, [\d.]+ texts/s, \d+:\d\d left", said[2])
    run(True)
    assert capsys.readouterr().err.startswith("train: step 1 of 4, ")
    run(False)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="the train extra is not installed")
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    run("epoch 2 of 2")
    assert "epoch 2 of 2" in screen.getvalue()
    assert "0/4" in screen.getvalue()


@pytest.fixture
def rows() -> list[dict[str, object]]:
    generator = np.random.default_rng(0)
    words = ["kalu", "misti", "penor", "robar"]
    return [{"text": " ".join(generator.choice(words, 4)), "label": int(i % 4 == 0)} for i in range(24)]


def test_a_run_ends_when_nothing_gets_better(rows: list[dict[str, object]], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    config = ALBERTConfig(
        embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1,
        max_position_embeddings=16,
    )  # fmt: skip
    said: list[str] = []
    recipe = Recipe(epochs=9, batch_size=8, max_length=16, learning_rate=1e-9, patience=2, class_weights="balanced")
    arguments = {
        "dev_file": rows,
        "recipe": recipe,
        "config": config,
        "device": "cpu",
        "progress": False,
        "vocab_size": 40,
    }
    result = fit(rows, tmp_path / "run", report=said.append, **arguments)
    assert (result.best_epoch, len(result.history)) == (1, 3)
    assert "no epoch after 1 was better: the run ends" in said
    again = fit(rows, tmp_path / "run", resume=True, **arguments)
    assert again.history == result.history, "a finished run goes on"


def test_balanced_classes_weigh_the_same_in_sum() -> None:
    pytest.importorskip("sklearn", reason="the train extra is not installed")
    examples = Examples(["a"] * 8, [0, 0, 0, 0, 0, 0, 2, 2], ["x", "y", "z"])
    weights = class_weights(examples, Recipe(class_weights="balanced"))
    assert weights.tolist() == pytest.approx([8 / 12, 1.0, 2.0])
    assert 6 * weights[0] == pytest.approx(float(2 * weights[2]))
    words = Examples([["a", "b", "c"]], [[0, 0, 1]], ["x", "y"])
    assert class_weights(words, Recipe(class_weights="balanced")).tolist() == pytest.approx([0.75, 1.5])
    assert class_weights(examples, Recipe()) is None
    with pytest.raises(ValueError, match="the labels are probabilities"):
        class_weights(Examples(["a"], [[0.5, 0.5]], ["x", "y"]), Recipe(class_weights="balanced"))
