"""`albert-fast train` and `evaluate` as a new user meets them: without scikit-learn, interrupted, started twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from albert_fast.cli import build_app
from albert_fast.training.checkpointing import LOCK_NAME, STATE_NAME, claimed

pytest.importorskip("tokenizers", reason="the text extra is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
APP = build_app()
SMALL = ["--layers", 1, "--hidden-size", 16, "--heads", 2, "--intermediate-size", 32, "--embedding-size", 8]
SMALL += ["--max-length", 12, "--batch-size", 8]
# Ctrl-C arrives although a shell in the background may have it ignored.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from albert_fast.cli import main
main()
"""
# Runs commands where what [text,cli] does not bring is not installed.
WITHOUT_LIBRARIES = """
import json, sys
for name in ("sklearn", "scipy"):
    sys.modules[name] = None
from typer.testing import CliRunner
from albert_fast.cli import build_app
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(build_app(), command)
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [f"{'good fine' if i % 2 else 'bad dull'} film {i % 5}\t{'yes' if i % 2 else 'no'}" for i in range(40)]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return tmp_path / "train.tsv"


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START, *map(str, arguments), "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_scikit_learn(labelled: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    train = [labelled, folder, "--dev", labelled, "--test", labelled, "--epochs", 1, *SMALL, "--threads", 1]
    commands = [
        ["train", labelled, other, "--dev", labelled, "--metric", "f1", *SMALL],
        ["train", *train],
        ["evaluate", labelled, "-m", folder],
        ["evaluate", labelled, "-m", folder, "--metric", "matthews"],
    ]
    arguments = json.dumps([[str(argument) for argument in command] for command in commands])
    ran = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES, arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    refused, trained, evaluated, refused_too = map(json.loads, ran.stdout.splitlines())
    assert (refused[0], trained[0], evaluated[0], refused_too[0]) == (1, 0, 0, 1), ran.stdout
    assert "error: the metric 'f1' needs scikit-learn: pip install 'albert-fast[train]'" in refused[2]
    assert not other.exists()
    record, _, tested = trained[1].splitlines()
    accuracy = json.loads(record)["dev_accuracy"]
    assert json.loads(tested.split(": ", 1)[1])["accuracy"] == json.loads(evaluated[1])["accuracy"] == accuracy
    assert "'matthews' needs scikit-learn" in refused_too[2]


def test_a_second_train_fails_at_once_and_writes_nothing(labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with claimed(folder, resume=False):
        for more in ([], ["--resume"]):
            said = run("train", labelled, folder, *SMALL, *more, code=1).stderr
            assert f"error: {folder}: another run is writing there" in said
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    run("train", labelled, folder, "--epochs", 1, *SMALL)


def test_two_processes_train_into_one_folder(labelled: Path, tmp_path: Path) -> None:
    """One of them fails; what is there is all of the other's."""
    folder = tmp_path / "model"
    # 31 and 32 pieces: the text gives 31 to 33.
    processes = [start("train", labelled, folder, "--epochs", 2, "--vocab-size", size, *SMALL) for size in (31, 32)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1], said
    loser = said[codes.index(1)]
    assert "another run is writing there" in loser or "holds a model or an unfinished run" in loser
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert config["vocab_size"] == len(tokenizer["model"]["vocab"]) == (31, 32)[codes.index(0)]
    run("evaluate", labelled, "-m", folder)


def test_ctrl_c_and_more_epochs(labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    command = ["train", labelled, folder, *SMALL, "--vocab-size", 32]
    process = start(*command, "--epochs", 100_000, "--checkpoint-steps", 1)
    deadline = time.monotonic() + 300
    while not (folder / STATE_NAME).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("albert-fast: interrupted ")
    assert said.splitlines()[-1].endswith("; the same command with --resume continues")
    assert list(folder.glob(".*")) == []
    begun = len(torch.load(folder / STATE_NAME, weights_only=True)["history"])
    assert begun
    said = run(*command, "--resume", "--epochs", 99_999, "--lr", 1, code=1).stderr
    assert "learning_rate was 0.0005, now 1.0" in said


def test_messages_and_more_epochs(labelled: Path, tmp_path: Path) -> None:
    command = ["train", labelled, tmp_path / "model", *SMALL]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.doc").write_text("years of work")
    first = run(*command, "--epochs", 1)
    for says in (
        f"{tmp_path / 'model'} holds other files, which stay: thesis.doc\n",
        "40 examples, 2 classes: no (20), yes (20)",
        "pieces, all that this text gives (8000 were asked for)",
        "a new model; 1 epoch of 5 steps, learning rate 0.0005, batch size 8; cpu, 1 thread",
        f"go to {tmp_path / 'model'} after each epoch",
        "epoch 1 of 1: classify, train_loss ",
    ):
        assert says in first.stderr
    second = run(*command, "--epochs", 3, "--resume")
    assert "continuing with classify after 1 epoch and" in second.stderr
    records = [json.loads(line) for line in second.stdout.splitlines()[:3]]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records[0] == json.loads(first.stdout.splitlines()[0])
    assert "cannot end after 2" in run(*command, "--epochs", 2, "--resume", code=1).stderr
