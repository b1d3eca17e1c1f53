"""Models in int8 and float8 as a GPU runs them: what is refused, its arithmetic on a CPU, layouts that follow the device."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import albert_fast
from albert_fast import ALBERTConfig, ALBERTModel
from albert_fast.layers.quantized import QuantizedLinear
from albert_fast.models import reference
from albert_fast.runtime import dispatch
from albert_fast.runtime.dispatch import BackendUnavailableError

CONFIG = ALBERTConfig(
    vocab_size=101, embedding_size=24, hidden_size=48, num_hidden_layers=3, num_hidden_groups=1, num_attention_heads=3,
    intermediate_size=300, max_position_embeddings=64, initializer_range=0.08,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(7)
    model = reference.ALBERTModel(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    return tmp_path


def batch(rows=4, columns=19):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(CONFIG.vocab_size, (rows, columns), generator=generator)
    return ids, (torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=generator)).long()


def hidden(model):
    with torch.no_grad():
        return model(*batch()).last_hidden_state


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_what_a_device_cannot_multiply_is_refused_with_an_alternative(folder, monkeypatch):
    with pytest.raises(BackendUnavailableError, match=r"precision='fp8'.*no CPU multiplies float8.*take 'int8'"):
        ALBERTModel.from_pretrained(folder, precision="fp8")
    gpu = torch.device("cuda")
    with pytest.raises(BackendUnavailableError, match=r"precision='int16'.*no GPU multiplies integers of 16 bits"):
        dispatch.check_quantized("int16", gpu, "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    dispatch.check_quantized("int8", gpu, "auto")
    with pytest.raises(BackendUnavailableError, match=r"compute capability 8\.9, this GPU has 8\.0; take 'int8'"):
        dispatch.check_quantized("fp8", gpu, "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dispatch.check_quantized("fp8", gpu, "auto")
    assert dispatch.quantized_dtype("int8", "cuda") == torch.bfloat16


@pytest.mark.filterwarnings("ignore:albert_fast")
@pytest.mark.parametrize("calibrated", [False, True])
def test_float8_as_a_gpu_computes_it(folder, tmp_path, calibrated):
    expected = hidden(ALBERTModel.from_pretrained(folder))
    calibration = [batch(8, 40)] if calibrated else None
    options = {"precision": "fp8", "backend": "reference"}
    with pytest.warns(UserWarning, match="precision='fp8' runs emulated"):
        model = ALBERTModel.from_pretrained(folder, calibration=calibration, **options)
    out = hidden(model)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), expected) < 0.15
    assert "fp8 layers on cpu" in str(albert_fast.explain(model, *batch()))
    model.save_pretrained(tmp_path / "saved")
    key = "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"
    assert load_file(tmp_path / "saved/model.safetensors")[key].dtype == torch.float8_e4m3fn
    assert torch.equal(hidden(ALBERTModel.from_pretrained(tmp_path / "saved", **options)), out)
    with pytest.raises(ValueError, match="holds fp8 weights: load it with precision='fp8'"):
        ALBERTModel.from_pretrained(tmp_path / "saved", precision="int8")


@pytest.mark.filterwarnings("ignore:albert_fast")
def test_the_triton_kernels_run_a_model(folder):
    pytest.importorskip("triton")
    if reason := dispatch.why_not("quantized_encoder", "cpu", "triton"):
        pytest.skip(reason)
    ids, mask = batch(3, 7)
    models = [ALBERTModel.from_pretrained(folder, precision="fp8", backend=name) for name in ("triton", "reference")]
    with torch.no_grad():
        for options in ({}, {"wanted_tokens": "first"}, {"output_hidden_states": True}):
            outputs = [model(ids, mask, **options) for model in models]
            actual, expected = (output.pooler_output.float() for output in outputs)
            assert relative_error(actual, expected) < 0.05
            if options != {"wanted_tokens": "first"}:
                actual, expected = (output.last_hidden_state.float() for output in outputs)
                assert relative_error(actual, expected) < 0.05


@pytest.mark.filterwarnings("ignore:albert_fast")
def test_int8_as_a_gpu_computes_it(folder):
    """The same checkpoint: whole rows, attention and everything between in bfloat16."""
    expected = hidden(ALBERTModel.from_pretrained(folder))
    model = ALBERTModel.from_pretrained(folder, precision="int8", backend="reference")
    on_cpu = hidden(model)
    on_gpu = hidden(model.bfloat16())
    assert on_gpu.dtype == torch.bfloat16
    assert relative_error(on_gpu.float(), expected) < 0.06
    assert not torch.equal(on_gpu.float(), on_cpu)


def test_the_layout_follows_the_device(folder, monkeypatch):
    model = ALBERTModel.from_pretrained(folder, precision="int8")
    linears = [linear for layer in model.encoder.distinct() for linear in layer.products()]
    state, before = model.state_dict(), [linear.tensors() for linear in linears]
    with monkeypatch.context() as patch:  # as if this were a GPU
        patch.setattr(QuantizedLinear, "_wants_panels", lambda self: False)
        model.bfloat16()
        shapes = {tuple(linear.integers.shape) for linear in linears}
        assert shapes == {(144, 128), (48, 128), (300, 128), (48, 384)}
        moved = model.state_dict()
        for key in (key for key in state if "albert_layers" in key and "orm" not in key):
            assert torch.equal(moved[key], state[key]), key
        model.load_state_dict(state)
    model.float()
    for linear, tensors in zip(linears, before, strict=True):
        assert all(map(torch.equal, linear.tensors(), tensors))
