"""linear_gelu on every backend against plain torch: strides, empty sums, the tiles of a GPU, and what runs without tuning."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from albert_fast import ALBERTConfig, ALBERTModel, explain, ops
from albert_fast.inspect import explain as plan
from albert_fast.layers import layer as layer_module
from albert_fast.runtime.linear import linear, weight_gradient
from albert_fast.testing import ALL_CASES, poison_empty
from albert_fast.testing.parity import check_backward, check_forward, device_of, every_pair, make_inputs, parity_tests
from albert_fast.testing.tolerances import assert_close_calibrated

OP = "linear_gelu"
CASE = ALL_CASES[OP]
FORWARD, BACKWARD = parity_tests(OP)
ACTS = ("gelu_tanh", "gelu_erf", "relu")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
ON_GPU = torch.cuda.is_available()


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 70), st.integers(3, 90))
def test_any_shape(rows, width, middle):
    # At least three columns: of fewer, torch may by chance round all sums of the bias's gradient well.
    for check in (check_forward, check_backward):
        check(CASE, (rows, width, middle), {}, torch.float32, "cpp")


def tensors(shape, dtype=torch.float32, backend="reference"):
    """x, weight and bias, where `backend` runs."""
    inputs = make_inputs(CASE, shape, {}, dtype, backend)
    return inputs["x"], inputs["weight"], inputs["bias"]


def gradients(function, x, weight, bias):
    """The output, and the gradients of x, weight and bias for a cotangent of its own numbers."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, out.detach())


@pytest.mark.parametrize("act", ACTS)
def test_the_reference_has_the_derivative_that_differences_give(act):
    leaves = [t.double().requires_grad_() for t in tensors((5, 4, 7))]
    assert torch.autograd.gradcheck(partial(ops.linear_gelu, act=act, backend="reference"), leaves)


@BACKENDS
def test_strided_rows(backend):
    x, weight, bias = tensors((37, 24, 48), backend=backend)
    run = partial(ops.linear_gelu, backend=backend)
    expected = gradients(run, x, weight, bias)
    for first in (8, 3):  # at a whole word of 16 bytes, and between two
        wide = torch.randn(37, 72, device=x.device)
        wide[:, first : first + 24] = x
        leaves = [wide.requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = run(leaves[0][:, first : first + 24], *leaves[1:])
        found = torch.autograd.grad(out, leaves, out.detach())
        for actual, same in zip((out, found[0][:, first : first + 24], *found[1:]), expected, strict=True):
            torch.testing.assert_close(actual, same)


@BACKENDS
def test_strided_weights(backend):
    x, weight, bias = tensors((37, 24, 48), backend=backend)
    expected = ops.linear_gelu(x, weight, bias, backend=backend)
    wide = torch.stack([weight, weight], dim=1).flatten(1)[:, :24]  # rows 48 elements apart
    for strided in (wide, weight.t().contiguous().t()):
        actual = ops.linear_gelu(x, strided, torch.stack([bias, -bias], dim=1)[:, 0], backend=backend)
        torch.testing.assert_close(actual, expected)


@BACKENDS
@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_a_gradient_alone_is_that_of_all_and_costs_no_other_product(backend, needed, monkeypatch):
    x, weight, bias = tensors((37, 24, 48), backend=backend)
    run = partial(ops.linear_gelu, backend=backend)
    names = ("x", "weight", "bias")
    expected = dict(zip(names, gradients(run, x, weight, bias)[1:], strict=True))[needed]
    leaves = {"x": x, "weight": weight, "bias": bias}
    leaves[needed] = leaves[needed].clone().requires_grad_()
    out = run(*leaves.values())
    products = []

    def counted(product, *arguments):
        products.append(arguments)
        return product(*arguments)

    for product in (linear, weight_gradient):
        monkeypatch.setattr(sys.modules[ops.linear_gelu.__module__], product.__name__, partial(counted, product))
    torch.testing.assert_close(torch.autograd.grad(out, leaves[needed], out.detach())[0], expected)
    assert len(products) == (needed != "bias" and backend != "reference")


@BACKENDS
def test_empty_batches_and_empty_sums(backend):
    device = device_of(backend)
    with poison_empty():
        weight, bias = torch.randn(16, 8, device=device), torch.randn(16, device=device)
        out, *found = gradients(
            partial(ops.linear_gelu, backend=backend), torch.zeros(0, 8, device=device), weight, bias
        )
        assert out.shape == (0, 16)
        assert all((gradient == 0).all() for gradient in found)
        nothing = ops.linear_gelu(torch.zeros(3, 0, device=device), weight[:, :0], bias, backend=backend)
    torch.testing.assert_close(nothing, F.gelu(bias, approximate="tanh").expand(3, 16))


@BACKENDS
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_row(backend, act, dtype):
    x, weight, bias = tensors((70, 16, 48), dtype, backend)
    expected = ops.linear_gelu(x, weight, bias, act, backend=backend)
    x[5, 2], x[66, 0] = float("nan"), float("inf")
    out = ops.linear_gelu(x, weight.abs(), bias, act, backend=backend)
    assert out[5].isnan().all()
    # torch's own erf form answers NaN or inf for inf, by the width of its vectors.
    assert (out[66] == float("inf")).all() or (backend == "reference" and not out[66].isfinite().any())
    others = torch.ones(70, dtype=torch.bool, device=out.device)
    others[[5, 66]] = False
    assert out[others].isfinite().all()
    assert expected.isfinite().all()


def test_bad_input_is_named():
    x, weight, bias = tensors((3, 4, 5))
    with pytest.raises(ValueError, match=r"expected bias of shape \(5,\) .* got \(4,\)"):
        ops.linear_gelu(x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"expected weight of shape \(5, 3\)"):
        ops.linear_gelu(x[:, :3], weight, bias)
    with pytest.raises(ValueError, match="swish"):
        ops.linear_gelu(x, weight, bias, "swish")
    with pytest.raises(ValueError, match="one device"):
        ops.linear_gelu(x, weight.to("meta"), bias)


# the kernel and the libraries --------------------------------------------------------------------------------------


@pytest.fixture
def kernel():
    pytest.importorskip("triton")
    from albert_fast.kernels import linear_gelu

    return linear_gelu


# More rows of tiles than a group has, the last one short; parts of tiles at every edge; K of whole tiles and of parts.
@every_pair(
    shape=[(300, 64, 48), (70, 44, 144)],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    act=["gelu_tanh", "gelu_erf"],
    keep_sums=[False, True],
)
def test_every_candidate_of_the_tuner_computes_the_same(kernel, shape, dtype, act, keep_sums):
    x, weight, bias = tensors(shape, dtype, "triton")
    exact = CASE.exact({"x": x, "weight": weight, "bias": bias, "act": act})
    same = CASE.eager(x, weight, bias, act)
    exact_sums = F.linear(x.double(), weight.double(), bias.double())
    routes = kernel.linear_gelu_routes(*shape[::2], dtype, act, keep_sums)
    assert len(routes) >= 4
    for route in routes:
        if route == kernel.CUBLASLT_EPILOGUE and not ON_GPU:
            continue  # there torch has the erf form
        with poison_empty():
            out, sums = kernel.start_route(x, weight, bias, act, keep_sums, route)
        assert_close_calibrated(out, same, exact, f"{route}")
        assert (sums is not None) == keep_sums
        if sums is not None:
            assert_close_calibrated(sums, F.linear(x, weight, bias), exact_sums, f"sums of {route}")


class Launches(TorchDispatchMode):
    """Notes the operators that torch is asked for, views and uninitialised memory aside, and our kernels."""

    def __init__(self, monkeypatch, *modules):
        super().__init__()
        self.names = []
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self._noted(name, getattr(module, name)))

    def _noted(self, name, kernel):
        def start(grid, *arguments, **options):
            self.names.append(name)
            with _disable_current_modes():  # the interpreter asks torch for more
                kernel[grid](*arguments, **options)

        return _ByGrid(start)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and not function.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class _ByGrid:
    def __init__(self, start):
        self._start = start

    def __getitem__(self, grid):
        return partial(self._start, grid)


@pytest.mark.parametrize("act", ACTS)
def test_a_product_of_the_library_and_its_activation_are_two_launches(kernel, monkeypatch, act):
    from albert_fast.kernels import _common, bias_gelu

    x, weight, bias = tensors((48, 24, 48), torch.bfloat16, "triton")  # rows that products on a CPU do not pad
    launches = Launches(monkeypatch, _common, bias_gelu)
    with launches:
        out, sums = kernel.start_route(x, weight, bias, act, True, kernel.CUBLASLT_THEN_BIAS_GELU)
    assert launches.names == ["addmm", "_bias_gelu_fwd_kernel"]
    launches.names.clear()
    with launches:
        sys.modules[ops.linear_gelu.__module__]._bwd(out, x, weight, sums, act, "triton", True, True)
    assert launches.names == ["_bias_gelu_bwd_kernel", "_column_sums_kernel", "mm", "mm"]


def test_what_runs_without_tuning(kernel):
    first = lambda *case: kernel.linear_gelu_routes(32768, 3072, *case)[0]  # noqa: E731
    for dtype in (torch.bfloat16, torch.float16):
        assert first(dtype, "gelu_tanh", False) == kernel.CUBLASLT_EPILOGUE
        assert first(dtype, "gelu_erf", False)["BLOCK_M"] == 128
        assert first(dtype, "gelu_tanh", True) == kernel.CUBLASLT_THEN_BIAS_GELU
    for keep_sums in (False, True):
        for act in ACTS:
            assert first(torch.float32, act, keep_sums) == kernel.CUBLASLT_THEN_BIAS_GELU
            as_tf32 = first(torch.float32, act, keep_sums, True)
            assert (as_tf32 == kernel.CUBLASLT_THEN_BIAS_GELU) == keep_sums
    assert kernel.linear_gelu_routes(7, 517, torch.bfloat16, "gelu_erf", False) == [kernel.CUBLASLT_THEN_BIAS_GELU]
    assert kernel.linear_gelu_routes(7, 520, torch.bfloat16, "gelu_erf", False) == [kernel.CUBLASLT_THEN_BIAS_GELU]


def test_fewer_rows_take_smaller_tiles(kernel):
    guesses = [kernel.linear_gelu_routes(n, 3072, torch.bfloat16, "gelu_erf", False)[0] for n in (1, 128, 512, 32768)]
    sizes = [tile["BLOCK_M"] * tile["BLOCK_N"] for tile in guesses]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_the_tuner_takes_the_fastest_route_and_keeps_it(kernel, tmp_path):
    from albert_fast.kernels._tuning import Tuner

    routes = kernel.linear_gelu_routes(32768, 3072, torch.bfloat16, "gelu_tanh", False)
    started = []
    for fastest in (kernel.CUBLASLT_THEN_BIAS_GELU, routes[-1]):
        path = tmp_path / f"{len(started)}.json"
        for _ in range(2):  # the second reads the file
            tuner = Tuner(path, "H100", lambda call, fastest=fastest: (call(), started[-1] != fastest)[1])
            assert tuner.choose("key", routes, started.append) == fastest
    assert started == [*routes, *routes]


def test_the_tuner_is_asked_on_a_gpu(kernel, monkeypatch):
    x, weight, bias = tensors((70, 16, 48), torch.bfloat16, "triton")
    asked = []

    def choose(name, key, candidates, launch):
        asked.append((name, key(), len(candidates)))
        return candidates[-1]

    monkeypatch.setattr(kernel._tuning, "choose", choose)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    out, _ = kernel.linear_gelu_fwd(x, weight, bias, "gelu_tanh", False)
    kernel.linear_gelu_fwd(x, weight, bias, "gelu_tanh", True)
    assert asked == [
        ("linear_gelu_fwd", "gelu_tanh bfloat16 T128 K16 N48", 6),
        ("linear_gelu_fwd", "gelu_tanh bfloat16 T128 K16 N48 sums", 5),
    ]
    torch.testing.assert_close(out, CASE.eager(x, weight, bias, "gelu_tanh"), rtol=2**-6, atol=2**-6)


# in torch, and in the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BACKENDS
def test_autocast_casts_as_linear_does(backend, dtype):
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("C++ kernels have no float16")
    x, weight, bias = tensors((13, 24, 48), backend=backend)
    device = x.device.type
    cast = [t.to(dtype) for t in (x, weight, bias)]
    expected = gradients(partial(ops.linear_gelu, backend=backend), *cast)
    with torch.autocast(device, dtype):
        found = gradients(partial(ops.linear_gelu, backend=backend), x, weight, bias)
        assert ops.linear_gelu(x, weight, bias, backend=backend).dtype == F.linear(x, weight, bias).dtype == dtype
        assert ops.linear_gelu(x.double(), weight, bias, backend="reference").dtype == torch.float64
    assert [t.dtype for t in found] == [dtype, *[torch.float32] * 3]
    for actual, same in zip(found, expected, strict=True):
        assert torch.equal(actual, same.to(actual.dtype))


def test_for_inference_nothing_is_kept_and_a_gradient_says_so():
    x, weight, bias = tensors((3, 4, 5))
    torch.library.opcheck(torch.ops.albert_fast.linear_gelu_inference.default, (x, weight, bias, "relu", "cpp"))
    out = torch.ops.albert_fast.linear_gelu_inference(x.requires_grad_(), weight, bias, "relu", "cpp")
    with pytest.raises(NotImplementedError, match="what a gradient needs"):
        out.sum().backward()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_it_compiles_in_one_graph(with_gradient):
    x, weight, bias = (t.requires_grad_(with_gradient) for t in tensors((13, 24, 48)))
    run = partial(ops.linear_gelu, backend="cpp")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), run(x, weight, bias))
    if with_gradient:
        for actual, same in zip(gradients(compiled, x, weight, bias), gradients(run, x, weight, bias), strict=True):
            torch.testing.assert_close(actual, same)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, weight, bias), run(x, weight, bias))


@pytest.fixture
def model(monkeypatch):
    """A model that takes the operator as on a GPU."""
    monkeypatch.setattr(layer_module, "fuses_ffn", lambda device_type: True)
    monkeypatch.setattr(plan, "fuses_ffn", lambda device_type: True)
    config = ALBERTConfig(vocab_size=61, embedding_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                          intermediate_size=48, max_position_embeddings=16)  # fmt: skip
    return ALBERTModel(config).eval()


def test_the_model_computes_the_same_through_it(model, monkeypatch):
    ids = torch.randint(0, 61, (3, 7))

    def results():
        out = model(ids).last_hidden_state
        return out, *torch.autograd.grad(out.square().sum(), list(model.encoder.parameters()))

    calls, operator = [], ops.linear_gelu
    monkeypatch.setattr(
        ops, "linear_gelu", lambda *args, **options: (calls.append(args), operator(*args, **options))[1]
    )
    fused = results()
    assert len(calls) == 2, "once a layer"
    model.execution.recompute = "activations"
    apart = results()
    assert len(calls) == 2, "what is computed again starts from the product"
    with torch.no_grad():
        model(ids, output_hidden_states=True)  # operator by operator
    assert len(calls) == 4, "nothing is computed again where no gradient is asked for"
    for actual, expected in zip(fused, apart, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_explain_shows_it(model):
    ids = torch.randint(0, 61, (3, 7))
    steps = {step.name: step for step in explain(model, ids).steps}
    assert steps["linear_gelu"].gflop == pytest.approx(2 * 2 * 21 * 24 * 48 / 1e9)
    assert not {"FFN up", "bias_gelu"} & set(steps)
    model.execution.recompute = "activations"
    assert {"FFN up", "bias_gelu"} < {step.name for step in explain(model, ids).steps}


@pytest.mark.parametrize(("middle", "said"), [(48, False), (44, True)])
def test_explain_says_where_the_library_multiplies(kernel, model, middle, said):
    model = ALBERTModel(replace(model.config, intermediate_size=middle), backend="triton").eval()
    (step,) = (step for step in explain(model, torch.randint(0, 61, (3, 7))).steps if step.name == "linear_gelu")
    assert ("44 columns are no multiple of 16: cuBLASLt's product, no Triton tile" in step.why) == said
    routes = kernel.linear_gelu_routes(21, middle, torch.bfloat16, "gelu_erf", False)
    assert any("BLOCK_M" in route for route in routes) != said


def test_the_ffn_is_fused_on_a_gpu_without_autocast(monkeypatch):
    assert layer_module.fuses_ffn("cuda")
    assert not layer_module.fuses_ffn("cpu")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    assert not layer_module.fuses_ffn("cuda")
