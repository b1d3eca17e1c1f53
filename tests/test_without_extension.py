"""A CPU without the C++ extension: torch's own operators give the reference's numbers, and one warning says what is missing.

Also what the variable that chooses the extension's instruction set may be.
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel, ops
from albert_fast.ops import _torch
from albert_fast.runtime import dispatch
from albert_fast.testing.parity import check_backward, check_forward, parity_grid

REASON = "the C++ extension is not built: install a C++17 compiler, then `pip install -e .` (or `pip install .`) again"
CACHES = (dispatch.resolve, dispatch._why_not, dispatch._say_no_extension)
ON_TORCH = (
    "embedding_layer_norm",
    "embedding_projection",
    "attention",
    "bias_gelu",
    "linear_gelu",
    "add_layer_norm",
    "gelu_layer_norm",
)
CONFIG = ALBERTConfig(
    vocab_size=61, embedding_size=12, hidden_size=40, num_attention_heads=4, intermediate_size=56, num_hidden_layers=3
)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "_load_extension", lambda: (None, REASON))
    for cached in CACHES:
        cached.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said
    for cached in CACHES:
        cached.cache_clear()


@pytest.mark.parametrize("op", ON_TORCH)
def test_operators_on_torch_give_the_reference_s_numbers(op, no_extension, monkeypatch):
    ran = []
    original = getattr(_torch, op)
    monkeypatch.setattr(_torch, op, lambda *arguments: ran.append(op) or original(*arguments))
    rows = [row for row in parity_grid(op, "reference") if row[4] == torch.float32]
    for _, *case, dtype, _ in rows[::3]:
        if not case[2].get("dropout_p"):
            check_forward(*case, dtype, "auto")
            check_backward(*case, dtype, "auto")
    assert ran, "torch's operators did not run"


def batch():
    ids, mask = torch.randint(0, 61, (5, 23)), torch.ones(5, 23, dtype=torch.long)
    mask[0, 7:] = 0
    mask[1, ::3] = 0
    mask[2] = 0
    return ids, mask


@pytest.mark.parametrize("kind", [ALBERTModel, ALBERTForMaskedLM, ALBERTForSequenceClassification])
def test_models_give_the_reference_s_numbers_and_say_so_once(kind, no_extension):
    model, (ids, mask) = kind(CONFIG).eval(), batch()
    outputs, gradients = {}, {}
    for backend in ("auto", "reference"):
        model.execution.backend = backend
        with torch.no_grad():
            outputs[backend] = model(ids, mask)[0]
        model.zero_grad()
        model(ids, mask)[0].square().sum().backward()
        gradients[backend] = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(outputs["auto"], outputs["reference"], atol=2e-5, rtol=1e-5)
    for name, gradient in gradients["auto"].items():
        torch.testing.assert_close(gradient, gradients["reference"][name], atol=2e-4, rtol=1e-4)
    said = [str(w.message) for w in no_extension if "albert_fast" in str(w.message)]
    assert len(said) == 1, said
    assert "C++17 compiler" in said[0]
    assert "albert_fast.info" in said[0]


def test_attention_of_unequal_sequences(no_extension):
    lengths = [3, 3, 0, 5, 1, 1, 1, 9, 0]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = torch.randn(3, sum(lengths), 24).unbind(0)
    expected = ops.attention_ref(q, k, v, cu, cu, 3, 0.3)
    torch.testing.assert_close(ops.attention(q, k, v, cu, cu, 9, 9, 3, 0.3), expected)
    none = torch.zeros(3, dtype=torch.int32)  # queries without keys
    cu_q = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(ops.attention(q[:5], k[:0], v[:0], cu_q, none, 3, 0, 3), torch.zeros(5, 24))
    assert ops.attention(q[:0], k[:0], v[:0], none, none, 0, 0, 3).shape == (0, 24)


def test_attention_of_decoders(no_extension):
    cu_q, cu_k = torch.tensor([[0, 3, 6, 6, 11, 12], [0, 5, 10, 12, 14, 14]], dtype=torch.int32)
    q, k, v = torch.randn(12, 24).requires_grad_(), *torch.randn(2, 14, 24).requires_grad_()
    expected = ops.attention_ref(q, k, v, cu_q, cu_k, 3, 0.3, causal=True)
    outs = ops.attention(q, k, v, cu_q, cu_k, 5, 5, 3, 0.3, causal=True), expected
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), q)[0] for out in outs))
    begins, lengths = torch.tensor([[9, 2, 0, 2, 0], [5, 5, 2, 5, 0]], dtype=torch.int32)
    with torch.no_grad():
        found = ops.attention(q, k, v, cu_q, begins, 5, 5, 3, 0.3, key_lengths=lengths)
        torch.testing.assert_close(found, ops.attention_ref(q, k, v, cu_q, begins, 3, 0.3, key_lengths=lengths))
    with pytest.raises(ValueError, match="key_lengths has no gradient"):
        ops.attention(q, k, v, cu_q, begins, 5, 5, 3, 0.3, key_lengths=lengths)


def test_a_bad_id_is_named(no_extension):
    with pytest.raises(ops.TokenIndexError, match="61"):
        ALBERTModel(CONFIG).eval()(torch.tensor([[3, 61]]))


def resolve_with_isa(value):
    code = "import torch; from albert_fast.runtime import dispatch; print(dispatch.resolve('encoder', 'cpu', torch.float32)); "
    code += "print(dispatch.extension().build_info()['isa'])"
    environment = os.environ | {"ALBERT_FAST_ISA": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not dispatch.has_extension(), reason="needs the C++ extension")
def test_the_instruction_set_may_be_named_in_any_case():
    name = dispatch.extension().build_info()["isa"]
    assert resolve_with_isa(name.upper()).stdout.split() == ["cpp", name]


@pytest.mark.skipif(not dispatch.has_extension(), reason="needs the C++ extension")
@pytest.mark.parametrize("value", ["avx3", "AVX-2"])
def test_an_unknown_instruction_set_is_an_error_that_names_those_known(value):
    done = resolve_with_isa(value)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert f"BackendUnavailableError: ALBERT_FAST_ISA={value}: no such instruction set is known" in error
    assert "portable" in error
    assert "pip install" not in error
