"""torch.library's own checks of every operator, on every backend that runs here, and the table of dispatch."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from albert_fast import ALBERTConfig, ALBERTModel, ops
from albert_fast.layers import packing
from albert_fast.runtime import dispatch
from albert_fast.runtime import linear as gemm
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import make_inputs

__all__ = ["gemm", "packing"]  # imported for the operators that they register


def fwd_arguments(name, backend, **options):
    """Positional arguments of `albert_fast::<name>_fwd` for a small case."""
    case = ALL_CASES[name]
    shape = case.small_shapes[1] if len(case.small_shapes) > 1 else case.small_shapes[0]
    dtypes = (torch.float32, torch.bfloat16)
    dtype = next(dtype for dtype in dtypes if dispatch.why_not(name, "cpu", backend, dtype) is None)
    inputs = make_inputs(case, shape, options, dtype)
    for key in case.gradients:
        if isinstance(inputs.get(key), torch.Tensor):
            inputs[key] = inputs[key].detach().clone().requires_grad_()
    schema = getattr(torch.ops.albert_fast, f"{name}_fwd").default._schema
    bounds = dict.fromkeys(("max_seqlen", "max_wanted"), len(inputs.get("hidden", ())))
    values = {**bounds, **inputs, "backend": backend}
    return tuple(values.get(argument.name) for argument in schema.arguments)


@pytest.mark.parametrize(
    ("name", "backend"), [(op, backend) for op in ALL_CASES for backend in dispatch.runnable_on(op, "cpu")]
)
def test_opcheck(name, backend):
    operator = getattr(torch.ops.albert_fast, f"{name}_fwd").default
    torch.library.opcheck(operator, fwd_arguments(name, backend))
    if "dropout_p" in make_inputs(ALL_CASES[name], ALL_CASES[name].small_shapes[0], {}, torch.float32):
        torch.library.opcheck(operator, fwd_arguments(name, backend, dropout_p=0.3))


class Recorder(TorchDispatchMode):
    """Remembers the arguments of the last call to one operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.arguments = operator, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operator:
            self.arguments = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "backend"),
    [(op, backend) for op, case in ALL_CASES.items() if case.gradients for backend in dispatch.runnable_on(op, "cpu")],
)
def test_opcheck_of_the_gradient(name, backend):
    with_dropout = "dropout_p" in make_inputs(ALL_CASES[name], ALL_CASES[name].small_shapes[0], {}, torch.float32)
    operator = getattr(torch.ops.albert_fast, f"{name}_bwd").default
    for options in ({}, {"dropout_p": 0.3}) if with_dropout else ({},):
        with Recorder(operator) as recorder:
            outputs = getattr(torch.ops.albert_fast, f"{name}_fwd")(*fwd_arguments(name, backend, **options))
            out = outputs[0] if isinstance(outputs, tuple) else outputs
            out.backward(torch.randn_like(out))
        assert recorder.arguments is not None, f"the gradient of {name} does not go through {operator}"
        arguments = [
            x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
            for x in recorder.arguments
        ]
        torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
        first = operator(*arguments)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            (first[0] if isinstance(first, tuple) else first).sum().backward()


def test_opcheck_of_products_and_packing():
    x, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    arguments = tuple(t.requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(torch.ops.albert_fast.linear.default, arguments)
    grad = torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.albert_fast.linear_weight_gradient.default, (grad, arguments[0]))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])
    torch.library.opcheck(torch.ops.albert_fast.pack_indices.default, (mask,))
    _, cu_seqlens = torch.ops.albert_fast.pack_indices(mask)
    flags = torch.tensor([True, False, True, True])
    torch.library.opcheck(torch.ops.albert_fast.select_rows.default, (flags, cu_seqlens))


def test_every_operator_has_a_table_row_and_a_case():
    assert set(dispatch.TABLE) == set(ALL_CASES)
    for name in dispatch.TABLE:
        assert dispatch.TABLE[name]["cpu"][-1] == dispatch.TABLE[name]["cuda"][-1] == "reference"
        assert callable(getattr(ops, name))
        assert callable(getattr(ops, f"{name}_ref"))


def test_a_fall_back_is_said_once_with_the_way_out(monkeypatch):
    reason = "the C++ extension is not built: install a C++17 compiler, then `pip install -e .` again"
    monkeypatch.setattr(dispatch, "_why_not", lambda op, device, backend: None if backend == "reference" else reason)
    dispatch.resolve.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"bias_gelu runs on backend 'reference'.*C\+\+17 compiler.*albert_fast.info"
        ):
            assert dispatch.resolve("bias_gelu", "cpu", torch.float32) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch.resolve("bias_gelu", "cpu", torch.float32)
        with pytest.raises(dispatch.BackendUnavailableError, match=r"backend='cpp' cannot run here.*backend='auto'"):
            dispatch.resolve("bias_gelu", "cpu", torch.float32, "cpp")
    finally:
        dispatch.resolve.cache_clear()


@pytest.mark.skipif(not dispatch.has_extension(), reason="needs the C++ extension")
@pytest.mark.parametrize("change", [{"slice": 769}, {"weights": tuple(ops.WEIGHTS)[::-1]}, {"unknown": 1}])
def test_an_extension_that_was_built_from_other_sources_is_refused(monkeypatch, change):
    monkeypatch.setattr(dispatch, "_EXPECTED", {**dispatch._EXPECTED, **change})
    caches = (dispatch._load_extension, dispatch._why_not, dispatch.resolve)
    try:
        for cached in caches:
            cached.cache_clear()
        (name,) = change
        with pytest.raises(dispatch.BackendUnavailableError, match=rf"differ in: {name}\): build it again with `pip"):
            ops.bias_gelu(torch.randn(3, 8), torch.randn(8))
        assert not dispatch.has_extension()
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()
    assert dispatch.has_extension()


def test_a_seed_lies_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert ops.draw_seed().device.type == "cpu"


def test_no_seed_is_drawn_while_a_graph_is_captured(monkeypatch):
    config = ALBERTConfig(
        vocab_size=7, embedding_size=4, hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = ALBERTModel(config).train()
    ids = torch.zeros((1, 2), dtype=torch.long)
    monkeypatch.setattr(ops._dropout, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"repeat one mask at every replay: capture with model.eval\(\)"):
        model(ids)
    model.eval()(ids)  # draws none
    with pytest.raises(RuntimeError, match="repeat one mask"):  # a seed from before the capture would be repeated too
        ops.bias_gelu(torch.randn(3, 8), torch.randn(8), dropout_p=0.5, seed=torch.tensor(7))


def test_why_not_names_device_and_dtype():
    assert dispatch.why_not("attention", "cpu", "cpp", torch.float16) is not None
    assert "float16" in str(dispatch.why_not("attention", "cpu", "cpp", torch.float16))
    assert dispatch.why_not("attention", "cpu", "cpp", torch.float32) is None
    assert "no cuda kernel" in str(dispatch.why_not("attention", "cuda", "cuda"))
    with pytest.raises(dispatch.BackendUnavailableError, match="unknown backend 'fast'"):
        dispatch.resolve("attention", "cpu", torch.float32, "fast")


@pytest.mark.skipif(not gemm._HAS_ONEDNN, reason="this torch has no oneDNN")
def test_a_product_by_onednn_costs_no_other_and_leaves_autocast_to_torch():
    x, weight = torch.randn(64, 512), torch.randn(256, 512, requires_grad=True)  # large enough for it
    with torch.profiler.profile() as profile:
        gemm.linear(x, weight).sum().backward()
    assert {e.key: e.count for e in profile.key_averages()}["mkldnn::_linear_pointwise"] == 2, "none for x"
    with torch.autocast("cpu", torch.bfloat16):
        assert gemm.linear(x, weight).dtype == torch.bfloat16
