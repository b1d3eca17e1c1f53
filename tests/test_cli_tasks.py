"""`tag`, `answer` and `evaluate` as commands: the forms of their answers, and what wrong input gets."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from albert_fast import (
    ALBERTForMultipleChoice,
    ALBERTForQuestionAnswering,
    ALBERTForSequenceClassification,
    ALBERTForTokenClassification,
)
from albert_fast.cli import build_app
from albert_fast.commands._progress import counted
from albert_fast.tasks.answer import QuestionAnswerer
from albert_fast.tasks.tag import TextTagger
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer

pytest.importorskip("tokenizers", reason="the text extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
APP = build_app()
LINES = ["anna lives in bern, near the old bridge", "", "the bridge is old and odd. nobody saw it"]
KINDS = {
    "tagger": ALBERTForTokenClassification,
    "answerer": ALBERTForQuestionAnswering,
    "classifier": ALBERTForSequenceClassification,
    "chooser": ALBERTForMultipleChoice,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints with one vocabulary."""
    tokenizer = train_tokenizer(LINES * 4, 38)
    labels = {"tagger": ("O", "B-person", "B-place", "I-place"), "answerer": ("x", "y"), "classifier": ("bad", "good")}
    labels["chooser"] = ("x", "y")
    return {
        name: save_small_model(
            kind, small_text_config(tokenizer, *labels[name]), tokenizer, tmp_path_factory.mktemp(name)
        )
        for name, kind in KINDS.items()
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0, stdin: str | bytes | None = None):
        result = CliRunner().invoke(APP, [*map(str, arguments)], input=stdin)
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return result

    return call


def test_tag(run, folders: dict[str, Path]) -> None:
    model = folders["tagger"]
    expected = TextTagger(model, device="cpu")(LINES)
    assert sum(map(len, expected)) > 2
    Path("a.txt").write_text("\n".join(LINES) + "\n")
    out = run("tag", "a.txt", "-m", model).stdout
    assert out == "".join("\t".join(f"{one.kind}={one.text}" for one in found) + "\n" for found in expected)
    Path("a.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(LINES)))
    rows = [
        json.loads(line)
        for line in run("tag", "a.jsonl", "-m", model, "-f", "jsonl", "--with-text").stdout.splitlines()
    ]
    assert [(row["id"], row["text"]) for row in rows] == list(enumerate(LINES))
    for row, found in zip(rows, expected, strict=True):
        assert [(one["kind"], one["start"], one["end"]) for one in row["entities"]] == [
            (e.kind, e.start, e.end) for e in found
        ]
    assert run("tag", LINES[0], "-m", model).stdout == out.splitlines(keepends=True)[0]
    assert "labels whole texts, not words" in run("tag", "a.txt", "-m", folders["classifier"], code=2).stderr


def test_tag_conll(run, folders: dict[str, Path]) -> None:
    model = folders["tagger"]
    sentences = [line.split() for line in LINES if line]
    Path("a.conll").write_text("\n\n".join("\n".join(f"{word}\tO" for word in words) for words in sentences) + "\n")
    expected = TextTagger(model, device="cpu").tags(sentences)
    blocks = run("tag", "a.conll", "-m", model).stdout.split("\n\n")
    for block, words, tags in zip(blocks, sentences, expected, strict=False):
        assert block.split("\n") == [f"{word}\tO\t{one.tag}" for word, one in zip(words, tags, strict=True)]
    Path("words.conll").write_text("\n\n".join("\n".join(words) for words in sentences) + "\n")
    alone = run("tag", "words.conll", "-m", model).stdout
    assert alone.splitlines() == [line.replace("\tO\t", "\t", 1) for line in "\n\n".join(blocks).splitlines()]
    Path("a.conll").write_bytes(b"anna O\n\nb\xff O\n")
    failed = run("tag", "a.conll", "-m", model, code=1)
    assert "a.conll, line 3: byte 2 of the line is not utf-8" in failed.stderr
    assert failed.stdout.startswith("anna\tO\t"), "what comes before is answered"


def test_answer(run, folders: dict[str, Path]) -> None:
    model, question = folders["answerer"], "who lives?"
    expected = QuestionAnswerer(model, device="cpu")([(question, line) for line in LINES])
    Path("a.txt").write_text("\n".join(LINES) + "\n")
    out = run("answer", "a.txt", "-m", model, "-q", question).stdout
    assert [line.split("\t")[0] for line in out.splitlines()] == [one.text for one in expected]
    rows = [{"question": question, "context": line, "id": f"q{i}", "answers": []} for i, line in enumerate(LINES)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [json.loads(line) for line in run("answer", "a.jsonl", "-m", model, "-f", "jsonl").stdout.splitlines()]
    assert [(row["id"], row["answer"], row["start"]) for row in found] == [
        (f"q{i}", one.text, one.start) for i, one in enumerate(expected)
    ]
    asked = [{"paragraphs": [{"context": row["context"], "qas": [row]}]} for row in rows]
    Path("a.json").write_text(json.dumps({"data": asked}))
    whole = json.loads(run("answer", "a.json", "-m", model, "-f", "squad").stdout)
    assert whole == {f"q{i}": one.text for i, one in enumerate(expected)}
    assert run("answer", LINES[0], "-m", model, "-q", question).stdout == out.splitlines(keepends=True)[0]
    for arguments in (["a.json", "-q", "x"], ["a.jsonl", "-q", "x", "--question-column", "y"], ["a.txt"]):
        assert "question" in run("answer", *arguments, "-m", model, code=2).stderr


def test_choose(run, folders: dict[str, Path]) -> None:
    model, choices = folders["chooser"], ["in bern", "", "an odd bridge"]
    tokenizer, plain = load_tokenizer(model), ALBERTForMultipleChoice.from_pretrained(model).eval()
    rows = [
        {"id": place, "sent1": line, "ending0": choices[0], "ending1": choices[place]}
        for place, line in enumerate(LINES)
    ]
    expected = []
    for row in rows:
        pairs = [(row["sent1"], row["ending0"]), (row["sent1"], row["ending1"])]
        given = tokenizer(pairs, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected.append(plain(**{key: value[None] for key, value in given.items()}).logits[0].softmax(0).tolist())
    assert max(map(max, expected)) > 0.501
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [json.loads(line) for line in run("choose", "a.jsonl", "-m", model, "-f", "jsonl").stdout.splitlines()]
    for row, answer, scores in zip(rows, found, expected, strict=True):
        assert answer["scores"] == pytest.approx(scores, abs=1e-5)
        assert (answer["id"], answer["text"]) == (row["id"], row[f"ending{answer['choice']}"])
        assert answer["score"] == max(answer["scores"])
    out = [line.split("\t") for line in run("choose", "a.jsonl", "-m", model).stdout.splitlines()]
    assert [(int(number), text) for number, _, text in out] == [(one["choice"], one["text"]) for one in found]
    listed = {"text": "x", "several": ["in bern", "a bridge", "old"]}
    Path("b.jsonl").write_text(json.dumps(listed) + "\n" + json.dumps({"text": "x"}) + "\n")
    failed = run("choose", "b.jsonl", "-m", model, "--choices-column", "several", code=1)
    assert "b.jsonl, line 2: no choices" in failed.stderr
    assert len(failed.stdout.splitlines()) == 1, "the rows before are answered"
    assert "does not choose between texts" in run("choose", "a.jsonl", "-m", folders["classifier"], code=2).stderr


def test_files_that_are_no_lines_show_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(counted(["a", "b"], "tag", " sentences")) == ["a", "b"]
    assert "tag: 100%" in screen.getvalue()
    assert "2/2" in screen.getvalue()


def full_disk(*_: object) -> None:
    raise OSError("no space left on device")


def test_evaluate_writes_predictions_and_a_picture(
    run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    Path("a.tsv").write_text(
        "text\tlabel\n" + "".join(f"{line or 'NA'}\t{'good' if line else 'bad'}\n" for line in LINES)
    )
    extra = ["--predictions", "out.jsonl", "--confusion-matrix", "matrix.png"]
    figures = json.loads(run("evaluate", "a.tsv", "-m", folders["classifier"], *extra).stdout)
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["expected"] for row in rows] == ["good", "bad", "good"]
    assert figures["accuracy"] == sum(row["expected"] == row["predicted"] for row in rows) / 3
    assert Path("matrix.png").read_bytes().startswith(b"\x89PNG")
    Path("a.conll").write_text("anna B-person\nlives O\n")
    run("evaluate", "a.conll", "-m", folders["tagger"], "--confusion-matrix", "tags.svg", "--metric", "f1")
    assert b"B-person" in Path("tags.svg").read_bytes() or b"<svg" in Path("tags.svg").read_bytes()
    wrong = run("evaluate", "a.tsv", "-m", folders["classifier"], "--confusion-matrix", "matrix.txt", code=1)
    assert "matrix.txt: a picture's name ends in .png, .svg, .pdf" in wrong.stderr
    # A task without classes is refused before the file is read.
    no_classes = run("evaluate", "absent.json", "-m", folders["answerer"], "--confusion-matrix", "x.svg", code=1)
    assert (
        "x.svg: a confusion matrix counts one class for each example or word; the task is answer" in no_classes.stderr
    )
    # Figures are printed before a picture that fails.
    with monkeypatch.context() as patch:
        patch.setattr("albert_fast.training.plots.draw_confusion_matrix", full_disk)
        failed = run("evaluate", "a.tsv", "-m", folders["classifier"], "--confusion-matrix", "matrix.png", code=1)
    assert json.loads(failed.stdout)["accuracy"] == figures["accuracy"]
    assert (
        "the task answer has no metric 'accuracy'"
        in run("evaluate", "a.json", "-m", folders["answerer"], "--metric", "accuracy", code=1).stderr
    )
