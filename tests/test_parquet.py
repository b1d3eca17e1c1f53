"""Parquet in and out: the same rows, errors and vectors as JSON lines; interrupted work continues."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from albert_fast import ALBERTForSequenceClassification
from albert_fast.cli import build_app
from albert_fast.tasks.embed import TextEncoder
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.text_files import Columns, read_table
from albert_fast.text.tokenizer import train_tokenizer

arrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("one_thread")
APP = build_app()
WORDS = ["a", "fine", "film,", "quiet", "and", "odd;", "the", "plot", "is", "a", "mess", "-", "dull", "(but", "long)"]
TEXTS = [" ".join((WORDS * 3)[i % 7 : i % 7 + (i * 5) % 23]) for i in range(25)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(TEXTS * 2, 36)
    config = small_text_config(tokenizer, "negative", "positive")
    return save_small_model(ALBERTForSequenceClassification, config, tokenizer, tmp_path_factory.mktemp("model"))


def write(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(arrow.table(columns), path, row_group_size=7)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    vectors = [[0.5, 1.5]] * 25  # a column that is not read
    stars = [i % 5 for i in range(25)]
    return write(tmp_path / "in.parquet", id=list(range(100, 125)), body=TEXTS, stars=stars, old=vectors)


def run(command: str, *arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(APP, [command, *map(str, arguments)])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def encode(source: Path, model: Path, output: Path, *more: object, code: int = 0) -> str:
    arguments = (source, "-m", model, "-o", output, "-b", 2, "--window", 2, "--text-column", "body", *more)
    return str(run("encode", *arguments, code=code).stderr)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_to_parquet(source: Path, model: Path, tmp_path: Path, dtype: str) -> None:
    encode(source, model, tmp_path / "out.parquet", "--label-column", "stars", "--dtype", dtype)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "label", "embedding"]
    assert table["id"].to_pylist() == list(range(100, 125))
    assert table["label"].to_pylist() == [i % 5 for i in range(25)]
    encode(source, model, tmp_path / "out.npy", "--dtype", dtype)
    found = np.array(table["embedding"].to_pylist(), dtype=dtype)
    np.testing.assert_array_equal(found, np.load(tmp_path / "out.npy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.npy", "out.parquet"]


def test_ids_and_labels_of_every_kind(model: Path, tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "a"}, {"id": "two", "text": "film"}, {"text": "odd"}, {"id": [3], "text": "dull"}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row | {"label": i + 0.5 * (i > 1)}) + "\n" for i, row in enumerate(rows)))
    run(
        "encode", source, "-m", model, "-o", tmp_path / "out.parquet", "-b", 1, "--window", 1, "--label-column", "label"
    )
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == ["1", "two", None, "[3]"]
    assert table["label"].to_pylist() == [0.0, 1.0, 2.5, 3.5]
    source.write_text("")
    run("encode", source, "-m", model, "-o", tmp_path / "empty.parquet")
    assert parquet.read_table(tmp_path / "empty.parquet").shape == (0, 1)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2**63 - 1, None, -(2**63)], [1, 2**63 - 1, None, -(2**63)]),
        ([1, 2**63, None, 3], ["1", "9223372036854775808", None, "3"]),
        ([-(2**63) - 1, 0], ["-9223372036854775809", "0"]),
        ([1.5, 2**53, -(2**53)], [1.5, 2.0**53, -(2.0**53)]),
        ([1.5, None, 2**60 + 1], ["1.5", None, "1152921504606846977"]),
        ([1.5, -(2**53) - 1], ["1.5", "-9007199254740993"]),
    ],
)
def test_ids_too_large_for_a_column_of_numbers_are_text(
    model: Path, tmp_path: Path, ids: list[Any], expected: list[Any]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": "film", "id": one}) + "\n" for one in ids))
    run("encode", source, "-m", model, "-o", tmp_path / "out.parquet", "-b", 1, "--window", 1)
    assert parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == expected


def test_half_a_surrogate_pair_is_refused_when_the_row_is_read(model: Path, tmp_path: Path) -> None:
    json_ids = '{"text": "a", "id": 1}\n{"text": "a", "id": "\\ud800"}\n'
    half, utf7 = "character 1 of the text, '\\ud800', is half a surrogate pair", ("--encoding", "utf-7")
    for name, content, options, problem in (
        ("in.jsonl", json_ids, (), "line 2, column 'id': cannot be given back as JSON"),
        ("id.csv", "text,id\na,1\na,+2AA-\n", utf7, f"line 3, column 'id': {half}"),
        ("label.csv", "text,y\na,1\na,+2AA-\n", (*utf7, "--label-column", "y"), f"line 3, column 'y': {half}"),
    ):
        (tmp_path / name).write_text(content)
        output = tmp_path / f"{name}.parquet"
        said = run("encode", tmp_path / name, "-m", model, "-o", output, *options, code=1).stderr
        assert f"{name}, {problem}" in said
        assert "1 lines are saved" in said


def test_an_interrupted_run_continues(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = TextEncoder.encode, iter(range(3))

    def call(self: TextEncoder, texts: Any) -> np.ndarray:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return compute(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", call)
    output = tmp_path / "out.parquet"
    said = encode(source, model, output, code=130)
    assert "12 lines are saved, --resume continues" in said
    assert not output.exists()
    monkeypatch.setattr(TextEncoder, "encode", compute)
    assert "continuing after 12 lines" in encode(source, model, output, "--resume")
    encode(source, model, tmp_path / "whole.parquet")
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert "is complete" in encode(source, model, output, "--resume")


@pytest.mark.parametrize("command", ["classify", "encode"])
def test_the_same_as_json_lines(source: Path, model: Path, tmp_path: Path, command: str) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"id": 100 + i, "body": text}) + "\n" for i, text in enumerate(TEXTS)))
    options = ("-m", model, "--text-column", "body", *(("--format", "jsonl") if command == "classify" else ()))
    assert run(command, source, *options).stdout == run(command, lines, *options).stdout != ""


def test_tables_for_training(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", sentence=["a", "b"], text_pair=["c", "d"], label=["x", "y"], other=[b"", b""])
    rows = list(read_table(path, Columns(label="label")))
    assert [(row.line, row.text, row.pair, row.label) for row in rows] == [(1, "a", "c", "x"), (2, "b", "d", "y")]


def test_bad_files(source: Path, model: Path, tmp_path: Path) -> None:
    def said(path: Path, *more: object, code: int = 1) -> str:
        return str(run("classify", path, "-m", model, *more, code=code).stderr)

    columns = r"only ['id', 'body', 'stars', 'old']; --text-column names the text's"
    assert f"has no column 'text' or 'sentence' or 'review', {columns}" in said(source)
    assert f"has no column 'stairs', {columns}" in said(source, "--text-column", "stairs")
    for number in ("0", "1"):
        named = f"column {number} is a number; the columns of a Parquet file have names"
        assert named in said(source, "--text-column", number)
    null = write(tmp_path / "null.parquet", text=["a", None])
    assert "null.parquet, line 2, column 'text': expected a string, found null" in said(null)
    assert "a column holds bytes" in said(write(tmp_path / "bytes.parquet", text=[b"a"]))
    (tmp_path / "no.parquet").write_text("text\na\n")
    assert "no.parquet: not a readable Parquet file" in said(tmp_path / "no.parquet")
    (tmp_path / "cut.parquet").write_bytes(source.read_bytes()[:-20])
    assert "cut.parquet: not a readable Parquet file" in said(tmp_path / "cut.parquet")
    assert "No such file" in said(tmp_path / "none.parquet")
    assert "not read from standard input" in said(Path("-"), "--input-format", "parquet")


def test_without_pyarrow(source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    hint = "Parquet needs pyarrow: pip install 'albert-fast[parquet]'"
    assert hint in run("classify", source, "-m", model, code=1).stderr
    (tmp_path / "in.txt").write_text("film\n")
    assert hint in run("encode", tmp_path / "in.txt", "-m", model, "-o", tmp_path / "out.parquet", code=1).stderr
    assert not list(tmp_path.glob("out*"))
