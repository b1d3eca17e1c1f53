"""torch.set_default_dtype changes what a user's own tensors are, and nothing of a loaded or trained model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import albert_fast
from albert_fast import ALBERTConfig, ops
from albert_fast.models import reference
from albert_fast.quantization.calibration import random_batches
from albert_fast.text.tokenizer import train_tokenizer
from albert_fast.training.data import TextDataset
from albert_fast.training.masking import MaskedTextDataset

DTYPES = (torch.float64, torch.float16, torch.bfloat16)
CONFIG = ALBERTConfig(
    vocab_size=90, embedding_size=16, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=100,
    max_position_embeddings=40, initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(params=DTYPES, ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The default dtype that a test sets after it has made what it expects."""
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    albert_fast.ALBERTForSequenceClassification(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def outputs(module: ModuleType, folder: Path, precision: str, calibrated: bool) -> list[Tensor]:
    ids = torch.arange(84).view(6, 14)
    options = {"calibration": [ids + 1, (ids[:3], (ids[:3] % 5 > 0).long())]} if calibrated else {}
    model = module.ALBERTForSequenceClassification.from_pretrained(folder, precision=precision, **options)
    with torch.no_grad():
        out = model(ids, labels=torch.arange(6) % 2)
    return [*model.state_dict().values(), out.loss, out.logits]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int16"])
def test_a_loaded_model_is_the_same(precision: str, folder: Path, default: torch.dtype) -> None:
    calibrated = precision.startswith("int")
    expected = outputs(albert_fast, folder, precision, calibrated)
    torch.set_default_dtype(default)
    for found, wanted in zip(outputs(albert_fast, folder, precision, calibrated), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_a_loaded_eager_model_and_a_rounded_checkpoint_are_the_same(folder: Path, default: torch.dtype) -> None:
    albert_fast.ALBERTForSequenceClassification.from_pretrained(folder, precision="int16").save_pretrained(
        folder / "16"
    )
    cases = ((reference, folder, "fp32"), (albert_fast, folder / "16", "int16"))
    expected = [outputs(*case, False) for case in cases]
    torch.set_default_dtype(default)
    for case, wanted in zip(cases, expected, strict=True):
        assert all(map(torch.equal, outputs(*case, False), wanted))


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_a_model_made_in_another_dtype_can_be_rounded(precision: str, default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    torch.manual_seed(3)
    model = albert_fast.ALBERTModel(CONFIG).eval()
    assert model.embeddings.word_embeddings.weight.dtype == default
    ids = torch.arange(84).view(6, 14)
    exact = reference.ALBERTModel(CONFIG).eval()
    exact.load_state_dict(model.state_dict())
    model.execution.use("auto", precision, [ids])
    with torch.no_grad():
        found, wanted = model(ids).last_hidden_state, exact.float()(ids).last_hidden_state
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_random_batches_and_a_new_head_are_the_same(folder: Path, default: torch.dtype) -> None:
    sizes = CONFIG.vocab_size, CONFIG.max_position_embeddings
    expected = random_batches(*sizes)
    albert_fast.ALBERTModel.from_pretrained(folder).save_pretrained(folder / "bare")
    torch.set_default_dtype(default)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(random_batches(*sizes), expected, strict=True))
    with pytest.warns(UserWarning, match="start at random"):
        model = albert_fast.ALBERTForTokenClassification.from_pretrained(folder / "bare", allow_missing_head=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_batches_of_training_are_the_same(default: torch.dtype) -> None:
    tokenizer = train_tokenizer(["ein kleiner Text, noch ein Text, und mehr"] * 9, 60, kind="wordpiece")
    texts = ["ein Text, und noch ein kleiner Text", "mehr Text, ein kleiner"] * 4

    def drawn() -> list[dict[str, Tensor]]:
        torch.manual_seed(5)
        masked = MaskedTextDataset(texts, tokenizer, with_wanted_tokens=True)
        labelled = TextDataset(texts, [0, 1] * 4, tokenizer, piece_dropout=0.3)
        return [data.collate([data[i] for i in range(8)]) for data in (masked, labelled)]

    expected = drawn()
    torch.set_default_dtype(default)
    for found, wanted in zip(drawn(), expected, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_reference_on_a_cpu_is_the_same(default: torch.dtype) -> None:
    q = torch.randn(9, 32, dtype=torch.float32)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = ops.attention(q, q, q, cu, cu, 5, 5, 2, 0.3, backend="reference")
    torch.set_default_dtype(default)
    assert torch.equal(ops.attention(q, q, q, cu, cu, 5, 5, 2, 0.3, backend="reference"), expected)
