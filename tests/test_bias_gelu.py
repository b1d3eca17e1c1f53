"""bias_gelu on every backend against plain torch: its activations at their limits, dropout, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
from albert_fast.ops._dropout import keep_scale_2d
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_backward, check_forward, device_of, parity_tests

FORWARD, BACKWARD = parity_tests("bias_gelu")


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 300))
def test_any_shape(rows, width):
    # Of one or two columns the gradient of the bias is a handful of sums, and by chance torch may round all of them well.
    for check in (check_forward, check_backward) if width > 2 else (check_forward,):
        check(ALL_CASES["bias_gelu"], (rows, width), {}, torch.float32, "cpp")


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("act", ["gelu_tanh", "gelu_erf", "relu"])
def test_limits_infinities_and_nan(act, backend):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 1e4, -1e4, inf, nan, -0.0]])
    out = ops.bias_gelu(x.to(device_of(backend)), torch.zeros(6, device=device_of(backend)), act, backend=backend).cpu()
    # By the formula; torch's own erf form answers NaN or inf for inf, by the width of its vectors.
    torch.testing.assert_close(out, torch.tensor([[0.0, 1e4, 0.0, inf, nan, 0.0]]), equal_nan=True, atol=0, rtol=1e-6)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
SEED = 2**62 + 123456789012345  # both words of it are used


def scales(shape, p, seed, dtype, backend):
    """What dropout multiplies every element by: of the output, and in the backward of its gradient."""
    x = torch.ones(shape, dtype=dtype, device=device_of(backend), requires_grad=True)
    bias = torch.zeros(shape[1], dtype=dtype, device=x.device)
    out = ops.bias_gelu(x, bias, "relu", p, torch.tensor(seed), backend=backend)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return out.detach().cpu(), gradient.cpu()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_and_both_directions_drop_the_same_elements(dtype, backend):
    shape, p = (37, 1031), 0.3  # several tiles, none of them full; several words of a CPU's vectors and a rest
    kept = keep_scale_2d(SEED, shape, p, torch.device("cpu"))
    for scale in scales(shape, p, SEED, dtype, backend):
        assert torch.equal(scale != 0, kept != 0)
        assert torch.equal(scale[scale != 0], torch.full(shape, 1 / (1 - p), dtype=dtype)[scale != 0])


@BACKENDS
def test_dropout_takes_its_share_and_keeps_the_mean(backend):
    first, again, other = (scales((64, 1024), 0.3, seed, torch.float32, backend)[0] for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(first, again)
    deviation = (0.3 * 0.7 / first.numel()) ** 0.5
    assert (first == 0).float().mean() == pytest.approx(0.3, abs=5 * deviation)
    assert first.mean() == pytest.approx(1.0, abs=5 * deviation / 0.7)
    # Two independent masks agree in all but 2 p (1 - p) of their elements.
    assert ((first == 0) != (other == 0)).float().mean() == pytest.approx(0.42, abs=0.01)


@BACKENDS
@pytest.mark.parametrize("act", ["gelu_tanh", "gelu_erf", "relu"])
def test_what_is_kept_is_the_plain_activation_scaled(act, backend):
    x, bias = (torch.randn(shape).to(device_of(backend)) for shape in ((13, 77), (77,)))
    plain = ops.bias_gelu(x, bias, act, backend=backend)
    assert torch.equal(plain, ops.bias_gelu(x, bias, act, 0.0, torch.tensor(SEED), backend=backend))
    half = ops.bias_gelu(x, bias, act, 0.5, torch.tensor(SEED), backend=backend)  # 1 / (1 - p) is a power of two
    kept = keep_scale_2d(SEED, x.shape, 0.5, x.device)
    assert torch.equal(half, plain * kept)


@BACKENDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dropped_nan_or_infinity_becomes_nan_as_in_torch(value, backend):
    device, seed = device_of(backend), torch.tensor(SEED)
    expected = torch.full((8, 50), value) * keep_scale_2d(SEED, (8, 50), 0.5, torch.device("cpu"))
    x, bias = torch.ones(8, 50, device=device, requires_grad=True), torch.zeros(50, device=device)
    out = ops.bias_gelu(x.detach() * value, bias, "relu", 0.5, seed, backend=backend)
    torch.testing.assert_close(out.cpu(), expected, equal_nan=True)
    out = ops.bias_gelu(x, bias, "relu", 0.5, seed, backend=backend)
    (gradient,) = torch.autograd.grad(out, x, torch.full_like(out, value))
    torch.testing.assert_close(gradient.cpu(), expected, equal_nan=True)


def test_dropout_where_a_program_walks_over_several_tiles(monkeypatch):
    common = pytest.importorskip("albert_fast.kernels._common", reason="triton is not installed")
    monkeypatch.setattr(common, "BWD_PROGRAMS", 3)
    check_backward(ALL_CASES["bias_gelu"], (61, 100), {"act": "gelu_erf", "dropout_p": 0.2}, torch.float32, "triton")


@BACKENDS
def test_bad_dropout_is_named(backend):
    x, bias = torch.zeros(2, 4, device=device_of(backend)), torch.zeros(4, device=device_of(backend))
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"dropout_p must lie in \[0, 1\), got {p}"):
            ops.bias_gelu(x, bias, dropout_p=p, seed=torch.tensor(1), backend=backend)
    with pytest.raises(ValueError, match=r"dropout_p is 0.5: pass the seed"):
        ops.bias_gelu(x, bias, dropout_p=0.5, backend=backend)
    empty = ops.bias_gelu(x[:0], bias, dropout_p=0.5, seed=torch.tensor(1), backend=backend)
    assert empty.shape == (0, 4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"bias of shape \(4,\).*\(3,\)"):
        ops.bias_gelu(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="swish"):
        ops.bias_gelu(torch.zeros(2, 4), torch.zeros(4), "swish")
    with pytest.raises(ValueError, match="tokens, width"):
        ops.bias_gelu(torch.zeros(4), torch.zeros(4))
    assert ops.bias_gelu(torch.zeros(0, 4), torch.zeros(4)).shape == (0, 4)
