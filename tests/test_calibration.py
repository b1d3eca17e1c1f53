"""A calibration may never hurt: against no calibration, on data like its own, for every structure of outliers."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from albert_fast import ALBERTConfig, ALBERTModel
from albert_fast.quantization.calibration import ENOUGH_TOKENS
from albert_fast.testing import require_data

CONFIG = ALBERTConfig(
    vocab_size=90, embedding_size=24, hidden_size=64, num_hidden_layers=5, num_attention_heads=4, intermediate_size=160,
    max_position_embeddings=64, initializer_range=0.08,
)  # fmt: skip
Change = Callable[[ALBERTModel], None]


def norms(channels: list[int], weight: float | None = None, bias: float | None = None) -> Change:
    """Sets channels of both LayerNorms of the layer."""

    def change(model: ALBERTModel) -> None:
        layer = model.encoder.distinct()[0]
        for norm in (layer.attention.LayerNorm, layer.full_layer_layer_norm):
            if weight is not None:
                norm.weight[channels] = weight
            if bias is not None:
                norm.bias[channels] = bias

    return change


def small_embeddings(model: ALBERTModel) -> None:
    """The first layer is given rows a hundredth of those that the others are given."""
    model.encoder.embedding_hidden_mapping_in.weight.mul_(0.01)
    norms([5], 3.0, 3.0)(model)


def large_middle(model: ALBERTModel) -> None:
    layer = model.encoder.distinct()[0]
    layer.ffn.bias[:5] = 50.0
    layer.ffn_output.weight[3] *= 20


STRUCTURES = {
    "ordinary": lambda model: None,
    "few channels vary much": norms([3, 17, 30, 60], 30.0),
    "one huge channel": norms([7], 300.0),
    "constant channels": norms([7, 9], 0.0, 20.0),
    "small embeddings": small_embeddings,
    "large channels of the FFN": large_middle,
}


def made(change: Change = lambda model: None) -> ALBERTModel:
    torch.manual_seed(5)
    model = ALBERTModel(CONFIG, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
        change(model)
    return model


def hidden(model: ALBERTModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).last_hidden_state.float()


def error(change: Change, precision: str, calibration: list[Tensor] | None, ids: Tensor) -> float:
    """Relative error of the hidden states of `ids`, in the arithmetic of the reference for what no CPU multiplies."""
    model = made(change)
    exact = hidden(model, ids)
    model.execution.use("reference" if precision == "fp8" else "auto", precision, calibration)
    return float((hidden(model, ids) - exact).norm() / exact.norm())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_a_calibration_never_hurts(structure: str, precision: str) -> None:
    generator = torch.Generator().manual_seed(8)
    calibration = [torch.randint(90, (4, 40), generator=generator), torch.randint(90, (3, 25), generator=generator)]
    ids = torch.randint(90, (6, 30), generator=generator)
    errors = [error(STRUCTURES[structure], precision, given, ids) for given in (None, calibration)]
    assert errors[1] <= errors[0]
    if (precision == "int16" and structure != "one huge channel") or structure == "ordinary":
        assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("structure", ["ordinary", "one huge channel", "constant channels"])
def test_a_calibration_of_float8_never_hurts(structure: str) -> None:
    generator = torch.Generator().manual_seed(8)
    calibration, ids = (torch.randint(90, shape, generator=generator) for shape in ((4, 40), (4, 30)))
    errors = [error(STRUCTURES[structure], "fp8", given, ids) for given in (None, [calibration])]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_a_calibration_of_a_few_tokens_is_none(precision: str) -> None:
    models = [made(norms([3, 17], 30.0)) for _ in range(2)]
    models[0].execution.use("auto", precision)
    with pytest.warns(UserWarning, match=rf"a calibration of 1 tokens is too short.*{ENOUGH_TOKENS} or more"):
        models[1].execution.use("auto", precision, [torch.tensor([[7]])])
    for key, tensor in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[key], tensor), key


@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_a_calibration_of_equal_tokens(precision: str) -> None:
    calibration = [torch.full((4, 40), 7)]
    like, unlike = torch.full((2, 30), 7), torch.randint(90, (4, 30), generator=torch.Generator().manual_seed(8))
    change = STRUCTURES["few channels vary much"]
    errors = [error(change, precision, given, like) for given in (None, calibration)]
    assert errors[1] <= errors[0]
    assert error(change, precision, calibration, unlike) < 0.5, "worse for data that it has not seen, and no nonsense"


@pytest.mark.thorough  # test_real_error has the same encoder, calibrated, against a bound
@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_the_real_encoder(precision: str) -> None:
    data = require_data("plbert")
    symbols = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    lines = (data / "phonemes.txt").read_text(encoding="utf-8").splitlines()
    rows = [torch.tensor([[0, *(symbols[c] for c in line), 0]])[:, :120] for line in lines[:12] + lines[1000:1003]]
    exact = ALBERTModel.from_pretrained(data)
    expected = torch.cat([hidden(exact, ids)[0] for ids in rows[12:]])
    errors = []
    for calibration in (None, rows[:12]):
        model = ALBERTModel.from_pretrained(data, precision=precision, calibration=calibration)
        found = torch.cat([hidden(model, ids)[0] for ids in rows[12:]])
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] < errors[0]
