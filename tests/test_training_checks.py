"""fit and evaluate refuse, before the first step, what would end a run after hours; nothing is written then."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTForSequenceClassification
from albert_fast.runtime.dispatch import BackendUnavailableError
from albert_fast.text.text_files import Columns
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer
from albert_fast.training import Recipe, evaluate, fit, loop
from albert_fast.training import run as run_module
from albert_fast.training.checkpointing import STATE_NAME
from albert_fast.training.tasks import TASKS

CONFIG = ALBERTConfig(
    embedding_size=16,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=64,
    num_hidden_layers=1,
    max_position_embeddings=16,
)
RECIPE = Recipe(epochs=1, batch_size=8, max_length=16)
WORDS = ["kalu", "misti", "penor", "robar", "tupil", "salu"]

pytest.importorskip("tokenizers", reason="the text extra is not installed")


class StepTakenError(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that comes too late meets this instead."""

    def step(*_args: object, **_options: object) -> None:
        raise StepTakenError

    monkeypatch.setattr(run_module, "train", step)
    monkeypatch.setattr(loop, "_step", step)


@pytest.fixture
def write(tmp_path: Path):
    """Writes a table of random texts with the given labels."""
    generator = np.random.default_rng(0)

    def table(labels: list[object], name: str = "train.tsv") -> Path:
        rows = [f"{' '.join(generator.choice(WORDS, 4))}\t{label}" for label in labels]
        (tmp_path / name).write_text("\n".join(["text\tlabel", *rows]) + "\n")
        return tmp_path / name

    return table


@pytest.fixture
def checkpoint(write, tmp_path: Path) -> Path:
    """A classifier for "bad" and "good", with its tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train", lambda *_args, after_step, **_options: after_step(1.0, 8))
        fit(write(["good", "bad"] * 4, "first.tsv"), tmp_path / "model", config=CONFIG, recipe=RECIPE, progress=False)
    return tmp_path / "model"


def refused(kind: type[BaseException], says: str | None, train: Path, folder: Path, **more: object) -> None:
    arguments = {"config": CONFIG, "recipe": RECIPE, "progress": False, "device": "cpu"} | more
    with pytest.raises(kind, match=says):
        fit(train, folder, **arguments)
    assert not folder.exists(), "something was written"


def test_labels_of_every_split(write, tmp_path: Path) -> None:
    train, folder = write(["good", "bad"] * 4), tmp_path / "out"
    for name in ("dev_file", "test_file"):
        wrong = write(["good", "bad", "odd"], "wrong.tsv")
        refused(
            ValueError,
            r"wrong.tsv, line 4: .* 'odd', expected one of \['bad', 'good'\]",
            train,
            folder,
            **{name: wrong},
        )
    for label in ("good", 0, 1, 2.5):
        only = write([label] * 5, "one.tsv")
        refused(ValueError, f"all 5 examples have the label .*{label}.*: there is nothing to learn", only, folder)
    texts = write([f"word{i}" for i in range(12)], "texts.tsv")
    refused(ValueError, r"12 different labels for 12 examples; is the label column right\?$", texts, folder)
    several = write([f"word{i},word{i + 1}" for i in range(12)], "several.tsv")
    refused(ValueError, "12 different labels for .*, with commas between, are --task multilabel", several, folder)
    with pytest.warns(UserWarning, match="no example has the label 'neutral'"):
        refused(StepTakenError, None, train, folder, label_names=["bad", "neutral", "good"])
    numbers = write([1.5, 2, 0.25], "numbers.tsv")
    refused(
        ValueError, "labels are words .'bad', 'good'., and the model predicts numbers", numbers, folder, dev_file=train
    )
    soft = tmp_path / "soft.jsonl"
    soft.write_text('{"text": "kalu", "label": [0.25, 0.75]}\n')
    refused(ValueError, "metrics need one label an example", train, folder, dev_file=soft)
    by_loss = dataclasses.replace(RECIPE, metric="loss")
    refused(StepTakenError, None, train, folder, dev_file=soft, recipe=by_loss)


def test_whole_numbers_of_a_split_are_numbers_where_the_model_predicts_numbers(write) -> None:
    examples = TASKS["regress"].read_split(write([1, 0, 1]), Columns(), None, for_metrics=True)
    assert (examples.labels, examples.label_names) == ([1.0, 0.0, 1.0], None)
    assert all(isinstance(label, float) for label in examples.labels)


def test_metrics_before_the_run(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, folder = write(["good", "bad"] * 4), tmp_path / "out"
    numbers = write([1.5, 2, 0.25], "numbers.tsv")
    accuracy = dataclasses.replace(RECIPE, metric="accuracy")
    refused(
        ValueError, "'accuracy' counts classes.*take mse, pearson", numbers, folder, dev_file=numbers, recipe=accuracy
    )
    refused(StepTakenError, None, numbers, folder, dev_file=numbers)  # chosen by mse
    bleu = dataclasses.replace(RECIPE, metric="bleu")
    refused(ValueError, "unknown metric 'bleu'; known: accuracy, f1", train, folder, recipe=bleu)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)  # as if it were not installed
    f1 = dataclasses.replace(RECIPE, metric="f1")
    for name in ("dev_file", "test_file"):
        refused(
            ImportError,
            r"'f1' needs scikit-learn: pip install 'albert-fast\[train\]'",
            train,
            folder,
            recipe=f1,
            **{name: train},
        )
    refused(StepTakenError, None, train, folder, dev_file=train)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("pretrain_learning_rate", -1.0),
        ("weight_decay", -0.1), ("warmup_ratio", 1.0), ("max_grad_norm", 0.0), ("max_length", 2), ("label_smoothing", 1.0),
        ("piece_dropout", 1.0), ("position_shift", -1), ("ema_decay", 1.0), ("mask_probability", 0.0), ("seed", -1),
        ("seed", 2**32), ("checkpoint_steps", 0), ("metric", "beauty"), ("epochs", 0), ("pretrain_epochs", -1),
    ],
)  # fmt: skip
def test_recipes_that_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="epoch" if "epochs" in field else field):
        Recipe(**{field: value})


def test_checkpoints_to_start_from(write, checkpoint: Path, tmp_path: Path) -> None:
    train, folder = write(["good", "bad"] * 4), tmp_path / "out"
    start = {"config": None, "init_from": checkpoint}
    refused(ValueError, "need 17 positions, the model has 16", train, folder, **start, recipe=Recipe(max_length=17))
    refused(StepTakenError, None, train, folder, **start)
    config = json.loads((checkpoint / "config.json").read_text())
    vocabulary = config["vocab_size"]
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary - 1}))
    refused(
        ValueError,
        f"ids up to {vocabulary - 1}, its model takes ids below vocab_size {vocabulary - 1}",
        train,
        folder,
        **start,
    )
    rounded = {"quantization_config": {"quant_method": "albert_fast", "bits": 8}}
    (checkpoint / "config.json").write_text(json.dumps(config | rounded))
    refused(ValueError, "rounded weights, which cannot be trained", train, folder, **start)


def test_places_that_cannot_be_used(write, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, folder = write(["good", "bad"] * 4), tmp_path / "a" / "b" / "out"
    arguments = {"config": CONFIG, "recipe": RECIPE, "progress": False}
    with pytest.raises(NotADirectoryError, match="is a file"):
        fit(train, train, **arguments)
    with pytest.raises(OSError, match=r"train\.tsv"):
        fit(train, train / "out", **arguments)
    if not torch.cuda.is_available():
        refused(BackendUnavailableError, "device='cpu'", train, folder, device="cuda")
    refused(RuntimeError, "nonsense", train, folder, device="nonsense")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    refused(OSError, r"need 1 MiB, and the disk has 1 MiB left", train, folder)
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()


def test_folders_of_other_work(write, checkpoint: Path, tmp_path: Path) -> None:
    train = write(["good", "bad"] * 4)
    arguments = {"config": CONFIG, "recipe": RECIPE, "progress": False}
    with pytest.raises(FileExistsError, match="unfinished run"):
        fit(train, checkpoint, **arguments)
    with pytest.raises(ValueError, match=r"train was '8 examples, .*now '8 examples, "):
        fit(train, checkpoint, **arguments, resume=True)
    first = checkpoint.parent / "first.tsv"
    changed = {"config": CONFIG.replace(hidden_dropout_prob=0.5), "vocab_size": 77}
    with pytest.raises(ValueError, match=r"config.hidden_dropout_prob was 0.0, now 0.5; vocab_size was 8000, now 77"):
        fit(first, checkpoint, **(arguments | changed), resume=True)
    fit(first, checkpoint, **arguments, resume=True)
    (checkpoint / STATE_NAME).unlink()
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(FileExistsError, match=f"holds model.safetensors but no {STATE_NAME}"):
        fit(first, checkpoint, **arguments, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "pytorch_model.bin").write_bytes(b"somebody's")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"pytorch_model\.bin"):
            fit(train, other, **arguments, resume=resume)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in other.iterdir()] == ["pytorch_model.bin"]


def test_evaluate_checks_first(write, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(["good", "bad"] * 4)

    def fails(kind: type[Exception], says: str | None, file: Path = file, **more: object) -> None:
        with pytest.raises(kind, match=says):
            evaluate(checkpoint, file, progress=False, **({"device": "cpu"} | more))

    fails(StepTakenError, None)
    fails(ValueError, "'odd'", write(["good", "odd"], "odd.tsv"))
    fails(ValueError, "unknown metric 'beauty'", metrics=["accuracy", "beauty"])
    fails(ValueError, "17 .*positions", max_length=17)
    fails(ValueError, "fp7", precision="fp7")
    fails(ValueError, "abacus", backend="abacus")
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    fails(ImportError, "'f1' needs scikit-learn", metrics=["accuracy", "f1"])
    tokenizer = load_tokenizer(checkpoint)
    ALBERTForSequenceClassification(CONFIG.replace(vocab_size=len(tokenizer) - 2)).save_pretrained(checkpoint)
    fails(ValueError, "do not belong together", write([0, 1], "ids.tsv"))
    topics = CONFIG.replace(vocab_size=len(tokenizer), problem_type="multi_label_classification")
    ALBERTForSequenceClassification(topics).save_pretrained(checkpoint)
    fails(ValueError, r"train.tsv, line 2: the label is 'good', expected some of \['LABEL_0', 'LABEL_1'\]", metrics=())


def test_a_small_text_gives_a_small_vocabulary(write, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(StepTakenError):
        fit(
            write(["good", "bad"] * 4),
            tmp_path / "out",
            config=CONFIG,
            recipe=RECIPE,
            report=said.append,
            progress=False,
        )
    vocabulary = next(line for line in said if line.startswith("vocabulary: "))
    pieces = int(vocabulary.split()[1])
    assert vocabulary == f"vocabulary: {pieces} pieces, all that this text gives (8000 were asked for)"
    assert 20 < pieces < 100
    assert "8 examples, 2 classes: bad (4), good (4)" in said[0]
    assert any("learning rate 0.0005" in line and "cpu" in line for line in said)
    assert any(f"go to {tmp_path / 'out'}" in line for line in said)


def test_a_vocabulary_of_at_most_is_the_largest_that_the_text_gives() -> None:
    lines = [f"{a}{b} {b}{a}" for a in WORDS for b in WORDS]
    with pytest.raises(ValueError, match=r"100000 pieces .* holds enough for \d+; lower vocab_size") as caught:
        train_tokenizer(lines, 100_000)
    most = int(str(caught.value).split("enough for ")[1].split(";")[0])
    expected = train_tokenizer(lines, most).get_vocab()
    assert train_tokenizer(lines, 100_000, at_most=True).get_vocab() == expected
    assert train_tokenizer(lines, 40, at_most=True).get_vocab() == train_tokenizer(lines, 40).get_vocab()
    with pytest.raises(ValueError, match=r"10 pieces .* its characters alone need \d+; raise vocab_size"):
        train_tokenizer(lines, 10, at_most=True)
