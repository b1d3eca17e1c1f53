"""Tracers other than torch.compile: torch.jit.trace and make_fx give the same numbers, torch.onnx.export is refused."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import albert_fast
from albert_fast import ALBERTConfig, ops
from albert_fast.models import reference

CONFIG = ALBERTConfig(
    vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=32, initializer_range=0.2,
)  # fmt: skip
MODELS = {
    "ALBERTModel": lambda model, ids, mask: model(ids, mask).last_hidden_state,
    "pooled": lambda model, ids, mask: model(ids, mask, wanted_tokens="first").pooler_output,
    "no mask": lambda model, ids, mask: model(ids).last_hidden_state,
    "states": lambda model, ids, mask: model(ids, mask, output_hidden_states=True).hidden_states[1],
    "ALBERTForMaskedLM": lambda model, ids, mask: model(ids, mask).logits,
    "ALBERTForSequenceClassification": lambda model, ids, mask: model(ids, mask).logits,
    "ALBERTForQuestionAnswering": lambda model, ids, mask: model(ids, mask).start_logits,
}


class Call(torch.nn.Module):
    """A model and what is taken of its output, as one module of (ids, mask)."""

    def __init__(self, name, package=albert_fast):
        super().__init__()
        self.model = getattr(package, name if name.startswith("ALBERT") else "ALBERTModel")(CONFIG).eval()
        self.take = MODELS[name]

    def forward(self, ids, mask):
        return self.take(self.model, ids, mask)


def batch(rows, columns, full=False):
    mask = torch.arange(columns)[None] < torch.randint(1, columns + 1, (rows, 1))
    return torch.randint(5, 50, (rows, columns)), torch.ones_like(mask).long() if full else mask.long()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_answers_any_batch(name, gradient):
    """Traced with a full mask: neither the mask, nor the shape, nor the memory of that call may be frozen in."""
    call = Call(name)
    with torch.set_grad_enabled(gradient):
        traced = torch.jit.trace(call, batch(2, 8, full=True), check_trace=False)
    with torch.no_grad():
        for rows, columns in ((2, 8), (2, 8), (3, 5), (1, 20), (1, 1)):
            ids, mask = batch(rows, columns)
            torch.testing.assert_close(traced(ids, mask), call(ids, mask), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["ALBERTModel", "pooled", "ALBERTForMaskedLM"])
def test_make_fx_records_the_operators(name):
    call = Call(name)
    with torch.no_grad():
        graph = make_fx(call)(*batch(2, 8, full=True))
        for _ in range(2):
            ids, mask = batch(2, 8)
            torch.testing.assert_close(graph(ids, mask), call(ids, mask), atol=2e-6, rtol=1e-5)
    assert any(str(node.target).startswith("albert_fast.") for node in graph.graph.nodes)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_traced_operator_is_recorded():
    x, bias = torch.randn(5, 8), torch.randn(8)
    traced = torch.jit.trace(lambda x: ops.bias_gelu(x, bias, "gelu_tanh"), (x,), check_trace=False)
    other = torch.randn(7, 8)
    torch.testing.assert_close(traced(other), ops.bias_gelu(other, bias, "gelu_tanh"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ALBERTModel", "ALBERTForSequenceClassification"])
def test_onnx_export_by_tracing_is_refused(name, tmp_path):
    call = Call(name).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no ONNX form: call save_pretrained and export transformers"):
        torch.onnx.export(call, batch(2, 8), tmp_path / "model.onnx", dynamo=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ALBERTModel", "ALBERTForSequenceClassification"])
def test_onnx_export_of_the_reference_works_as_the_error_says(name, tmp_path):
    pytest.importorskip("onnx")
    torch.onnx.export(Call(name, reference).requires_grad_(False), batch(2, 8), tmp_path / "model.onnx", dynamo=False)
    assert (tmp_path / "model.onnx").stat().st_size
