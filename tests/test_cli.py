"""The command line in this process: answers, forms, errors with their exit codes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import albert_fast
from albert_fast import ALBERTForMaskedLM, ALBERTForSequenceClassification
from albert_fast.cli import SUBCOMMANDS, build_app
from albert_fast.models import reference
from albert_fast.testing.small_checkpoints import save_small_model, small_text_config
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
APP = build_app()
TEXTS = ["a fine film, quiet and odd", "", "the plot is a mess " * 12, "caf\u00e9 \U0001f600", "dull", "film"]


@pytest.fixture(autouse=True)
def _quiet():
    """What a machine without compiled kernels is warned of would mix with the messages that are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints with one vocabulary."""
    tokenizer = train_tokenizer([*TEXTS, "never say never: a good, bad, new story!"] * 4, 46)
    config = small_text_config(tokenizer, "negative", "positive")
    kinds = {
        "classifier": (ALBERTForSequenceClassification, config),
        "regressor": (
            ALBERTForSequenceClassification,
            config.replace(id2label={0: "stars"}, problem_type="regression"),
        ),
        "topics": (ALBERTForSequenceClassification, config.replace(problem_type="multi_label_classification")),
        "language": (ALBERTForMaskedLM, config),
    }
    folders = {}
    for name, (kind, sizes) in kinds.items():
        folders[name] = save_small_model(kind, sizes, tokenizer, tmp_path_factory.mktemp(name))
    return folders


@pytest.fixture
def run():
    """Runs a command; returns its result after a check of the exit code and that no traceback shows."""

    def call(*arguments: object, code: int = 0, stdin: bytes | str | None = None):
        result = CliRunner().invoke(APP, [str(argument) for argument in arguments], input=stdin)
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.stderr
        return result

    return call


def expected_scores(folder: Path, texts: list, activation=lambda logits: logits.softmax(-1)) -> list[list[float]]:
    """Each text alone through the eager reference."""
    tokenizer, model = load_tokenizer(folder), reference.ALBERTForSequenceClassification.from_pretrained(folder)
    rows = []
    for text in texts:
        pair = (text, None) if isinstance(text, str) else text
        with torch.no_grad():
            logits = model(**tokenizer(*pair, max_length=48, return_tensors="pt")).logits
        rows.append(activation(logits)[0].tolist())
    return rows


def test_help_teaches(run) -> None:
    assert all(name.replace("_", "-") in run("--help").stdout for name in SUBCOMMANDS)
    for name in SUBCOMMANDS:
        text = run(name.replace("_", "-"), "--help").stdout
        assert f"  albert-fast {name.replace('_', '-')}" in text  # an example, on a line of its own
        assert "Exit codes: 0 fine; 1 the work failed; 2 wrong usage; 130" in text
    assert run("--version").stdout.strip() == f"albert-fast {albert_fast.__version__}"


def test_wrong_usage(run, models, tmp_path) -> None:
    for arguments, says in [
        (["classify"], "FILE"),
        (["unknown"], "unknown"),
        (["classify", "x", "--format", "xml"], "xml"),
        (["classify", "x", "--batch-size", "0"], "batch-size"),
        (["encode", "x"], "--model"),
        (["encode", "x", "-m", "y", "-o", "out.csv"], "out.csv: expected a name that ends in .npy, .jsonl or .parquet"),
        (["encode", "x", "-m", "y", "--resume"], "--resume and --overwrite need --output"),
        (["encode", "x", "-m", "y", "-o", "o.npy", "--resume", "--overwrite"], "give one of them"),
        (["demo", "a text", "--file", "x"], "not both"),
        (["train", "a.tsv", "out", "--init-from", "b", "--layers", "2"], "num_hidden_layers"),
        (["fill-mask", "[MASK]", "-m", models["language"], "--top-k", "1000"], "--top-k 1000"),
        (["classify", "-", "-m", models["classifier"], "--encoding", "nonsense"], "no text encoding of this name"),
        (["classify", "-", "-m", models["classifier"], "--encoding", "utf-16"], "line feed"),
        (["classify", "-", "-m", models["classifier"], "--encoding", "hex"], "no text encoding"),
    ]:
        assert says in run(*arguments, code=2, stdin="").stderr


def test_failures_name_what_to_do(run, models, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    model = models["classifier"]
    for arguments, says in [
        (["classify", tmp_path / "none.txt", "-m", model], "none.txt: No such file"),
        (["classify", "-", "-m", tmp_path / "no" / "model"], "no"),
        (["classify", "-", "-m", tmp_path / "empty"], "empty"),
        (["classify", "-", "-m", model, "--max-length", "100"], "max_length 100 is more than the model's 48"),
        (["classify", "-", "-m", model, "--backend", "abacus"], "abacus"),
        (["classify", "-", "-m", model, "--device", "cuda:99"], ""),
        (["encode", "-", "-m", models["language"], "--pooling", "pooler", "-o", tmp_path / "o.npy"], "has no pooler"),
        (["bench", "-m", model, "--length", "49"], "--length 49 is more than the model's 48 positions"),
        (["fill-mask", "no mask", "-m", models["language"]], "text 1: no [MASK] in 'no mask'"),
        (["fill-mask", "[MASK] " * 60, "-m", models["language"]], "the model takes 48"),
        (["demo", "--file", tmp_path / "none.txt"], "none.txt: No such file"),
        (["demo", "--file", "none"], "none: No such file"),
        (["demo", "--file", "-", "-m", model], "holds no sentence"),
        (["demo", "fine", "caf\udce9", "-m", model], "text 2: character 4 cannot be read"),
        (["fill-mask", "caf\udce9 [MASK]", "-m", models["language"]], "text 1: character 4 cannot be read"),
        (["classify", "caf\udce9 film", "-m", model], "the text, line 1: byte 4 of the line is not utf-8"),
    ]:
        error = run(*arguments, code=2 if "pooler" in says else 1, stdin="").stderr
        assert error.startswith("albert-fast: error: ")
        assert says in error
    assert not list(tmp_path.glob("o.npy*"))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_classify_tsv(run, models, tmp_path, batch_size: int) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    lines = run("classify", tmp_path / "in.txt", "-m", models["classifier"], "-b", batch_size).stdout.splitlines()
    assert len(lines) == len(TEXTS)
    for line, scores in zip(lines, expected_scores(models["classifier"], TEXTS), strict=True):
        label, score = line.split("\t")
        assert label == ["negative", "positive"][scores[1] > scores[0]]
        assert float(score) == pytest.approx(max(scores), abs=2e-5)


def test_classify_jsonl_keys(run, models) -> None:
    answers = run("classify", "-", "-m", models["classifier"], "--format", "jsonl", stdin="\n".join(TEXTS)).stdout
    rows = [json.loads(line) for line in answers.splitlines()]
    assert all(list(row) == ["label", "score"] for row in rows)
    assert [row["score"] for row in rows] == pytest.approx(
        [max(row) for row in expected_scores(models["classifier"], TEXTS)], abs=2e-5
    )


def test_classify_pairs_ids_and_all_scores(run, models, tmp_path) -> None:
    rows = [
        {"text": "a film", "id": "x1"},
        {"text": "a film", "text_pair": "a\tplot"},
        {"text": "", "id": 0, "more": 1},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["classify", tmp_path / "in.jsonl", "-m", models["classifier"], "--all-scores", "--with-text"]
    answers = [json.loads(line) for line in run(*options, "-f", "jsonl").stdout.splitlines()]
    assert [answer.get("id") for answer in answers] == ["x1", None, 0]
    assert [answer.get("text_pair") for answer in answers] == [None, "a\tplot", None]
    expected = expected_scores(models["classifier"], ["a film", ("a film", "a\tplot"), ""])
    for answer, scores in zip(answers, expected, strict=True):
        assert list(answer["scores"].values()) == pytest.approx(scores, abs=2e-5)
    columns = run(*options).stdout.splitlines()[1].split("\t")
    assert [column.split("=")[0] for column in columns[2:]] == ["negative", "positive", "a film", "a plot"]


def test_classify_other_problems(run, models) -> None:
    def scores(name: str) -> list[dict[str, float]]:
        out = run("classify", "-", "-m", models[name], "-f", "jsonl", "--all-scores", stdin="\n".join(TEXTS)).stdout
        return [json.loads(line)["scores"] for line in out.splitlines()]

    values = expected_scores(models["regressor"], TEXTS, lambda logits: logits)
    assert [row["stars"] for row in scores("regressor")] == pytest.approx([row[0] for row in values], abs=1e-4)
    values = expected_scores(models["topics"], TEXTS, torch.sigmoid)
    assert [row["positive"] for row in scores("topics")] == pytest.approx([row[1] for row in values], abs=2e-5)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"\n\nfilm\n\n", ["", "", "film", ""]),
        (b"\xef\xbb\xbfa film\n", ["a film"]),
        ("a\u2028b\x85\x0cc\rd\n".encode(), ["a\u2028b\x85\x0cc\rd"]),
        (b"nul\x00 byte\n", ["nul\x00 byte"]),
    ],
)
def test_what_a_line_is(run, models, content: bytes, texts: list[str]) -> None:
    out = run("classify", "-", "-m", models["classifier"], "--with-text", "-f", "jsonl", stdin=content).stdout
    assert [json.loads(line)["text"] for line in out.split("\n")[:-1]] == texts


def test_bytes_that_are_not_utf8(run, models) -> None:
    content = b"fine\ncaf\xe9 bad\nfine\n"
    result = run("classify", "-", "-m", models["classifier"], stdin=content, code=1)
    assert len(result.stdout.splitlines()) == 1  # the line before it is answered
    assert "standard input, line 2: byte 4 of the line is not utf-8; --encoding names another" in result.stderr
    for option, text in ((["--encoding", "latin-1"], "caf\u00e9 bad"), (["--replace-bad-bytes"], "caf\ufffd bad")):
        out = run("classify", "-", "-m", models["classifier"], *option, "--with-text", stdin=content).stdout
        assert out.splitlines()[1].split("\t")[2] == text


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"text": "a"', "not JSON"),
        ("", "line 3: empty; expected"),
        ("[1]", "found a list"),
        ('{"txt": "a"}', "no field \"text\"; it has ['txt']"),
        ('{"text": 3}', "line 3, column 'text': expected a string, found a number"),
        ('{"text": null}', "line 3, column 'text': expected a string, found null"),
        ('{"text": "a", "text_pair": ["b"]}', "line 3, column 'text_pair': expected a string, found a list"),
        ('{"text": "a \\ud83d b"}', "line 3, column 'text': character 3 of the text, '\\ud83d', is half a surrogate"),
        ('{"text": "a", "id": "\\udfff"}', "line 3, column 'id': cannot be given back as JSON"),
        ('{"text": "a", "id": 1e999}', "line 3, column 'id': cannot be given back as JSON"),
        ('{"text": "a", "id": NaN}', "not JSON: NaN is no JSON value"),
        ('{"text": "a", "text": "b"}', "the key 'text' is there twice"),
        ('{"text": ' + "[" * 100_000, "not JSON: nested too deeply"),
        ('{"text": "a", "id": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"text": "\x00"}', "not JSON: Invalid control character"),
    ],
)
def test_bad_json_lines(run, models, tmp_path, bad: str, says: str) -> None:
    (tmp_path / "in.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "b"}}\n{bad}\n{{"text": "c"}}\n')
    result = run("classify", tmp_path / "in.jsonl", "-m", models["classifier"], code=1)
    assert len(result.stdout.splitlines()) == 2
    assert f"{tmp_path / 'in.jsonl'}, line 3" in result.stderr
    assert says in result.stderr


def test_fill_mask(run, models) -> None:
    text = "a [MASK] film is [MASK]"
    tokenizer, model = (
        load_tokenizer(models["language"]),
        reference.ALBERTForMaskedLM.from_pretrained(models["language"]),
    )
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        scores, ids = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1).topk(3)
    out = run("fill-mask", text, text, "-m", models["language"], "-k", 3, "--jsonl").stdout.splitlines()
    assert out[0] == out[1]
    answer = json.loads(out[0])
    assert answer["text"] == text
    assert [[row["token"] for row in mask] for mask in answer["masks"]] == [
        tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()
    ]
    assert [[row["score"] for row in mask] for mask in answer["masks"]] == [
        pytest.approx(row, abs=2e-5) for row in scores.tolist()
    ]
    rows = [
        line.split("\t")
        for line in run("fill-mask", "-", "-m", models["language"], "-k", 3, stdin=text).stdout.splitlines()
    ]
    assert [row[0] for row in rows] == ["1"] * 3 + ["2"] * 3
    assert all(row[3].count("[MASK]") == 1 for row in rows)


def test_special_tokens_in_the_input_are_text(run, models) -> None:
    text = "a film [SEP] <pad> dull [MASK]"
    tokenizer = load_tokenizer(models["classifier"])
    model = reference.ALBERTForSequenceClassification.from_pretrained(models["classifier"])
    with torch.no_grad():
        as_text, as_tokens = (
            model(**tokenizer(text, return_tensors="pt", split_special_tokens=split)).logits.softmax(-1)[0].tolist()
            for split in (True, False)
        )
    assert as_text != pytest.approx(as_tokens, abs=1e-4)
    options = ["classify", "-", "-m", models["classifier"], "-f", "jsonl", "--all-scores"]
    answer = json.loads(run(*options, stdin=text + "\n").stdout)
    assert list(answer["scores"].values()) == pytest.approx(as_text, abs=2e-5)
    # fill-mask reads one special token, its own.
    masked = reference.ALBERTForMaskedLM.from_pretrained(models["language"])
    batch = tokenizer(text, return_tensors="pt", split_special_tokens=["[SEP]", "<pad>"])
    with torch.no_grad():
        scores = masked(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1).topk(3)[0]
    row = json.loads(run("fill-mask", text, "-m", models["language"], "-k", 3, "--jsonl").stdout)["masks"]
    assert [[one["score"] for one in mask] for mask in row] == [pytest.approx(one, abs=2e-5) for one in scores.tolist()]


@pytest.mark.parametrize("installed", [True, False], ids=["transformers", "alone"])
def test_demo_checks_the_numbers(run, models, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if installed:
        version = pytest.importorskip("transformers").__version__
        peer, shown = "transformers' AlbertForSequenceClassification (sdpa), within", f", transformers {version}"
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
        peer = "this library's plain PyTorch reference (pip install transformers to compare with it), within"
        shown = ""
    lines = run("demo", "a fine film", "a mess", "-m", models["classifier"], "--rounds", 1).stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == ["a fine film", "a mess"]
    assert lines[5].split()[:3] == ["float32", "transformers" if installed else "reference", "ms"]
    assert f"1 thread; albert_fast {albert_fast.__version__}, Python " in lines[10]
    assert shown in lines[10]
    assert lines[11].startswith(f"Same answers as {peer}")
    assert "Same" not in run("demo", "-m", models["classifier"], "--no-bench").stdout
    load = reference.ALBERTForSequenceClassification.from_pretrained

    def off_by_a_little(*arguments, **options):
        model = load(*arguments, **options)
        with torch.no_grad():
            model.classifier.bias += 0.01
        return model

    monkeypatch.setattr(reference.ALBERTForSequenceClassification, "from_pretrained", off_by_a_little)
    assert "the logits differ from those of" in run("demo", "-m", models["classifier"], "--rounds", 1, code=1).stderr


def test_shipped_model_is_the_default(run) -> None:
    if not (Path(albert_fast.__file__).parent / "data" / "sst2-small").exists():
        pytest.skip("this checkout has no shipped model")
    texts = ["A wonderful, moving film.", "A boring, stupid mess."]
    out = run("classify", "-", stdin="\n".join(texts)).stdout
    assert [line.split("\t")[0] for line in out.splitlines()] == ["positive", "negative"]
    assert "Same answers" in run("demo", "--rounds", 1).stdout


def test_bench(run, models) -> None:
    pytest.importorskip("transformers")
    options = ["bench", "-m", models["classifier"], "-b", 3, "-l", 40, "--ragged", "--rounds", 1]
    result = json.loads(run(*options, "--json").stdout)
    assert [side["side"].split(",")[0] for side in result["sides"]] == [
        "eager reference",
        "albert_fast",
        "transformers sdpa",
    ]
    assert all(side["seconds"] > 0 and side["error"] < 1e-4 for side in result["sides"])
    assert result["case"]["tokens"] == 5 + 22 + 40
    assert result["sides"][0]["speedup"] == 1
    assert "machine" in result
    assert "67 of 120 tokens are real" in run(*options, "--precision", "bf16").stdout
    stages = json.loads(run(*options, "--profile", "--json").stdout)["stages"]
    assert all(stage["seconds"] >= 0 for stage in stages)
    text = run(*options, "--profile").stdout
    assert all(stage["name"] in text for stage in stages)
    assert "not bfloat16" in run(*options, "--profile", "--precision", "bf16", code=1).stderr


def test_info(run) -> None:
    described = json.loads(run("info", "--json").stdout)
    assert {"machine", "operators"} <= set(described)
    for library in ("transformers", "sentence-transformers"):  # those that `accelerate` works on
        found = list(importlib.metadata.distributions(name=library))
        assert described["machine"]["libraries"][library] == (found[0].version if found else None)
    assert "attention" in run("info").stdout


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [f"{'good fine' if i % 2 else 'bad dull'} film {i % 5}\t{'yes' if i % 2 else 'no'}" for i in range(40)]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return tmp_path / "train.tsv"


def test_train_evaluate_classify(run, labelled: Path, tmp_path: Path) -> None:
    new = ["--layers", 1, "--hidden-size", 32, "--heads", 2, "--intermediate-size", 64, "--embedding-size", 16]
    recipe = ["--epochs", 12, "--lr", 5e-3, "--vocab-size", 32, "--max-length", 16, "-b", 8]
    command = ["train", labelled, tmp_path / "model", "--dev", labelled, "--test", labelled, *new, *recipe]
    out = run(*command).stdout.splitlines()
    assert [json.loads(line)["epoch"] for line in out[:12]] == [*range(1, 13)]
    assert out[12].startswith(f"{tmp_path / 'model'}: the model of epoch ")
    assert json.loads(out[13].split(": ", 1)[1])["accuracy"] == 1.0
    figures = json.loads(run("evaluate", labelled, "-m", tmp_path / "model", "--metric", "f1").stdout)
    assert (figures["examples"], figures["f1"]) == (40, 1.0)
    answers = run("classify", "-", "-m", tmp_path / "model", stdin="good film\ndull film\n").stdout
    assert [line.split("\t")[0] for line in answers.splitlines()] == ["yes", "no"]
    assert "resume" in run(*command, code=1).stderr
    assert run(*command, "--resume").stdout.splitlines()[:12] == out[:12]
    fresh = [
        "train",
        labelled,
        tmp_path / "tuned",
        "--init-from",
        tmp_path / "model",
        "--epochs",
        1,
        "--max-length",
        16,
    ]
    assert "epoch 1" in run(*fresh).stdout


def test_train_defaults_are_the_recipes(monkeypatch: pytest.MonkeyPatch, run, labelled: Path, tmp_path: Path) -> None:
    import albert_fast.training as training

    given = {}

    def fit(*arguments, **options):
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", fit)
    assert "interrupted; nothing was saved yet" in run("train", labelled, tmp_path / "model", code=130).stderr
    assert dataclasses.asdict(given["recipe"]) == dataclasses.asdict(training.Recipe())
    assert given["config"] is None
    run("train", labelled, tmp_path / "model", "--layers", "7", "--text-column", "0", "--label-names", "a,b", code=130)
    sizes = given["config"].to_dict()
    default = training.small_config(128).to_dict()
    assert {key for key in sizes if sizes[key] != default[key]} == {"num_hidden_layers"}
    assert (given["text_column"], given["label_names"]) == (0, ["a", "b"])
    shown = " ".join(run("train", "--help").stdout.split())
    named = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
    for option in ("layers", "heads", "hidden-size", "embedding-size", "intermediate-size"):
        name = named.get(option, option.replace("-", "_"))
        assert re.search(rf"--{option} [^-]* of a new model\. \[default: \({default[name]}\)", shown), option
