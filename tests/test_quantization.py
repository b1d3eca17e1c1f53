"""Models with rounded layers: their error against float32, saving and loading, calibration, and what they refuse."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import albert_fast
from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel
from albert_fast.layers.quantized import fits_sums
from albert_fast.models import reference
from albert_fast.quantization.calibration import Rows, quantize
from albert_fast.quantization.rounding import NEAREST, Fit, gptq, int16_scale, rescaling, rounded_linear
from albert_fast.runtime.dispatch import BackendUnavailableError
from albert_fast.testing import require_data

CONFIG = ALBERTConfig(
    vocab_size=101, embedding_size=24, hidden_size=80, num_hidden_layers=4, num_hidden_groups=2, num_attention_heads=4,
    intermediate_size=900, max_position_embeddings=64, initializer_range=0.08,
)  # fmt: skip
# Relative error of the hidden states of such a random model; the real encoder's bounds stand in test_real_error.
ALLOWED = {"int8": 0.06, "int16": 4e-3}


def batch(rows=5, columns=33):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(CONFIG.vocab_size, (rows, columns), generator=generator)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    return ids, (torch.arange(columns) < lengths).long()


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(7)
    model = reference.ALBERTModel(CONFIG)
    with torch.no_grad():  # biases and norms as a trained model has them, and a channel far above the others
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
        layer = model.encoder.albert_layer_groups[0].albert_layers[0]
        layer.full_layer_layer_norm.bias[3] = 20.0
    model.save_pretrained(tmp_path)
    return tmp_path


def hidden(model, **options):
    with torch.no_grad():
        return model(*batch(), **options).last_hidden_state


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_error_against_float32(folder, precision, calibrated):
    expected = hidden(ALBERTModel.from_pretrained(folder))
    calibration = [batch(8, 40), torch.randint(101, (3, 20))] if calibrated else None
    model = ALBERTModel.from_pretrained(folder, precision=precision, calibration=calibration)
    assert relative_error(hidden(model), expected) < ALLOWED[precision]
    plain = hidden(
        ALBERTModel.from_pretrained(folder, precision=precision, backend="reference", calibration=calibration)
    )
    assert relative_error(hidden(model), plain) < ALLOWED[precision] / 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_changes_nothing(folder, mode):
    calibration = [batch(4, 20)]
    expected = hidden(ALBERTModel.from_pretrained(folder, precision="int8", calibration=calibration))
    with mode():
        model = ALBERTModel.from_pretrained(folder, precision="int8", calibration=calibration)
        assert torch.equal(model(*batch()).last_hidden_state, expected)


def test_int16_is_nearer_to_float32_than_bfloat16(folder):
    expected = hidden(ALBERTModel.from_pretrained(folder))
    errors = {p: relative_error(hidden(ALBERTModel.from_pretrained(folder, precision=p)).float(), expected)
              for p in ("int16", "bf16")}  # fmt: skip
    assert errors["int16"] < errors["bf16"] / 3


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_saved_integers_load_again(folder, tmp_path, precision):
    model = ALBERTModel.from_pretrained(folder, precision=precision)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    again = ALBERTModel.from_pretrained(saved, precision=precision)
    assert torch.equal(hidden(again), hidden(model))
    state = load_file(saved / "model.safetensors")
    key = "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"
    assert state[key].dtype == {"int8": torch.int8, "int16": torch.int16}[precision]
    assert state[key].shape == (80, 80)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    for other in {"fp32", "int8", "int16"} - {precision}:
        with pytest.raises(ValueError, match=f"holds {precision} weights: load it with precision='{precision}'"):
            ALBERTModel.from_pretrained(saved, precision=other)
    with pytest.raises(ValueError, match="plain PyTorch"):
        reference.ALBERTModel.from_pretrained(saved, precision=precision)


def test_one_copy_of_the_weights(folder):
    model = ALBERTModel.from_pretrained(folder, precision="int8")
    floats = {p.shape for layer in model.encoder.distinct() for p in layer.parameters() if p.dim() > 1}
    assert floats == set()
    packed = sum(linear.integers.numel() for layer in model.encoder.distinct() for linear in layer.products())
    assert packed == 2 * (4 * 96 * 80 + 928 * 80 + 96 * 900)


def test_broken_integer_checkpoints_are_named(folder, tmp_path):
    saved = tmp_path / "saved"
    ALBERTModel.from_pretrained(folder, precision="int16").save_pretrained(saved)
    state = load_file(saved / "model.safetensors")
    key = "encoder.albert_layer_groups.1.albert_layers.0.ffn.weight"

    def check(changed, message):
        save_file({**state, **changed}, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
            ALBERTModel.from_pretrained(saved, precision="int16")

    check({key: state[key].float()}, rf"{key}.*must be a dense tensor of torch.int16, got torch.float32")
    check({key: state[key][:-1].clone()}, rf"{key}.*has the shape")
    for named in (key, key.replace("ffn", "attention.query")):
        check({named: torch.full_like(state[named], -32768)}, f"'{named}' has sums that do not fit the 32 bits")
    scale = key.replace("weight", "weight_scale")
    for name in (scale, key.replace("weight", "rescale"), key.replace("weight", "shift")):
        for wrong in (float("nan"), float("inf"), float("-inf")):
            check(
                {name: state[name].clone().index_fill_(0, torch.tensor([1]), wrong)},
                f"'{name}' has elements that are NaN",
            )
        check({name: state[name].int()}, f"'{name}' must be a dense tensor of floats, got torch.int32")
        check({name: state[name][1:].clone()}, f"'{name}' has the shape")
    check({scale: -state[scale]}, f"'{scale}' has negative elements")
    save_file({k: v for k, v in state.items() if k != scale}, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{scale}.*is missing"):
        ALBERTModel.from_pretrained(saved, precision="int16")
    config = json.loads((saved / "config.json").read_text())
    for wrong in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "albert_fast", "bits": 4}, 8):
        (saved / "config.json").write_text(json.dumps({**config, "quantization_config": wrong}))
        with pytest.raises(ValueError, match="is not one of this library's"):
            ALBERTModel.from_pretrained(saved, precision="int16")


@pytest.mark.parametrize("model_class", [ALBERTForSequenceClassification, ALBERTForMaskedLM])
def test_heads_run_on_integer_layers(folder, model_class):
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="start at random"):
        exact = model_class.from_pretrained(folder, allow_missing_head=True)
    exact.save_pretrained(folder / "head")
    fast = model_class.from_pretrained(folder / "head", precision="int16")
    with torch.no_grad():
        a, b = fast(*batch()).logits, exact(*batch()).logits
    real = torch.isfinite(b)
    assert relative_error(a[real], b[real]) < 0.02


def test_what_integer_layers_can_and_cannot_give(folder):
    model = ALBERTModel.from_pretrained(folder, precision="int8")
    with torch.no_grad():
        out = model(*batch(), output_hidden_states=True)
        assert len(out.hidden_states) == 5
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert torch.equal(out.last_hidden_state, hidden(model))
        ids, mask = batch()
        wanted = torch.rand(ids.shape) < 0.3
        asked = model(ids, mask, wanted_tokens=wanted).last_hidden_state
        assert torch.equal(asked, hidden(model)[wanted & mask.bool()])
        first = model(ids, mask, wanted_tokens="first").pooler_output
        assert torch.equal(first, model(ids, mask).pooler_output)
        with pytest.raises(ValueError, match="output_attentions: integer layers"):
            model(*batch(), output_attentions=True)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()(*batch())
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*batch()).last_hidden_state, hidden(model))
    text = str(albert_fast.explain(model, *batch()))
    assert "quantized_encoder" in text
    assert "int8" in text


def test_outliers_that_hardly_vary_cost_nothing(folder):
    # The channel at 20 would take nine tenths of every row's range if it were not shifted away.
    inputs = torch.randn(300, 80, generator=torch.Generator().manual_seed(2))
    inputs[:, 3] += 40
    linear = torch.nn.Linear(80, 80)
    exact = linear(inputs).detach()
    errors = {}
    for name, fit in (("calibrated", Fit(inputs=True, weights=True, relative=False)), ("not", NEAREST)):
        q = rounded_linear("dense", linear, "int8", fit, inputs)
        x = inputs * q.rescale + q.shift
        step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 255
        weight = q.state_dict()["weight"].float() * q.state_dict()["weight_scale"][:, None]
        errors[name] = relative_error((x / step).round() * step @ weight.t() + q.bias, exact)
    assert errors["calibrated"] < errors["not"] / 4


def test_gptq_errs_less_than_nearest():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 64, generator=generator)
    inputs = torch.randn(500, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    scale = weight.abs().amax(1) / 7  # few levels, so that there is something to gain
    exact = inputs @ weight.t()
    fitted = gptq(weight, inputs.t() @ inputs, scale)
    assert torch.equal(fitted, fitted.round())
    nearest = torch.round(weight / scale[:, None])
    fitted_error, nearest_error = (relative_error(inputs @ (q * scale[:, None]).t(), exact) for q in (fitted, nearest))
    assert fitted_error < nearest_error / 1.5


def test_rescaling_evens_out_uneven_channels():
    generator = torch.Generator().manual_seed(3)
    size = torch.logspace(-2, 1, 64)
    weight, inputs = torch.randn(40, 64, generator=generator), torch.randn(500, 64, generator=generator) * size
    r = rescaling(weight, inputs, [slice(0, 64)], torch.ones(64))
    assert r.isfinite().all()
    assert (r > 0).all()
    spread = [t.std(0).max() / t.std(0).median() for t in (inputs, inputs * r)]
    assert spread[1] < spread[0] / 3


def test_rows_are_chosen_evenly_from_all():
    rows, numbers = Rows(most=50), torch.arange(1000.0)[:, None]
    assert rows.gathered() is None
    for part in numbers.split([1, 0, 333, 66, 600]):
        rows.add(part)
    gathered = rows.gathered()[:, 0]
    assert 50 <= len(gathered) <= 100
    assert len(set(gathered.diff().tolist())) == 1


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_int16_sums_always_fit(size):
    weight = torch.randn(9, 300) * size
    weight[0], weight[1, 5], weight[2] = 0.0, 1e4 * size, 3.0 * size
    scale = int16_scale(weight)
    integers = torch.round(weight / torch.where(scale > 0, scale, 1.0)[:, None]).to(torch.int16)
    assert fits_sums(integers)
    assert integers.abs().max() > 1000


@pytest.mark.parametrize(
    ("error", "message", "calibration"),
    [
        (TypeError, "got a bare pair of tensors", batch()),
        (TypeError, "got Tensor", batch()[0]),
        (TypeError, "got str", "abc"),
        (TypeError, "got int", 5),
        (TypeError, "batch 1 is list", [batch(), [1, 2, 3]]),
        (TypeError, "batch 0 is tuple", [([1, 2], [1, 1])]),
        (ValueError, r"batch 0: expected integers \(B, S\).*got \(5,\)", [torch.zeros(5).long()]),
        (ValueError, r"batch 0: expected integers.*float32", [torch.zeros(5, 3)]),
        (ValueError, r"got \(5, 3\) in torch.int64 and \(5, 2\)", [(torch.zeros(5, 3).long(), torch.ones(5, 2))]),
        (ValueError, "a sequence of 65 tokens is longer", [torch.zeros(1, 65).long()]),
        (ValueError, "the batches hold no real token; pass calibration=None", []),
        (
            ValueError,
            "the batches hold no real token; pass calibration=None",
            [(torch.zeros(1, 4).long(), torch.zeros(1, 4))],
        ),
    ],
)
def test_calibration_that_is_no_list_of_batches_is_named(folder, error, message, calibration):
    with pytest.raises(error, match=message):
        ALBERTModel.from_pretrained(folder, precision="int8", calibration=calibration)


def test_calibration_where_nothing_is_rounded_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="calibration is for precision='int8', 'int16' and 'fp8', not for 'fp32'"):
        ALBERTModel.from_pretrained(folder, calibration=[batch()])
    ALBERTModel.from_pretrained(folder, precision="int16").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        ALBERTModel.from_pretrained(tmp_path / "saved", precision="int16", calibration=[batch()])


def test_calibration_takes_what_a_tokenizer_returns(folder):
    ids, mask = batch()
    states = [hidden(ALBERTModel.from_pretrained(folder, precision="int8", calibration=calibration))
              for calibration in ([(ids, mask)], iter([{"input_ids": ids, "attention_mask": mask}]))]  # fmt: skip
    assert torch.equal(*states)


def test_weights_that_are_nan_give_nan(folder):
    broken = ALBERTModel.from_pretrained(folder)
    with torch.no_grad():
        broken.encoder.albert_layer_groups[0].albert_layers[0].ffn.weight[0, 0] = float("nan")
    broken.save_pretrained(folder / "nan")
    out = hidden(ALBERTModel.from_pretrained(folder / "nan", precision="int8"))
    assert out[batch()[1].bool()].isnan().all()


def test_integers_are_for_cpus(folder):
    with pytest.raises(BackendUnavailableError, match=r"precision='int8'.*for CPUs are in C\+\+, not in cuda"):
        ALBERTModel.from_pretrained(folder, precision="int8", backend="cuda")
    with pytest.raises(
        BackendUnavailableError, match=r"precision='int8'.*for CPUs and for GPUs of NVIDIA, not for meta"
    ):
        ALBERTModel.from_pretrained(folder).to("meta").execution.use("auto", "int8")


def test_integers_stay_what_they_are(folder):
    model = ALBERTModel.from_pretrained(folder, precision="int8")
    for precision in ("fp32", "bf16", "int16"):
        with pytest.raises(ValueError, match="the layers hold int8 weights"):
            model.execution.use("auto", precision)
    model.execution.use("auto", "int8")
    with pytest.raises(ValueError, match="hold int8 weights already"):
        quantize(model, "int8")


def test_conversions_do_not_touch_integers(folder):
    model, expected = ALBERTModel.from_pretrained(folder, precision="int8"), None
    expected = {key: value for key, value in model.state_dict().items() if "albert_layer_groups" in key}
    model.bfloat16()
    with pytest.raises(TypeError, match=r"converted to torch\.bfloat16: load it again"):
        hidden(model)
    model.float()
    assert hidden(model).isfinite().all()
    actual = model.state_dict()
    kept = [key for key in expected if torch.equal(actual[key], expected[key])]
    assert {key for key in expected if "norm" not in key.lower()} <= set(kept)


def test_hooks_and_replaced_parts_are_refused(folder):
    model = ALBERTModel.from_pretrained(folder, precision="int8")
    layer = model.encoder.distinct()[1]
    for part in (layer, layer.ffn, layer.attention.LayerNorm):
        hook = part.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="hooks on their parts and replaced parts would not be seen"):
            hidden(model)
        hook.remove()
    layer.attention.LayerNorm = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="replaced parts"):
        hidden(model)


def test_a_gradient_through_integers_is_refused(folder):
    model = ALBERTModel.from_pretrained(folder, precision="int8")
    embeds = torch.randn(2, 3, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match="integer layers have no gradient"):
        model(inputs_embeds=embeds)
    model(inputs_embeds=embeds.detach())
    model.pooler.requires_grad_(True)  # what follows them may learn
    model(*batch()).pooler_output.sum().backward()
    assert model.pooler.weight.grad.abs().sum() > 0
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="integer layers have no gradient"):
        model(*batch())


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_a_state_dict_that_does_not_fit_is_named(folder, precision):
    model = ALBERTModel.from_pretrained(folder, precision=precision)
    other = ALBERTModel.from_pretrained(folder, precision={"int8": "int16", "int16": "int8"}[precision])
    expected, state = hidden(model), model.state_dict()
    key = "encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    scale = f"{key}_scale"
    for changed, message in [
        ({key: state[key][:-1]}, rf"size mismatch for {key}: \(899, 80\)"),
        ({key: state[key][:, :-1]}, rf"size mismatch for {key}: \(900, 79\)"),
        ({scale: state[scale][:-1]}, f"size mismatch for {scale}"),
        ({scale: state[scale].int()}, f"{key}: .* with scales in torch.int32"),
        ({key: state[key].float()}, f"{key}: torch.float32"),
        (other.state_dict(), f"{key}: torch.int"),
        (ALBERTModel.from_pretrained(folder).state_dict(), f"{key}: torch.float32|{scale}"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({**state, **changed}, strict=False)
        model.load_state_dict({key: value for key, value in state.items() if "albert_layers" not in key or "Norm" in key
                               or "norm" in key}, strict=False)  # fmt: skip
        assert torch.equal(hidden(model), expected), "the integers and what belongs to them are as they were"


def test_without_vnni_the_user_is_told(folder, monkeypatch):
    monkeypatch.setattr("albert_fast.runtime.dispatch.quantized_kernels", lambda *_: (False, "without AVX512-VNNI"))
    with pytest.warns(UserWarning, match="precision='int8' runs without AVX512-VNNI"):
        ALBERTModel.from_pretrained(folder, precision="int8")


@pytest.mark.parametrize(
    ("precision", "allowed"), [pytest.param("int16", 5e-3, marks=pytest.mark.thorough), ("int8", 0.05)]
)
def test_real_error(precision, allowed):
    """The real encoder on its own sequences, calibrated on others; int16 must hold a third of bfloat16's error."""
    data = require_data("plbert")
    symbols = json.loads((data / "vocab.json").read_text())["vocab"]
    lines = (data / "phonemes.txt").read_text().splitlines()
    rows = [torch.tensor([[0, *(symbols[c] for c in line), 0]])[:, :200] for line in lines[:8] + lines[1000:1003]]
    exact = ALBERTModel.from_pretrained(data)
    model = ALBERTModel.from_pretrained(data, precision=precision, calibration=rows[:8])
    with torch.no_grad():
        a, b = (torch.cat([m(ids).last_hidden_state[0] for ids in rows[8:]]) for m in (model, exact))
    assert relative_error(a, b) < allowed


def test_config_says_nothing_of_integers_for_floats(folder):
    model = ALBERTModel.from_pretrained(folder)
    model.config = dataclasses.replace(model.config, extra={"quantization_config": {"quant_method": "other"}})
    model.save_pretrained(folder / "again")
    assert "quantization_config" not in json.loads((folder / "again/config.json").read_text())
