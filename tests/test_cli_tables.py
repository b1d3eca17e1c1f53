"""`classify` and `encode` on tables and on texts that are arguments: which column is read, and what a wrong one gets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from albert_fast import ALBERTForSequenceClassification
from albert_fast.cli import build_app
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
APP = build_app()
ROWS = [
    ("a fine film, quiet and odd", "really", "good"),
    ("", "the plot", "bad"),
    ('say "mess" again', "a\u0301 mess", "bad"),
    ("dull", "dull", "good"),
    ("the plot is a mess the plot is a mess", "film", "bad"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([" ".join(row) for row in ROWS] * 4, 40)
    config = small_text_config(tokenizer, "bad", "good")
    save_small_model(ALBERTForSequenceClassification, config, tokenizer, folder)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command with the model, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *arguments: object, code: int = 0, stdin: str | bytes | None = None):
        result = CliRunner().invoke(APP, [command, *map(str, arguments), "-m", str(model)], input=stdin)
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return result

    return call


@pytest.fixture
def answers(run, tmp_path: Path) -> list[dict[str, object]]:
    """The answers for the rows' texts, each a pair, from JSON lines."""
    lines = [json.dumps({"text": text, "text_pair": pair, "id": i}) for i, (text, pair, _) in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    out = run("classify", "rows.jsonl", "-f", "jsonl", "--all-scores", "--with-text").stdout
    return [json.loads(line) for line in out.splitlines()]


def write_table(path: Path, header: list[str], rows: list[tuple[str, ...]]) -> None:
    quoted = [[f'"{field}"'.replace('"mess"', '""mess""') for field in row] for row in rows]
    cells = quoted if ".csv" in path.name else rows
    content = "\n".join(("," if ".csv" in path.name else "\t").join(row) for row in [header, *cells] if row)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz", "x.tsv.gz"])
def test_tables_give_the_answers_of_json_lines(run, answers, tmp_path: Path, name: str) -> None:
    write_table(
        tmp_path / name, ["id", "label", "text", "text_pair"], [(str(i), c, a, b) for i, (a, b, c) in enumerate(ROWS)]
    )
    out = run("classify", name, "-f", "jsonl", "--all-scores", "--with-text").stdout
    assert [json.loads(line) for line in out.splitlines()] == [{**a, "id": str(a["id"])} for a in answers]
    write_table(tmp_path / name, ["q", "note", "stars", "a"], [(a, "", c, b) for a, b, c in ROWS])
    columns = ["--text-column", "q", "--pair-column", "a", "--label-column", "stars"]
    out = run("classify", name, "-f", "jsonl", "--all-scores", "--with-text", *columns).stdout
    expected = [{**a, "expected": row[2]} for a, row in zip(answers, ROWS, strict=True)]
    assert [json.loads(line) for line in out.splitlines()] == [
        {key: value for key, value in answer.items() if key != "id"} for answer in expected
    ]
    tsv = run("classify", name, *columns).stdout.splitlines()
    assert [line.split("\t")[0] for line in tsv] == [a["label"] for a in answers]
    assert [line.split("\t")[2] for line in tsv] == [f"expected={row[2]}" for row in ROWS]
    write_table(tmp_path / name, [], ROWS)
    out = run("classify", name, "-f", "jsonl", "--all-scores", "--text-column", 0, "--pair-column", 1).stdout
    assert [json.loads(line)["scores"] for line in out.splitlines()] == [a["scores"] for a in answers]


def test_encode_reads_tables(run, tmp_path: Path) -> None:
    write_table(tmp_path / "x.csv", ["body", "stars", "second"], [(a, c, b) for a, b, c in ROWS])
    lines = [json.dumps({"text": text, "text_pair": pair}) for text, pair, _ in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    columns = ["--text-column", "body", "--pair-column", "second"]
    run("encode", "x.csv", "-o", "table.npy", *columns)
    run("encode", "rows.jsonl", "-o", "lines.npy")
    assert np.array_equal(np.load("table.npy"), np.load("lines.npy"))
    run("encode", "x.csv", "-o", "table.jsonl", *columns, "--label-column", "stars")
    rows = [json.loads(line) for line in Path("table.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [row[2] for row in ROWS]
    assert np.array_equal(np.array([row["embedding"] for row in rows], dtype=np.float32), np.load("table.npy"))
    said = run("encode", "x.csv", "-o", "y.npy", *columns, "--label-column", "stars", code=2).stderr
    assert "--label-column: y.npy has no place for labels" in said
    assert "there is no folder none" in run("encode", "x.csv", "-o", "none/y.npy", *columns, code=2).stderr


def test_encode_goes_on_in_a_table_when_its_row_is_mended(run, tmp_path: Path) -> None:
    rows = [f'"line {i},\nand its second line",{i % 2}' for i in range(20)]
    window = ["-b", 2, "--window", 2]
    Path("x.csv").write_text("\n".join(["text,label", *rows]))
    run("encode", "x.csv", "-o", "whole.npy", *window)
    Path("x.csv").write_text("\n".join(["text,label", *rows[:11], "a, b,1", *rows[12:]]))
    said = run("encode", "x.csv", "-o", "out.npy", *window, code=1).stderr
    assert "x.csv, line 24: 3 fields, but the header ['text', 'label'] has 2" in said
    assert "11 lines are saved, --resume continues after them" in said
    Path("x.csv").write_text("\n".join(["text,label", *rows]))
    said = run("encode", "x.csv", "-o", "out.npy", *window, "--resume", "--text-column", "text", code=2).stderr
    assert "was made with text column None, not text" in said
    assert "continuing after 11 lines" in run("encode", "x.csv", "-o", "out.npy", *window, "--resume").stderr
    assert np.array_equal(np.load("out.npy"), np.load("whole.npy"))


def test_rows_before_a_bad_one_are_answered(run, tmp_path: Path) -> None:
    for name, content, says in [
        ("x.csv", "text,label\na,1\nb,0\nc, d,1\n", "x.csv, line 4: 3 fields"),
        ("x.tsv", "text\tlabel\na\t1\nb\t0\n\nc\t1\n", "x.tsv, line 4: empty; expected a row"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b"}\n\n{"text": "c"}\n', 'x.jsonl, line 3: empty; expected {"text"'),
        ("x.csv", 'text\na\nb\n"c\n', "x.csv, line 4: a quote that opens in this row is never closed"),
    ]:
        Path(name).write_text(content)
        result = run("classify", name, code=1)
        assert len(result.stdout.splitlines()) == 2, name
        assert says in result.stderr
        result = run("classify", "-", "--input-format", name[2:], stdin=content, code=1)
        assert len(result.stdout.splitlines()) == 2, name
        assert says.replace(name, "standard input") in result.stderr
    packed = gzip.compress("".join(f"text {i}\n" for i in range(5000)).encode())
    Path("x.txt.gz").write_bytes(packed[:-1200])
    result = run("classify", "x.txt.gz", code=1)
    answered = len(result.stdout.splitlines())
    assert 500 < answered < 5000
    assert f"x.txt.gz, line {answered + 1}: the gzip data is cut or damaged" in result.stderr
    Path("x.txt.gz").write_bytes(packed)
    assert len(run("classify", "x.txt.gz").stdout.splitlines()) == 5000


def test_train_and_evaluate_name_the_row(run, model: Path, tmp_path: Path) -> None:
    for content, says in [
        (
            "text,label\na,good\nnot bad, really,bad\n",
            "x.csv, line 3: 3 fields, but the header ['text', 'label'] has 2",
        ),
        ("text,label\na,good\nb,\n", "x.csv, line 3, column 'label': empty"),
        ("text,label\na,good\nb,fair\n", "x.csv, line 3: the label is 'fair', expected one of"),
    ]:
        Path("x.csv").write_text(content)
        assert says in run("evaluate", "x.csv", code=1).stderr
        arguments = ["train", "x.csv", "out", "--no-progress", "--label-names", "bad,good"]
        result = CliRunner().invoke(APP, arguments)
        assert result.exit_code == 1
        assert says in result.stderr
        assert not Path("out").exists()


def test_wrong_columns_are_named(run, tmp_path: Path) -> None:
    Path("x.tsv").write_text("q\ta\nb\tc\n")
    Path("x.txt").write_text("a film\n")
    for arguments, code, says in [
        (["x.tsv"], 1, "x.tsv, line 1: the header has no column 'text' or 'sentence' or 'review', only ['q', 'a']"),
        (
            ["x.tsv", "--text-column", "z"],
            1,
            "x.tsv, line 1, column 'z': the header has no such column, only ['q', 'a']",
        ),
        (["x.txt", "--text-column", "q"], 2, "x.txt is read as lines of text, which have no columns"),
        (["-", "--pair-column", "q"], 2, "standard input is read as lines of text"),
        (["x.tsv", "--text-column", "0", "--pair-column", "a"], 2, "column 0 is a number"),
        (["x.tsv", "--text-column", "q", "--input-format", "jsonl"], 1, "x.tsv, line 1: not JSON"),
    ]:
        assert says in run("classify", *arguments, code=code, stdin="").stderr
    assert len(run("classify", "x.tsv", "--input-format", "text").stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "What a joy.",
        "either/or, 9/10",
        "I saw it on films.com",
        "wonderful",
        "Great!",
        "\u6211\u559c\u6b22",
        "two\nlines",
        "good.",
    ],
)
def test_an_argument_may_be_the_text(run, text: str) -> None:
    result = run("classify", text, "--with-text", "-f", "jsonl")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == text.split("\n")
    assert ("there is no file" in result.stderr) == (len(text.split()) == 1)


@pytest.mark.parametrize(
    "name",
    [
        "reviews.txtt",
        "data/x.tsv",
        "my reviews.tsv",
        "my reviews.csvv",
        "data/reviews",
        "here/my file",
        "",
        "v1.2",
    ],
)
def test_a_mistyped_file_is_no_text(run, name: str) -> None:
    Path("here").mkdir()
    assert run("classify", name, code=1).stderr == f"albert-fast: error: {name}: No such file or directory\n"
