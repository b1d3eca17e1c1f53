"""add_layer_norm on every backend against plain torch, its dropout, and how it names bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_backward, check_forward, device_of, parity_tests

FORWARD, BACKWARD = parity_tests("add_layer_norm")


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(16, 300))  # of few columns LayerNorm's gradient is rounding alone
def test_any_shape(rows, width):
    for check in (check_forward, check_backward):
        check(ALL_CASES["add_layer_norm"], (rows, width), {}, torch.float32, "cpp")


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
ROWS, WIDTH = 11, 33


def call(x, backend, **changes):
    vectors = {"bias": torch.zeros(WIDTH), "weight": torch.ones(WIDTH), "ln_bias": torch.zeros(WIDTH), **changes}
    vectors = {"x": x, "residual": torch.zeros_like(x), **vectors}
    on_device = {name: t.to(device_of(backend)) for name, t in vectors.items()}
    return ops.add_layer_norm(**on_device, eps=1e-12, backend=backend).cpu()


@BACKENDS
def test_rows_have_mean_zero_and_variance_one_wherever_they_lie(backend):
    out = call(torch.randn(ROWS, WIDTH) * 3 + 500, backend)
    torch.testing.assert_close(out.mean(1), torch.zeros(ROWS), atol=2e-5, rtol=0)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(ROWS), atol=1e-4, rtol=0)


@BACKENDS
def test_nan_and_infinity_stay_in_their_row(backend):
    x = torch.randn(ROWS, WIDTH)
    x[2, 5], x[7, 0] = float("nan"), float("inf")
    out = call(x, backend)
    assert out[[2, 7]].isnan().all()
    assert out[[i for i in range(ROWS) if i not in (2, 7)]].isfinite().all()


@BACKENDS
def test_dropout_keeps_what_the_seed_says(backend):
    x, seed = torch.ones(64, 256), torch.tensor(123456789012345)
    vectors = (torch.zeros(256), torch.zeros(64, 256), torch.ones(256), torch.zeros(256))

    def dropped_out(seed, backend):
        tensors = [t.to(device_of(backend)) for t in (x, *vectors)]
        return ops.add_layer_norm(*tensors, 1e-12, 0.3, seed, backend=backend).cpu()

    first, again = (dropped_out(seed, backend) for _ in range(2))
    assert torch.equal(first, again)
    dropped = (first < 0).float().mean()
    assert 0.28 < dropped < 0.32
    other = dropped_out(seed + 1, backend)
    assert ((first < 0) != (other < 0)).float().mean() > 0.3
    assert torch.equal(first < 0, dropped_out(seed, "reference") < 0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="residual"):
        call(torch.zeros(2, WIDTH), "auto", residual=torch.zeros(3, WIDTH))
    with pytest.raises(ValueError, match=r"weight of shape \(33,\)"):
        call(torch.zeros(2, WIDTH), "auto", weight=torch.zeros(WIDTH + 1))
    assert call(torch.zeros(0, WIDTH), "auto").shape == (0, WIDTH)
    with pytest.raises(ValueError, match="seed"):
        ops.add_layer_norm(torch.zeros(1, 2), *([torch.zeros(2), torch.zeros(1, 2)] + [torch.zeros(2)] * 2), 1e-5, 0.5)
