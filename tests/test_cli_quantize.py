"""`albert-fast quantize`: a checkpoint in integers that works by itself, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel
from albert_fast.cli import build_app
from albert_fast.runtime import files
from albert_fast.tasks.quantize import quantize_checkpoint
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer

APP = build_app()
TEXTS = ["a fine film, quiet and odd", "the plot is a mess", "dull, and never new", "a good story, film or not"]
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What a machine without fast integers is warned of would mix with the messages that are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier with its tokenizer."""
    tokenizer = train_tokenizer(TEXTS * 4, 44)
    config = small_text_config(tokenizer, "bad", "good")
    save_small_model(ALBERTForSequenceClassification, config, tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join([*TEXTS, "", *TEXTS]) + "\n")
    return tmp_path


@pytest.fixture
def run() -> Run:
    """Runs a command; returns its result after a check of the exit code and that no traceback shows."""

    def call(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(APP, list(arguments))
        assert result.exit_code == code, (result.output, result.exception)
        assert "Traceback" not in result.output
        return result

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_a_stored_model_is_the_model_that_was_calibrated(precision: str, folder: Path, run: Run) -> None:
    source, out, text = folder / "model", folder / "made" / "out", folder / "text.txt"
    result = run("quantize", str(source), str(out), "--precision", precision, "--calibration", str(text))
    tokenizer = load_tokenizer(source)
    batch = tokenizer(sorted(TEXTS * 2, key=lambda one: len(tokenizer(one)["input_ids"])), return_tensors="pt")
    tokens = int(batch["attention_mask"].sum())
    assert result.stdout == f"{out}: {precision}, calibrated on {tokens} tokens of 8 lines\n"
    assert names(out) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert names(out.parent) == ["out"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    shutil.rmtree(source)  # the result needs nothing of it
    stored = ALBERTForSequenceClassification.from_pretrained(out, precision=precision)
    assert stored.execution.quantized == precision
    answers = run("classify", str(text), "-m", str(out), "--precision", precision).stdout.splitlines()
    with torch.no_grad():
        logits = [stored(**tokenizer(line, return_tensors="pt")).logits[0] for line in text.read_text().splitlines()]
    assert [answer.split("\t")[0] for answer in answers] == [("bad", "good")[int(scores.argmax())] for scores in logits]
    assert len(answers) == 9


def test_the_result_is_what_from_pretrained_makes_of_the_same_batches(folder: Path) -> None:
    source, out = folder / "model", folder / "out"
    assert quantize_checkpoint(source, out, "int8", TEXTS * 3, batch_size=4) > 32
    tokenizer = load_tokenizer(source)
    rows = sorted((tokenizer(text) for text in TEXTS * 3), key=lambda row: len(row["input_ids"]))
    batches = [tokenizer.collate({key: [row[key] for row in rows[i : i + 4]] for key in rows[0]}) for i in (0, 4, 8)]
    expected = ALBERTForSequenceClassification.from_pretrained(source, precision="int8", calibration=batches)
    found = ALBERTForSequenceClassification.from_pretrained(out, precision="int8").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())


def test_without_texts_it_is_what_from_pretrained_makes(folder: Path, run: Run) -> None:
    source, (one, two) = folder / "model", (folder / "few.txt", folder / "out")
    one.write_text("a film\n")
    said = {"int8": "calibrated on random ids", "int16": "rounded without a calibration"}
    for precision, how in said.items():
        expected = ALBERTForSequenceClassification.from_pretrained(source, precision=precision).state_dict()
        for text in ([], ["--calibration", str(one)]):
            result = run("quantize", str(source), str(two), "--precision", precision, *text, "--overwrite")
            assert result.stdout == f"{two}: {precision}, {how}\n"
            found = ALBERTForSequenceClassification.from_pretrained(two).state_dict()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("model_class", [ALBERTModel, ALBERTForMaskedLM])
def test_the_head_comes_along(model_class: Any, folder: Path) -> None:
    source = folder / "other"
    config = ALBERTConfig.from_json_file(folder / "model" / "config.json")
    model = model_class(config)
    model.save_pretrained(source)
    load_tokenizer(folder / "model").save(source)
    quantize_checkpoint(source, folder / "out", "int16", TEXTS * 3)
    loaded = model_class.from_pretrained(folder / "out", precision="int16").state_dict()
    heads = [key for key in model.state_dict() if "albert_layers" not in key]
    assert all(torch.equal(loaded[key], model.state_dict()[key]) for key in heads)


def test_pairs_in_json_lines_and_a_bound_on_lines(folder: Path, run: Run) -> None:
    text = folder / "pairs.jsonl"
    text.write_text("".join(json.dumps({"text": one, "text_pair": "dull film"}) + "\n" for one in TEXTS))
    common = (
        "quantize",
        str(folder / "model"),
        str(folder / "out"),
        "--precision",
        "int16",
        "--calibration",
        str(text),
    )
    assert "of 4 lines" in run(*common).stdout
    text.write_text(text.read_text() + "no JSON\n")
    assert "of 4 lines" in run(*common, "--overwrite", "--max-lines", "4").stdout
    assert "pairs.jsonl, line 5" in run(*common, "--overwrite", code=1).stderr


def test_an_output_that_is_there_stays_unless_it_may_be_replaced(folder: Path, run: Run) -> None:
    out = folder / "out"
    common = ("quantize", str(folder / "model"), str(out), "--calibration", str(folder / "text.txt"), "--precision")
    run(*common, "int16")
    before = (out / "model.safetensors").read_bytes()
    assert "--overwrite" in run(*common, "int16", code=1).stderr
    assert (out / "model.safetensors").read_bytes() == before
    run(*common, "int16", "--overwrite", "--max-lines", "3")
    assert (out / "model.safetensors").read_bytes() != before
    assert ALBERTForSequenceClassification.from_pretrained(out, precision="int16").execution.quantized == "int16"
    (out / "thesis.doc").write_text("years of work")
    assert "holds thesis.doc, which is no part of a checkpoint" in run(*common, "int8", "--overwrite", code=1).stderr
    assert (out / "thesis.doc").read_text() == "years of work"
    (folder / "file").write_text("a file")
    where = (str(folder / "file"), *common[3:])
    assert "is a file" in run("quantize", str(folder / "model"), *where, "int8", "--overwrite", code=1).stderr
    own = ("quantize", str(folder / "model"), str(folder / "model"), *common[3:], "int8", "--overwrite")
    assert "the output is the source" in run(*own, code=1).stderr
    assert names(folder) == ["file", "model", "out", "text.txt"]


def test_a_failure_or_a_kill_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = folder / "model", folder / "out"
    quantize_checkpoint(source, out, "int16", TEXTS * 3)
    before = (out / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        for target in (out, folder / "fresh"):
            with pytest.raises(OSError, match="No space"):
                quantize_checkpoint(source, target, "int16", TEXTS * 3, overwrite=True)
    assert names(folder) == ["model", "out", "text.txt"]
    assert (out / "model.safetensors").read_bytes() == before
    # A process that is killed between the two renames leaves the old output in its scratch folder.
    left = folder / ".out.0123456789abcdef.part"
    left.mkdir()
    os.rename(out, left / "old")
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space"):
            quantize_checkpoint(source, out, "int16", TEXTS * 3, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert files.scratch_folders(out) == []


def test_what_cannot_be_stored_is_named(folder: Path, run: Run) -> None:
    source, out, text = folder / "model", folder / "out", folder / "text.txt"
    common = ("--precision", "int8", "--calibration", str(text))
    assert "Missing option" in run("quantize", str(source), str(out), code=2).stderr
    assert "fp8" in run("quantize", str(source), str(out), "--precision", "fp8", *common[2:], code=2).stderr
    assert "nowhere" in run("quantize", str(folder / "nowhere" / "x"), str(out), *common, code=1).stderr
    (folder / "empty.txt").write_text("\n \n")
    blank = (*common[:3], str(folder / "empty.txt"))
    assert "holds no text" in run("quantize", str(source), str(out), *blank, code=2).stderr
    assert "more than the model" in run("quantize", str(source), str(out), *common, "--max-length", "49", code=1).stderr
    with pytest.raises(ValueError, match="no text to calibrate on"):
        quantize_checkpoint(source, folder / "twice", "int8", [])
    quantize_checkpoint(source, out, "int16", TEXTS * 3)
    twice = run("quantize", str(out), str(folder / "twice"), *common, code=1)
    assert "rounded already" in twice.stderr
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    assert "names no model" in run("quantize", str(source), str(folder / "twice"), *common, code=1).stderr
    with pytest.raises(ValueError, match="'fp32': a checkpoint is stored in one of int8, int16"):
        quantize_checkpoint(source, folder / "twice", "fp32", TEXTS)
    assert names(folder) == ["empty.txt", "model", "out", "text.txt"]


@pytest.mark.parametrize("command", ["classify", "encode", "fill-mask"])
def test_rounding_at_every_start_is_said_once(command: str, folder: Path, run: Run) -> None:
    source, out = folder / "model", folder / "out"
    if command == "fill-mask":
        ALBERTForMaskedLM(ALBERTConfig.from_json_file(source / "config.json")).save_pretrained(source)
    quantize_checkpoint(source, out, "int16", TEXTS * 3)
    given = ("a [MASK] film",) if command == "fill-mask" else (str(folder / "text.txt"),)
    note = "calibrated on random ids, at every start; `albert-fast quantize"
    assert run(command, *given, "-m", str(source), "--precision", "int8").stderr.count(note) == 1
    for model, precision in ((source, "fp32"), (source, "int16"), (out, "int16")):
        assert note not in run(command, *given, "-m", str(model), "--precision", precision).stderr
