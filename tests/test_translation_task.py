"""Training and measuring a translator: two aligned files in, a model that reverses words out."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from albert_fast import ALBERTSeq2SeqConfig, Translator
from albert_fast.checkpoints.weights import shipped_model
from albert_fast.cli import build_app
from albert_fast.text.aligned_files import read_aligned
from albert_fast.text.tokenizer import train_tokenizer
from albert_fast.training import Recipe, evaluate, fit, train
from albert_fast.training.data import Examples
from albert_fast.training.tasks.translate import PairDataset, Translate, longest_answers

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["Hund", "Katze", "Haus", "Caf\u00e9", "rot", "blau", "gro\u00df", "klein"]


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(count)]


def write_pairs(folder: Path, name: str, count: int, seed: int) -> tuple[Path, Path]:
    """A file of sentences, and a packed one of the same in capitals."""
    lines = sentences(count, seed)
    files = folder / f"{name}.de", folder / f"{name}.up.gz"
    files[0].write_text("\n".join(lines) + "\n")
    files[1].write_bytes(gzip.compress(("\n".join(line.upper() for line in lines) + "\n").encode()))
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("pairs")
    return {name: write_pairs(folder, name, count, seed) for name, count, seed in (("train", 200, 1), ("dev", 20, 2))}


def small(**changes) -> ALBERTSeq2SeqConfig:
    return ALBERTSeq2SeqConfig(
        embedding_size=32,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        num_hidden_layers=2,
        num_decoder_layers=2,
        max_position_embeddings=32,
        **changes,
    )


def test_a_translator_learns_resumes_and_is_measured(files, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    recipe = Recipe(epochs=7, batch_size=16, learning_rate=4e-3, max_length=20, label_smoothing=0.1)
    options = {"task": "translation", "dev_file": files["dev"], "config": small(), "vocab_size": 60, "progress": False}
    whole = fit(files["train"], tmp_path / "whole", recipe=recipe, **options)
    losses = [record["train_loss"] for record in whole.history]
    assert losses[-1] < 0.6 * losses[0]
    assert whole.metric == "bleu"
    assert whole.best_value == max(record["dev_bleu"] for record in whole.history)
    # An end after two epochs, and the rest from the saved state: the same numbers.
    first = Recipe(**{**vars(recipe), "epochs": 2})
    name = ",".join(map(str, files["train"]))
    fit(name, tmp_path / "parts", recipe=first, **options)
    resumed = fit(name, tmp_path / "parts", recipe=recipe, resume=True, **options)
    assert len(resumed.history) == 7
    assert [record["epoch"] for record in resumed.history] == list(range(1, 8))

    measured = evaluate(tmp_path / "whole", files["dev"], metrics=["bleu", "chrf"], progress=False)
    assert measured.task == "translation"
    assert measured.metrics["bleu"] == pytest.approx(whole.best_value)
    assert measured.expected == [target for _, target in read_aligned(*files["dev"])]
    sources = [source for source, _ in read_aligned(*files["dev"])]
    assert measured.predicted == Translator(tmp_path / "whole").translate(sources, num_beams=1)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == "encoder-decoder"


def test_tables_and_other_sources(tmp_path: Path) -> None:
    rows = [{"source": line, "target": line.upper()} for line in sentences(12, 3)]
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"task": "translation", "config": small(), "vocab_size": 60, "progress": False}
    recipe, losses = Recipe(epochs=1, max_length=20, metric="loss"), []
    for number, source in enumerate((table, rows)):
        losses.append(fit(source, tmp_path / str(number), recipe=recipe, **options).history[0]["train_loss"])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="no column 'source' or 'text' for the source"):
        fit([{"a": "b"}], tmp_path / "c", recipe=recipe, **options)
    long = [{"source": "Hund Katze Haus", "target": "HUND"}] * 2
    with pytest.raises(ValueError, match="all 2 pairs have a text of more than 3 tokens"):
        fit(long, tmp_path / "c", recipe=Recipe(epochs=1, max_length=3), **options)
    said: list[str] = []
    longer = {"source": "Hund", "target": "HUND " * 20}
    fit(
        [*rows, longer], tmp_path / "d", recipe=dataclasses.replace(recipe, batch_size=4), report=said.append, **options
    )
    assert "1 of 13 pairs left out: a text has more than 20 tokens (max_length)" in said
    assert any("1 epoch of 3 steps" in line for line in said), "12 pairs in batches of 4"
    with pytest.raises(ValueError, match="piece_dropout is for an encoder alone; the task is translation"):
        fit(rows, tmp_path / "c", recipe=Recipe(piece_dropout=0.1), **options)
    with pytest.raises(ValueError, match="needs an ALBERTSeq2SeqConfig, got ALBERTConfig"):
        fit(rows, tmp_path / "c", task="translation", init_from=shipped_model(), progress=False)


def test_aligned_files(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a b\r\n\nc\nnull\n")
    other.write_text("A B\nX\n \nNA\n")
    assert read_aligned(one, other) == [("a b", "A B"), ("null", "NA")], "pairs without a word on one side are left out"
    other.write_text("A B\n")
    with pytest.raises(ValueError, match=r"one has 4 lines and .*other 1: line n of one must belong to line n"):
        read_aligned(one, other)
    other.write_bytes(b"x\n\xff\nx\nx\n")
    with pytest.raises(ValueError, match="other, line 2: byte 1 of the line is not utf-8"):
        read_aligned(one, other)
    for path in (one, other):
        path.write_text("")
    with pytest.raises(ValueError, match="no pair of lines with words on both sides"):
        read_aligned(one, other)
    with pytest.raises(FileNotFoundError):
        read_aligned(one, tmp_path / "absent")


def test_batches_train_on_the_labels_alone() -> None:
    """The mean loss counts target tokens, also where a batch has as many source as target columns."""
    from albert_fast import ALBERTForConditionalGeneration

    tokenizer = train_tokenizer(sentences(200, 5), 40, at_most=True, lower_case=False, keep_accents=True)
    texts = sentences(6, 6)
    data = PairDataset(texts, texts[::-1], tokenizer, 20)
    batch = data.collate([data[index] for index in range(6)])
    labels, given = batch["labels"], batch["decoder_input_ids"]
    real = labels != -100
    assert torch.equal(batch["decoder_attention_mask"].bool(), real)
    assert (given[:, 0] == tokenizer.cls_token_id).all()
    assert torch.equal(given[:, 1:][real[:, 1:]], labels[:, :-1][real[:, 1:]])
    assert [int(row[mask][-1]) for row, mask in zip(labels, real, strict=True)] == [tokenizer.sep_token_id] * 6
    model = ALBERTForConditionalGeneration(small(vocab_size=tokenizer.vocab_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    counted = []
    width = min(batch["input_ids"].shape[1], labels.shape[1])
    square = {key: value[:, :width] for key, value in batch.items()}
    assert not square["attention_mask"].bool()[real[:, :width]].all(), "a source is shorter than its target"
    for one in (batch, square):
        train(
            model, [one], None, optimizer, "cpu", after_step=lambda loss, count: counted.append(count), progress=False
        )
    assert counted == [int(real.sum()), int(real[:, :width].sum())]


def test_measuring_a_model_that_ends_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    from albert_fast import ALBERTForConditionalGeneration
    from albert_fast.training import progress

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    tokenizer = train_tokenizer(sentences(200, 5), 40, at_most=True, lower_case=False, keep_accents=True)
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.sep_token_id, "num_hidden_groups": 1}
    model = ALBERTForConditionalGeneration(small(**sizes).replace(max_position_embeddings=200)).eval()
    model.decoder.generator_lm_head.bias.data[tokenizer.sep_token_id] = -1e4
    texts = [" ".join(WORDS[:count]) for count in (1, 2, 4, 8)]
    for factor in (1, 3):
        data = PairDataset(texts, [" ".join([text] * factor) for text in texts], tokenizer, 150)
        examples = Examples(texts, texts, None)
        tokens = [len(ids) for ids in data.input_ids]
        longest = longest_answers(data, 200)
        if factor == 1:
            assert longest == [2 * count + 10 for count in tokens]
        assert all(len(target) < most for target, most in zip(data.labels, longest, strict=True))
        asked, found, write = [], [], model.write

        def counted(inputs, options, write=write, asked=asked):
            asked.append(options.max_new_tokens)
            return write(inputs, options)

        for size in (1, 4):
            with monkeypatch.context() as patch:
                patch.setattr(model, "write", counted)
                measured = Translate().measure(
                    model, data, examples, metrics=["bleu"], batch_size=size, device="cpu", progress=True
                )
            found.append(measured.predicted)
        assert sorted(asked) == sorted([*longest, max(longest)])
        assert found[0] == found[1], "the other texts of a batch change nothing"
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("translate: step 1 of ")]
        assert len(lines) == 2
        assert "loss" not in lines[0]


def test_train_from_the_command_line(files, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")

    def run(*arguments: object, code: int = 0):
        result = CliRunner().invoke(build_app(), list(map(str, arguments)))
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return result

    pairs, model = ",".join(map(str, files["dev"])), tmp_path / "model"
    sizes = (
        "--layers",
        2,
        "--decoder-layers",
        3,
        "--groups",
        1,
        "--decoder-groups",
        1,
        "--heads",
        2,
        "--hidden-size",
        32,
    )
    sizes += "--embedding-size", 16, "--intermediate-size", 64, "--vocab-size", 60
    run("train", pairs, model, *sizes, "--epochs", 1, "--max-length", 20, "--dev", pairs)
    config = ALBERTSeq2SeqConfig.from_json_file(model / "config.json")
    assert (config.num_hidden_layers, config.num_decoder_layers, config.num_decoder_groups) == (2, 3, 1)
    assert (config.num_attention_heads, config.decoder_attention_heads) == (2, 2)
    figures = json.loads(run("evaluate", pairs, "-m", model, "--metric", "chrf").stdout)
    assert figures.keys() == {"examples", "loss", "chrf"}
    assert len(run("translate", files["dev"][0], "-m", model, "--max-new-tokens", 5).stdout.splitlines()) == 20
    message = run("train", files["dev"][0], tmp_path / "c", "--decoder-layers", 3, code=2).stderr
    assert "--decoder-layers is for --task translation" in message
