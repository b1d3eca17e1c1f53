"""gelu_layer_norm on every backend against plain torch, and how it names bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_backward, check_forward, device_of, parity_tests

FORWARD, BACKWARD = parity_tests("gelu_layer_norm")


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(16, 300))  # of few columns LayerNorm's gradient is rounding alone
def test_any_shape(rows, width):
    for check in (check_forward, check_backward):
        check(ALL_CASES["gelu_layer_norm"], (rows, width), {}, torch.float32, "cpp")


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
ROWS, WIDTH = 11, 33


def call(x, backend, **changes):
    vectors = {"bias": torch.zeros(WIDTH), "weight": torch.ones(WIDTH), "ln_bias": torch.zeros(WIDTH), **changes}
    on_device = {name: t.to(device_of(backend)) for name, t in {"x": x, **vectors}.items()}
    return ops.gelu_layer_norm(**on_device, eps=1e-12, act="relu", backend=backend).cpu()


@BACKENDS
def test_rows_have_mean_zero_and_variance_one(backend):
    out = call(torch.randn(ROWS, WIDTH) * 3, backend)
    torch.testing.assert_close(out.mean(1), torch.zeros(ROWS), atol=2e-5, rtol=0)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(ROWS), atol=1e-4, rtol=0)


@BACKENDS
def test_nan_stays_in_its_row(backend):
    x = torch.randn(ROWS, WIDTH)
    x[2, 5] = float("nan")
    out = call(x, backend)
    assert out[2].isnan().all()
    assert out[[i for i in range(ROWS) if i != 2]].isfinite().all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"ln_bias of shape \(33,\)"):
        call(torch.zeros(2, WIDTH), "auto", ln_bias=torch.zeros(2))
    with pytest.raises(ValueError, match="swish"):
        ops.gelu_layer_norm(torch.zeros(2, 4), *[torch.zeros(4)] * 3, 1e-5, "swish")
    assert call(torch.zeros(0, WIDTH), "auto").shape == (0, WIDTH)
