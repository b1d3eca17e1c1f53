"""`albert-fast encode`, and what only shows in a process of its own: pipes, interruption, missing libraries."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from albert_fast import ALBERTForSequenceClassification
from albert_fast.cli import build_app
from albert_fast.commands._errors import UsageError
from albert_fast.commands._sinks import NpyForm, ResumableFile, State, output_lock
from albert_fast.models import reference
from albert_fast.tasks.embed import TextEncoder
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
APP = build_app()
WORDS = ["a", "fine", "film,", "quiet", "and", "odd;", "the", "plot", "is", "a", "mess", "-", "dull", "(but", "long)"]
TEXTS = [" ".join((WORDS * 3)[i % 7 : i % 7 + (i * 5) % 23]) for i in range(25)]
# The handler for Ctrl-C: a shell that starts the tests in the background would let them and their children ignore it.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from albert_fast.cli import main; main()"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS * 2, 36)
    config = small_text_config(tokenizer, "negative", "positive")
    save_small_model(ALBERTForSequenceClassification, config, tokenizer, folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def encode(
    source: Path | str, model: Path, output: Path, *more: object, code: int = 0, stdin: str | None = None
) -> str:
    """Runs encode with windows of 4 lines in batches of 2; returns what it says on standard error."""
    arguments = ["encode", source, "-m", model, "-o", output, "-b", 2, "--window", 2, *more]
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, (result.stderr, result.exception)
    return result.stderr


def start(*arguments: object, **pipes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", START, *map(str, arguments), "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **pipes)


def interrupt_after(windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a later window is computed."""
    compute = TextEncoder.encode
    calls = iter(range(windows))

    def call(self, texts):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return compute(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", call)


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_vectors(model: Path, source: Path, tmp_path: Path, pooling: str) -> None:
    encode(source, model, tmp_path / "out.npy", "--pooling", pooling)
    vectors = np.load(tmp_path / "out.npy")
    assert (vectors.shape, vectors.dtype) == ((25, 32), np.float32)
    tokenizer, plain = load_tokenizer(model), reference.ALBERTModel.from_pretrained(model)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            out = plain(**tokenizer(text, max_length=48, return_tensors="pt"))
        hidden = out.last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "pooler": out.pooler_output[0]}[pooling]
        torch.testing.assert_close(torch.from_numpy(vector), expected, rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.npy"]


def test_forms_agree(model: Path, source: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "id": f"n{i}"} for i, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode(source, model, tmp_path / "out.npy")
    encode(tmp_path / "in.jsonl", model, tmp_path / "out.jsonl")
    encode("-", model, tmp_path / "half.npy", "--dtype", "float16", stdin="\n".join(TEXTS))
    vectors = np.load(tmp_path / "out.npy")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert np.array_equal(np.array([line["embedding"] for line in lines], dtype=np.float32), vectors)
    assert np.array_equal(np.load(tmp_path / "half.npy"), vectors.astype(np.float16))
    out = CliRunner().invoke(APP, ["encode", "-", "-m", str(model)], input=TEXTS[3] + "\n\n")
    assert [len(json.loads(line)["embedding"]) for line in out.stdout.splitlines()] == [32, 32]


def test_empty_input(model: Path, tmp_path: Path) -> None:
    for name in ("out.npy", "out.jsonl"):
        encode("-", model, tmp_path / name, stdin="")
    assert np.load(tmp_path / "out.npy").shape == (0, 32)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize("windows", [1, 4, 6])
@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_resume(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, windows: int
) -> None:
    whole, output, partial = tmp_path / f"whole-{name}", tmp_path / name, tmp_path / f"{name}.partial"
    encode(source, model, whole)
    with monkeypatch.context() as patch:
        interrupt_after(windows, patch)
        said = encode(source, model, output, code=130)
    assert f"interrupted; {4 * windows} lines are saved, --resume continues" in said
    assert not output.exists()
    with partial.open("ab") as file:
        file.write(b"half a row")  # as a kill in the middle of a write leaves it
    assert "is unfinished work; --resume continues it" in encode(source, model, output, code=2)
    assert f"continuing after {4 * windows} lines" in encode(source, model, output, "--resume")
    assert output.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.progress")) + list(tmp_path.glob("*.partial"))
    assert "is complete" in encode(source, model, output, "--resume")
    assert "is there already; --overwrite" in encode(source, model, output, code=2)
    encode(source, model, output, "--overwrite", "--pooling", "cls")
    assert output.read_bytes() != whole.read_bytes()


def test_resume_with_nothing_to_resume(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        assert encode(source, model, tmp_path / "out.npy", code=130).strip() == "albert-fast: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]
    encode(source, model, tmp_path / "out.npy", "--resume")
    assert len(np.load(tmp_path / "out.npy")) == 25


@pytest.fixture
def unfinished(model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        encode(source, model, tmp_path / "out.npy", code=130)
    return tmp_path / "out.npy"


def test_resume_refuses_other_work(model: Path, source: Path, unfinished: Path) -> None:
    def refused(says: str, *more: object, code: int = 2) -> None:
        assert says in encode(source, model, unfinished, "--resume", *more, code=code)

    refused("was made with pooling mean, not cls", "--pooling", "cls")
    refused("was made with max_length 48, not 9", "--max-length", 9)
    refused("was made with dtype float32, not float16", "--dtype", "float16")
    weights = (model / "model.safetensors").read_bytes()
    try:
        (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        refused("was made with model ")
    finally:
        (model / "model.safetensors").write_bytes(weights)
    content = source.read_text()
    source.write_text("another first line\n" + content)
    refused("the first 8 lines of")
    source.write_text("\n".join(TEXTS[:5]))
    refused("ends after 5 lines; 8 were done before", code=1)
    source.write_text(content)
    progress = unfinished.with_name("out.npy.progress")
    note = progress.read_text()
    progress.write_text(note[:40])
    refused("is damaged")
    progress.write_text(note)
    partial = unfinished.with_name("out.npy.partial")
    rows = partial.read_bytes()
    partial.write_bytes(rows[:-1])
    refused("is shorter than")
    partial.write_bytes(rows)
    source.write_text(content + "one more line\n")  # what follows may change: only what was encoded must be the same
    encode(source, model, unfinished, "--resume")
    assert len(np.load(unfinished)) == 26


def test_overwrite_starts_again(model: Path, source: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        encode(source, model, unfinished, "--overwrite", code=130)
    assert not list(unfinished.parent.glob("out.npy*"))  # no note is left that speaks of rows that are gone


def test_a_full_disk_keeps_what_was_done(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(source, model, tmp_path / "whole.npy")
    append, calls = ResumableFile.append, iter(range(3))

    def fill_up(self, *arguments):
        if next(calls, None) is None:
            self._file.write(b"half a row")
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableFile, "append", fill_up)
        said = encode(source, model, tmp_path / "out.npy", code=1)
    assert "12 lines are saved; --resume continues after them" in said
    assert "No space left" in said
    assert "continuing after 12 lines" in encode(source, model, tmp_path / "out.npy", "--resume")
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_two_processes_do_not_share_an_output(model: Path, source: Path, unfinished: Path) -> None:
    with output_lock(unfinished):
        for option in ("--resume", "--overwrite"):
            said = encode(source, model, unfinished, option, code=2)
            assert f"{unfinished} is being written by another process" in said
    encode(source, model, unfinished, "--resume")
    assert [path.name for path in unfinished.parent.glob("out.npy*")] == ["out.npy"]


@pytest.mark.parametrize("left", ["head", "rows", "note aside", "note", "final head", "renamed"])
def test_a_kill_at_any_step_can_be_resumed(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """What is on the disk after a kill at this step; then --resume, which must give the rows of a run in one go."""
    encode(source, model, tmp_path / "whole.npy")
    whole, output = (tmp_path / "whole.npy").read_bytes(), tmp_path / "out.npy"
    partial, progress = (tmp_path / f"out.npy.{end}" for end in ("partial", "progress"))
    windows = {"head": 1, "rows": 1, "note aside": 3, "note": 3, "final head": 6, "renamed": 6}[left]
    with monkeypatch.context() as patch:
        interrupt_after(windows, patch)
        encode(source, model, output, code=130)
    (tmp_path / "out.npy.lock").touch()
    if left in ("head", "rows"):
        progress.unlink()
        partial.write_bytes(partial.read_bytes()[: 17 if left == "head" else 300])
    elif left == "note aside":
        left = tmp_path / ".out.npy.progress.0123456789abcdef.part"
        left.mkdir(exist_ok=True)
        (left / "out.npy.progress").write_text('{"rows": 99')
        partial.write_bytes(partial.read_bytes() + whole[-77:])
    elif left == "final head":
        partial.write_bytes(whole[:128] + partial.read_bytes()[128:] + whole[-50:])
    elif left == "renamed":
        partial.unlink()
        output.write_bytes(whole)
    encode(source, model, output, "--resume")
    assert output.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.npy", "whole.npy"]


def test_a_refusal_releases_the_lock_while_its_traceback_lives(unfinished: Path) -> None:
    """Python 3.13 keeps the frames of a caught error longer than 3.11 did; the lock must not depend on that."""
    kept = []  # the frame that opened the file is in each of these
    for setting, value in (("pooling", "cls"), ("window", 99)):
        with pytest.raises(UsageError, match=f"was made with {setting}") as caught:
            ResumableFile(unfinished, NpyForm(32, "float32"), {setting: value}, State.unfinished)
        kept.append(caught.tb)


def test_bad_line_keeps_what_was_done(model: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text("\n".join([*rows[:9], "{bad", *rows[10:]]))
    said = encode(source, model, output, code=1)
    assert "line 10: not JSON" in said
    assert "; 9 lines are saved, --resume continues after them" in said
    assert "line 10: not JSON" in encode(source, model, output, "--resume", code=1)  # not mended yet: nothing is lost
    source.write_text("\n".join([*rows[:20], "", *rows[20:]]))
    said = encode(source, model, output, "--resume", code=1)
    assert "continuing after 9 lines" in said
    assert "line 21: empty" in said
    source.write_text("\n".join([*rows, "", " ", ""]))  # blank lines at the end are no rows
    assert "continuing after 20 lines" in encode(source, model, output, "--resume")
    encode(source, model, tmp_path / "whole.npy")
    assert np.array_equal(np.load(output), np.load(tmp_path / "whole.npy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.npy", "whole.npy"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_real_interruption_of_a_pipe(model: Path, source: Path, tmp_path: Path, how: signal.Signals) -> None:
    output, progress = tmp_path / "out.npy", tmp_path / "out.npy.progress"
    process = start("encode", "-", "-m", model, "-o", output, "-b", 2, "--window", 2, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("".join(text + "\n" for text in TEXTS[:10]).encode())
    process.stdin.flush()
    deadline = time.monotonic() + 120
    # The note is renamed first, its scratch folder goes last.
    while not progress.exists() or json.loads(progress.read_text())["rows"] < 8 or list(tmp_path.glob(".*.part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert ("8 lines are saved, --resume continues" in said) == (how == signal.SIGINT)
    process.communicate()
    assert not output.exists()
    encode(source, model, output, "--resume")
    encode(source, model, tmp_path / "whole.npy")
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_answers_come_while_the_pipe_is_open(model: Path) -> None:
    process = start("classify", "-", "-m", model, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    for text in TEXTS[:3]:
        process.stdin.write(text.encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline().split(b"\t")[0] in (b"positive", b"negative")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().splitlines()[-1] == "albert-fast: interrupted"


def test_a_reader_that_leaves_is_no_error(model: Path, source: Path) -> None:
    source.write_text("\n".join(TEXTS * 400))
    process = start("classify", source, "-m", model)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read().decode()
    assert process.wait(120) == 0
    assert "Traceback" not in said
    assert "Broken" not in said


def test_without_typer_the_command_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['typer'] = None; from albert_fast.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.strip() == "albert-fast: the command line needs typer: pip install 'albert-fast[cli,text]'"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from albert_fast.cli import build_app; build_app()\n"
        "print({'torch', 'numpy', 'tokenizers', 'tqdm', 'transformers', 'triton'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_sentence_transformers_folder_is_obeyed(source: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "st"
    shutil.copytree(model, folder)
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in types.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    encode(source, folder, tmp_path / "obeyed.npy")
    encode(source, folder, tmp_path / "out.npy", "--pooling", "cls")
    encode(source, model, tmp_path / "plain.npy", "--pooling", "cls")
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()
    plain = np.load(tmp_path / "plain.npy")
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(tmp_path / "obeyed.npy"), expected, rtol=1e-6, atol=1e-7)
    (folder / "modules.json").write_text(
        json.dumps([*modules, {"path": "3_CNN", "type": f"{modules[0]['type'][:29]}CNN"}])
    )
    assert "CNN is not applied here" in encode(source, folder, tmp_path / "no.npy", code=1)


@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_the_precision_is_the_folders(source: Path, model: Path, tmp_path: Path, precision: str) -> None:
    folder = tmp_path / precision
    shutil.copytree(model, folder)
    ALBERTForSequenceClassification.from_pretrained(model, precision=precision).save_pretrained(folder)
    encode(source, folder, tmp_path / "stated.npy")
    encode(source, folder, tmp_path / "asked.npy", "--precision", precision)
    encode(source, model, tmp_path / "floats.npy")
    stated, asked, floats = (np.load(tmp_path / f"{name}.npy") for name in ("stated", "asked", "floats"))
    assert np.array_equal(stated, asked)
    assert not np.array_equal(stated, floats)
    assert np.abs(stated - floats).max() < 0.5
    said = encode(source, folder, tmp_path / "other.npy", "--precision", "bf16", code=1)
    assert f"holds {precision} weights" in said


def test_config_json_does_not_change_what_commands_read(source: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuples"
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"return_dict": False, "output_hidden_states": True}))
    encode(source, folder, tmp_path / "tuples.npy")
    encode(source, model, tmp_path / "plain.npy")
    assert (tmp_path / "tuples.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()
