import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
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


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"bias of shape \(4,\).*\(3,\)"):
        ops.bias_gelu(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="swish"):
        ops.bias_gelu(torch.zeros(2, 4), torch.zeros(4), "swish")
    with pytest.raises(ValueError, match="tokens, width"):
        ops.bias_gelu(torch.zeros(4), torch.zeros(4))
    assert ops.bias_gelu(torch.zeros(0, 4), torch.zeros(4)).shape == (0, 4)
