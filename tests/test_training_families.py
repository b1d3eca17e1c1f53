"""Training, measuring, classifying and filling masks with checkpoints of other families than ALBERT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from albert_fast import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BERTConfig,
    DistilBERTConfig,
    RoBERTaConfig,
)
from albert_fast.cli import build_app
from albert_fast.text.tokenizer import train_tokenizer
from albert_fast.training import Recipe, evaluate, fit

pytest.importorskip("tokenizers", reason="the text extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [(f"{'good fine' if i % 2 else 'bad dull'} film {i % 5}", "yes" if i % 2 else "no") for i in range(48)]
BERT_SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
DISTILBERT_SIZES = {"dim": 32, "n_heads": 2, "hidden_dim": 48, "n_layers": 2}
FAMILIES = {
    "bert": (BERTConfig, BERT_SIZES),
    "distilbert": (DistilBERTConfig, DISTILBERT_SIZES),
    "roberta": (RoBERTaConfig, BERT_SIZES),
}
RECIPE = Recipe(epochs=6, batch_size=8, learning_rate=5e-3, max_length=12, pretrain_epochs=1, pretrain_batch_size=8)


@pytest.fixture(params=FAMILIES)
def pretrained(request, tmp_path: Path) -> Path:
    """A checkpoint with a masked-language head, random weights and a vocabulary of ROWS."""
    kind, sizes = FAMILIES[request.param]
    tokenizer = train_tokenizer(sorted({text for text, _ in ROWS}), 60, at_most=True, seed=0)
    torch.manual_seed(0)
    config = kind(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=20, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "rows.tsv").write_text("\n".join("\t".join(row) for row in [("text", "label"), *ROWS]) + "\n")
    return tmp_path / "rows.tsv"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_from_a_checkpoint_to_answers(pretrained: Path, table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    result = fit(table, folder, dev_file=table, init_from=pretrained, recipe=RECIPE, progress=False)
    assert result.best_value == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == model.config.longest  # RoBERTa's first positions are for padding
    assert type(model).__name__.startswith(
        type(AutoModelForMaskedLM.from_pretrained(pretrained)).__name__.split("For")[0]
    )
    assert evaluate(folder, table, progress=False).metrics == {"accuracy": 1.0}
    assert json.loads(run("evaluate", table, "--model", folder))["accuracy"] == 1.0
    answers = run("classify", table, "--model", folder, "--label-column", "label").splitlines()
    assert [answer.split("\t")[0] for answer in answers] == [label for _, label in ROWS]
    mask = "[MASK]"
    assert len(run("fill-mask", f"good {mask} film", "--model", pretrained, "--top-k", 3).splitlines()) == 3


def test_the_command_starts_from_any_family(pretrained: Path, table: Path, tmp_path: Path) -> None:
    out = run("train", table, tmp_path / "out", "--init-from", pretrained, "--epochs", 1, "--max-length", 12)
    assert "the model of epoch 1" in out


def test_what_a_family_cannot_do_is_named_before_the_first_step(pretrained: Path, table: Path, tmp_path: Path) -> None:
    longer = Recipe(max_length=40)
    with pytest.raises(ValueError, match=r"need 40 positions, the model has (20|19|18)"):
        fit(table, tmp_path / "out", init_from=pretrained, recipe=longer, progress=False)
    if "roberta" in (pretrained / "config.json").read_text():
        with pytest.raises(ValueError, match="position_shift: roberta counts positions from its pad token"):
            fit(
                table,
                tmp_path / "out",
                init_from=pretrained,
                recipe=Recipe(max_length=8, position_shift=2),
                progress=False,
            )
