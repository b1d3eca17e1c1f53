"""fit: resuming gives the losses of an uninterrupted run; what it refuses and starts from; the shipped model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import albert_fast
from albert_fast import ALBERTConfig
from albert_fast.runtime.locking import LockedError
from albert_fast.tasks.classify import TextClassifier
from albert_fast.testing import require_data
from albert_fast.text.tokenizer import load_tokenizer
from albert_fast.training import Recipe, evaluate, fit
from albert_fast.training.checkpointing import LOCK_NAME, STATE_NAME, claimed
from albert_fast.training.optimization import linear_schedule
from albert_fast.training.tasks import base

CONFIG = ALBERTConfig(
    embedding_size=16,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=64,
    num_hidden_layers=2,
    max_position_embeddings=16,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)


RECIPE = Recipe(
    epochs=2,
    batch_size=8,
    learning_rate=3e-3,
    max_length=16,
    piece_dropout=0.1,
    label_smoothing=0.1,
    ema_decay=0.9,
    pretrain_epochs=1,
    pretrain_batch_size=8,
    seed=5,
    checkpoint_steps=3,
)


@pytest.fixture
def text_files(tmp_path: Path) -> tuple[Path, Path]:
    """80 and 24 labelled lines of made-up words: positive iff 'good' is among them."""
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    generator = np.random.default_rng(0)
    words = [a + b for a in "kmprst" for b in ("alu", "enor", "isti", "obar", "upil")]
    files = []
    for name, count in (("train.tsv", 80), ("dev.tsv", 24)):
        lines = ["text\tlabel"]
        for i in range(count):
            text = list(generator.choice(words, generator.integers(2, 9)))
            text[len(text) // 2] = "good" if i % 2 else "bad"
            lines.append(" ".join(text) + f"\t{i % 2}")
        files.append(tmp_path / name)
        files[-1].write_text("\n".join(lines) + "\n")
    return files[0], files[1]


def run_fit(files: tuple[Path, Path], folder: Path, **more: object) -> list[dict[str, object]]:
    """fit on a tiny model; its history without the times."""
    arguments = {"dev_file": files[1], "recipe": RECIPE, "config": CONFIG, "vocab_size": 60, "device": "cpu"} | more
    history = fit(files[0], folder, progress=False, **arguments).history
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [4, 9, 16, 20], ids=["pretrain", "between-stages", "classify", "second-epoch"])
def test_resume_gives_the_losses_of_an_uninterrupted_run(
    text_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = run_fit(text_files, tmp_path / "whole")
    steps = 0
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps > after:
            raise Killed
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(Killed):
        run_fit(text_files, tmp_path / "cut")
    monkeypatch.undo()
    assert run_fit(text_files, tmp_path / "cut", resume=True) == whole
    log = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in log[1:]] == ["pretrain", "classify", "classify"]
    one = albert_fast.ALBERTForSequenceClassification.from_pretrained(tmp_path / "whole").state_dict()
    two = albert_fast.ALBERTForSequenceClassification.from_pretrained(tmp_path / "cut").state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_fit_refuses_what_does_not_fit(text_files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = Recipe(epochs=1, max_length=16)
    run_fit(text_files, folder, recipe=short)
    with pytest.raises(FileExistsError, match="resume"):
        run_fit(text_files, folder, recipe=short)
    with pytest.raises(ValueError, match=r"learning_rate was 0.0005, now 1\.0"):
        run_fit(text_files, folder, recipe=Recipe(epochs=1, max_length=16, learning_rate=1.0), resume=True)
    (folder / STATE_NAME).write_bytes((folder / STATE_NAME).read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        run_fit(text_files, folder, recipe=short, resume=True)
    with pytest.raises(ValueError, match="17 and position_shift 0 need 17 positions, the model has 16"):
        run_fit(text_files, tmp_path / "long", recipe=Recipe(max_length=17))
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf)"):
        run_fit(text_files, tmp_path / "far", recipe=Recipe(max_length=16, learning_rate=1e30))


def test_more_epochs_go_on_with_the_rates_of_a_run_of_that_length(
    text_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    short = dataclasses.replace(RECIPE, pretrain_epochs=0)
    longer = dataclasses.replace(short, epochs=4, checkpoint_steps=7)
    first = run_fit(text_files, tmp_path / "run", recipe=short)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    rates.clear()
    history = run_fit(text_files, tmp_path / "run", recipe=longer, resume=True)
    assert history[:2] == first
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    weights = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(weights.parameters(), lr=3e-3)
    planned = linear_schedule(optimizer, 40, short.warmup_ratio)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        planned.step()
    assert rates == expected[20:]
    assert run_fit(text_files, tmp_path / "again", recipe=longer, resume=True) == history
    assert run_fit(text_files, tmp_path / "again", recipe=longer, resume=True) == history  # nothing is left to do
    with pytest.raises(ValueError, match=r"4 epochs are done or begun.*cannot end after 3"):
        run_fit(text_files, tmp_path / "run", recipe=dataclasses.replace(short, epochs=3), resume=True)


def test_the_default_rate_learns_from_scratch(text_files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe(epochs=20, batch_size=8, max_length=16)
    history = run_fit(text_files, tmp_path / "new", recipe=recipe)
    assert max(record["dev_accuracy"] for record in history) > 0.8  # guessing gets 0.5
    assert json.loads((tmp_path / "new" / "log.jsonl").read_text().splitlines()[0])["learning_rate"] == 5e-4
    tuned = dataclasses.replace(recipe, epochs=1)
    run_fit(text_files, tmp_path / "tuned", recipe=tuned, config=None, init_from=tmp_path / "new")
    assert json.loads((tmp_path / "tuned" / "log.jsonl").read_text().splitlines()[0])["learning_rate"] == 5e-4
    rates = [recipe.completed(trained_width=width, metric="f1").learning_rate for width in (None, 16, 128, 768, 4096)]
    assert rates == pytest.approx([5e-4, 5e-4, 3e-4, 5e-5, 9.375e-6])


def test_ctrl_c_finishes_the_step_and_saves(
    text_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, pretrain_epochs=0, checkpoint_steps=None)
    whole = run_fit(text_files, tmp_path / "whole", recipe=recipe)
    steps, real = 0, torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 14:  # Ctrl-C comes in the middle of a step
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background may have it ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            with pytest.raises(KeyboardInterrupt, match=r"in epoch 2 of 2 \(classify\), after step 4"):
                run_fit(text_files, tmp_path / "cut", recipe=recipe)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (tmp_path / "cut").glob(".*")] == []  # no temporary file and no lock
    steps = 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert run_fit(text_files, tmp_path / "cut", recipe=recipe, resume=True) == whole
    assert steps == 6, "the steps before the interruption were done again"


@pytest.mark.parametrize(
    ("error", "says"),
    [(MemoryError, ""), (KeyboardInterrupt, r"in epoch 1 of 2 \(classify\)")],
    ids=["error", "ctrl_c"],
)
def test_an_error_in_the_dev_set_costs_no_epoch(
    text_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    says: str,
) -> None:
    recipe = dataclasses.replace(RECIPE, pretrain_epochs=0, checkpoint_steps=None)
    whole = run_fit(text_files, tmp_path / "whole", recipe=recipe)

    def fails(*_args: object, **_options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(base, "test", fails)
        with pytest.raises(error, match=says):
            run_fit(text_files, tmp_path / "cut", recipe=recipe)
    steps, real = [], torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *arguments: steps.append(1) or real(*arguments))
        assert run_fit(text_files, tmp_path / "cut", recipe=recipe, resume=True) == whole
    assert len(steps) == 10, "the first epoch was trained again"


def test_what_dead_runs_left_is_removed(text_files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = Recipe(epochs=1, max_length=16)
    run_fit(text_files, folder, recipe=recipe)
    left = [folder / f".{name}.0123456789abcdef.part" for name in (STATE_NAME, "log.jsonl")]
    for path in left:
        path.mkdir()
        (path / "half").write_bytes(b"half")
    left.append(folder / LOCK_NAME)
    left[-1].write_bytes(b"half")
    run_fit(text_files, folder, recipe=recipe, resume=True)
    assert [path for path in left if path.exists()] == []


def test_a_second_run_is_kept_out_of_the_folder(text_files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder, resume=False):
        for resume in (False, True):
            with pytest.raises(LockedError, match=f"another run is writing there.* {os.getpid()} "):
                run_fit(text_files, folder, resume=resume)
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    assert not folder.exists()
    with pytest.raises(ValueError, match="need 17 positions") as kept:  # its frames live on
        run_fit(text_files, folder, recipe=Recipe(epochs=1, max_length=17))
    assert not folder.exists()
    run_fit(text_files, folder, recipe=Recipe(epochs=1, max_length=16))
    assert kept.tb is not None


def test_fit_starts_from_a_checkpoint_and_predicts_numbers(text_files: tuple[Path, Path], tmp_path: Path) -> None:
    run_fit(text_files, tmp_path / "first", recipe=Recipe(epochs=1, max_length=16))
    numbers = tmp_path / "numbers.jsonl"
    records = [{"text": f"good {word}", "label": len(word) / 2} for word in ("a", "kalu", "misti")]
    numbers.write_text("".join(json.dumps(record) + "\n" for record in records))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*at random")  # a new task has a new head
        history = run_fit(
            (numbers, numbers),
            tmp_path / "second",
            init_from=tmp_path / "first",
            config=None,
            recipe=Recipe(epochs=1, max_length=16, metric="mse"),
        )
    assert history[0]["dev_mse"] == pytest.approx(history[0]["dev_loss"], rel=1e-4)
    one, two = (load_tokenizer(tmp_path / name).get_vocab() for name in ("first", "second"))
    assert one == two
    assert load_tokenizer(tmp_path / "first").model_max_length == CONFIG.max_position_embeddings


SHIPPED = Path(albert_fast.__file__).parent / "data" / "sst2-small"


def stated(classifier: str) -> int:
    """How many of the 872 test sentences the card says that `classifier` gets right."""
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"\| {classifier}[^|]*\|.*\| (\d+) of 872 \|", card)
    assert found is not None
    return int(found[1])


def test_shipped_model_is_small_and_knows_its_labels() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 12e6
    model = albert_fast.ALBERTForSequenceClassification.from_pretrained(SHIPPED)
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 5e6
    assert model.config.id2label == {0: "negative", 1: "positive"}
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    texts = ["a charming and moving film .", "a dull , lifeless and stupid mess ."]
    with torch.no_grad():
        logits = model(**load_tokenizer(SHIPPED)(texts, return_tensors="pt")).logits
    assert logits.argmax(1).tolist() == [1, 0]


def test_a_checkpoint_may_be_named_by_its_file_of_weights(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    weights, file = SHIPPED / "model.safetensors", tmp_path / "some.tsv"
    texts = ["a charming and moving film", "a dull , lifeless mess", "[SEP] is text"]
    file.write_text("".join(f"{text}\t{label}\n" for text, label in zip(texts, (1, 0, 1), strict=True)))
    columns = {"text_column": 0, "label_column": 1, "device": "cpu", "progress": False}
    assert evaluate(weights, file, **columns) == evaluate(SHIPPED, file, **columns)
    assert TextClassifier(weights, device="cpu")(texts) == TextClassifier(SHIPPED, device="cpu")(texts)
    recipe = Recipe(epochs=1, batch_size=3, max_length=16)
    first, second = (
        fit(file, tmp_path / name, init_from=start, recipe=recipe, **columns).history[-1]["train_loss"]
        for name, start in (("from_file", weights), ("from_folder", SHIPPED))
    )
    assert first == second


def test_shipped_model_is_as_accurate_as_its_card_says() -> None:
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    result = evaluate(SHIPPED, require_data("SST-2/test.tsv"), device="cpu", progress=False)
    assert result.examples == 872
    # One sentence may stand on the edge and fall on the other side where another instruction set rounds otherwise.
    right = round(result.metrics["accuracy"] * 872)
    assert abs(right - stated("this model")) <= 1
    assert right >= max(stated("TF-IDF and logistic regression"), stated("the same over"))
