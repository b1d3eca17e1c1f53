"""Translator and `albert-fast translate`: a line for each line, in order, equal to what the model generates."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from albert_fast import ALBERTForConditionalGeneration, ALBERTSeq2SeqConfig, TextEncoder, TextTagger, Translator
from albert_fast.checkpoints.weights import shipped_model
from albert_fast.cli import build_app
from albert_fast.tasks.classify import TextClassifier
from albert_fast.tasks.errors import UsageError
from albert_fast.testing.small_checkpoints import save_small_model
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a fine film, quiet and odd", "", "the plot is a mess " * 4, "Caf\u00e9", "dull", "  ", "film"]
APP = build_app()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, whose texts end at different lengths."""
    where = tmp_path_factory.mktemp("translator")
    tokenizer = train_tokenizer([*TEXTS, "never say never: a good, bad, new story!"] * 4, 46)
    config = ALBERTSeq2SeqConfig(
        vocab_size=tokenizer.vocab_size,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=2,
        num_decoder_layers=2,
        max_position_embeddings=48,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        initializer_range=0.5,
    )
    return save_small_model(ALBERTForConditionalGeneration, config, tokenizer, where)


def expected(folder: Path, texts: list[str], **options) -> list[str]:
    """Each text alone."""
    tokenizer, model = load_tokenizer(folder), ALBERTForConditionalGeneration.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer([text], max_length=48, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=20, **options)[0]
        found.append(tokenizer.decode(written, skip_special_tokens=True) if text.strip() else "")
    return found


@pytest.mark.parametrize("beams", [1, 3])
def test_translations_are_what_the_model_generates(folder: Path, beams: int) -> None:
    wanted = expected(folder, TEXTS, num_beams=beams)
    assert len(set(wanted)) > 3
    translator = Translator(folder, batch_size=3)
    assert translator.translate(TEXTS, num_beams=beams, max_new_tokens=20) == wanted
    assert translator(TEXTS[:1], num_beams=beams, max_new_tokens=20) == wanted[:1]
    assert translator.translate([]) == []


def test_a_model_of_another_task_is_refused_with_its_command(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"has no decoder, .*; `albert-fast classify` reads it"):
        Translator(shipped_model())
    for task, head in (
        (TextClassifier, "classifier"),
        (TextTagger, "token classifier"),
        (TextEncoder, "encoder of its own"),
    ):
        with pytest.raises(UsageError, match=rf"has no {head}; `albert-fast translate` reads it"):
            task(folder)


def test_what_a_translator_refuses(folder: Path) -> None:
    translator = Translator(folder)
    with pytest.raises(TypeError, match="texts must be a list of str"):
        translator.translate("one text")
    with pytest.raises(TypeError, match="text 1 is two texts"):
        translator.translate(["a", ("b", "c")])
    with pytest.raises(UsageError, match="the model has 48 positions"):
        translator.translate(["a"], max_new_tokens=49)
    with pytest.raises(ValueError, match=r"holds half a surrogate pair, U\+D800"):
        translator.translate(["a", "\ud800"])


@pytest.fixture
def run():
    def call(*arguments: object, code: int = 0, stdin: str | None = None):
        result = CliRunner().invoke(APP, ["translate", *map(str, arguments)], input=stdin)
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return result

    return call


def test_the_command_answers_each_line(folder: Path, run, tmp_path: Path) -> None:
    wanted = expected(folder, TEXTS, num_beams=4)
    options = "-m", folder, "--max-new-tokens", 20, "-b", 2
    source = tmp_path / "lines.txt.gz"
    source.write_bytes(gzip.compress("\n".join(TEXTS).encode() + b"\n"))
    assert run(source, *options).stdout.splitlines() == wanted
    assert run("-", *options, stdin="\n".join(TEXTS) + "\n").stdout.splitlines() == wanted
    assert run(TEXTS[0], *options).stdout.splitlines() == wanted[:1]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"id": i, "en": text}) + "\n" for i, text in enumerate(TEXTS)))
    lines = run(table, *options, "--text-column", "en", "-f", "jsonl").stdout.splitlines()
    assert list(map(json.loads, lines)) == [
        {"id": i, "text": text, "translation": translation}
        for i, (text, translation) in enumerate(zip(TEXTS, wanted, strict=True))
    ]


def test_searches_of_the_command(folder: Path, run) -> None:
    text, options = TEXTS[0], ("-m", folder, "--max-new-tokens", 20)
    greedy = run(text, *options, "-n", 1).stdout
    assert greedy.splitlines() == expected(folder, [text])
    assert run(text, *options, "--sample", "--top-k", 1).stdout == greedy
    drawn = {run(text, *options, "--sample", "--seed", seed).stdout for seed in (1, 1, 2)}
    assert len(drawn) == 2
    longer = expected(folder, [text], num_beams=4, length_penalty=3.0, early_stopping="never")
    assert run(text, *options, "--length-penalty", 3, "--stopping", "never").stdout.splitlines() == longer


def test_failures_of_the_command(folder: Path, run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"film\n\xff\n")
    result = run(bad, "-m", folder, code=1)
    assert len(result.stdout.splitlines()) == 1
    assert "bad.txt, line 2: byte 1 of the line is not utf-8" in result.stderr
    assert "--max-new-tokens 99" in run("film", "-m", folder, "--max-new-tokens", 99, code=2).stderr
    assert "add --sample" in run("film", "-m", folder, "--seed", 1, code=2).stderr
    assert "--top-k is for sampling: add --sample" in run("film", "-m", folder, "--top-k", 2, code=2).stderr
    assert "--temperature is for sampling" in run("film", "-m", folder, "--temperature", 1, code=2).stderr
    for option in (("--num-beams", 4), ("--length-penalty", 1), ("--stopping", "usual")):
        for other in (("--sample",), ("--num-beams", 1)):
            if option[0] != other[0]:
                message = run("film", "-m", folder, *option, *other, code=2).stderr
                assert f"{option[0]} has no effect with {other[0]}" in " ".join(message.split())
    assert "no config.json" in run("film", "-m", tmp_path, code=1).stderr


def test_a_model_that_is_no_translator_is_named(run) -> None:
    said = run("film", "-m", shipped_model(), code=2).stderr
    assert "has no decoder, which writes translations; `albert-fast classify` reads it" in said
