"""The Triton gradients of the operators on rows: column sums over many programs, wide rows, strides, bits, NaN and infinity."""

from __future__ import annotations

import pytest
import torch

from albert_fast.testing import ALL_CASES, assert_close_calibrated, poison_empty
from albert_fast.testing.parity import DTYPES, check_backward, device_of, make_inputs

common = pytest.importorskip("albert_fast.kernels._common", reason="triton is not installed")

OPS = ("bias_gelu", "add_layer_norm", "gelu_layer_norm")
EVERY = pytest.mark.parametrize("op", OPS)
OPTIONS = {
    "bias_gelu": {"act": "gelu_erf"},
    "add_layer_norm": {"dropout_p": 0.2},
    "gelu_layer_norm": {"act": "gelu_erf"},
}


def gradients(op, inputs, cotangent, backend="triton"):
    """name -> gradient, with what the kernels leave unwritten poisoned."""
    case = ALL_CASES[op]
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.gradients}
    with poison_empty():
        found = torch.autograd.grad(case.run({**inputs, **leaves}, backend), list(leaves.values()), cotangent)
    return dict(zip(leaves, found, strict=True))


def drawn(op, shape, dtype=torch.float32):
    inputs = make_inputs(ALL_CASES[op], shape, OPTIONS[op], dtype)
    return inputs, torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_several_thousand_narrow_rows():
    """More than 256 programs, so that the sums of their sums take a second step."""
    check_backward(ALL_CASES["gelu_layer_norm"], (2203, 17), OPTIONS["gelu_layer_norm"], torch.float32, "triton")


@pytest.mark.parametrize("n_sums", [1, 2, 3])
@pytest.mark.parametrize("n_partials", [1, 255, 256, 257, 513])
def test_the_sums_of_any_number_of_programs_are_added(n_partials, n_sums):
    partials = torch.randn(n_partials, n_sums, 67, device=device_of("triton"))
    with poison_empty():
        found = torch.stack(common.column_sums(partials, torch.float32))
    torch.testing.assert_close(found.double(), partials.double().sum(0), atol=1e-4, rtol=0)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_program_walks_over_several_tiles(op, dtype, monkeypatch):
    monkeypatch.setattr(common, "BWD_PROGRAMS", 3)
    check_backward(ALL_CASES[op], (61, 100), OPTIONS[op], dtype, "triton")


@EVERY
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_wider_than_a_program_are_split(op, dtype, monkeypatch):
    monkeypatch.setattr(common, "MAX_WHOLE_ROW_BWD", 64)
    monkeypatch.setattr(common, "SPLIT_BLOCK_N", 256)
    check_backward(ALL_CASES[op], (7, 601), OPTIONS[op], dtype, "triton")


@pytest.mark.parametrize("n_cols", [1, 127, 128, 129, 768, 1024, 4096, 4097, 16384])
def test_tiles_hold_the_row_or_split_it_evenly_among_threads(n_cols):
    block_m, block_n, num_warps = common.bwd_row_tiles(n_cols)
    assert block_m * block_n == 8 * 32 * num_warps
    assert num_warps <= 16
    assert (block_n >= n_cols) == (n_cols <= common.MAX_WHOLE_ROW_BWD)


def test_groups_follow_from_the_shape_and_leave_none_idle():
    for n_rows in (1, 2, 511, 512, 513, 32768, 2**31 - 1):
        for block_m, col_blocks in ((1, 1), (8, 1), (4, 6), (1, 16), (1, 2000)):
            groups = common.row_groups(n_rows, block_m, col_blocks)
            assert 1 <= groups <= -(-n_rows // block_m)
            assert groups * col_blocks <= max(common.BWD_PROGRAMS, col_blocks)


@EVERY
@pytest.mark.parametrize("layout", ["rows apart", "columns apart"])
def test_strided_operands(op, layout):
    inputs, cotangent = drawn(op, (11, 48))
    expected = gradients(op, inputs, cotangent)

    def strided(t):
        wide = torch.full((t.shape[0], 3 * t.shape[1]), float("nan"))
        view = wide[:, 5 : 5 + t.shape[1]] if layout == "rows apart" else wide[:, ::3]
        return view.copy_(t)

    apart = {name: strided(v) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for name, v in inputs.items()}
    for name, gradient in gradients(op, apart, strided(cotangent)).items():
        assert torch.equal(gradient, expected[name]), name


@EVERY
def test_two_calls_give_the_same_bits(op):
    inputs, cotangent = drawn(op, (300, 70), torch.bfloat16)
    first, again = (gradients(op, inputs, cotangent) for _ in range(2))
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name]), name


@EVERY
@pytest.mark.parametrize("shape", [(0, 5), (0, 4097)])
def test_no_rows_give_zeros(op, shape):
    inputs, cotangent = drawn(op, shape)
    for name, gradient in gradients(op, inputs, cotangent).items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any(), name


def test_dropped_elements_get_no_gradient_and_their_residual_does():
    shape, p = (29, 130), 0.4
    inputs = make_inputs(ALL_CASES["add_layer_norm"], shape, {"dropout_p": p}, torch.float32)
    found = gradients("add_layer_norm", inputs, torch.randn(shape))
    # With x = 1 and no bias or residual, the forward's output is below 0 just where it dropped.
    flat = {"x": torch.ones(shape), "bias": torch.zeros(130), "residual": torch.zeros(shape), "weight": torch.ones(130)}
    dropped = ALL_CASES["add_layer_norm"].run({**inputs, **flat, "ln_bias": torch.zeros(130)}, "triton") < 0
    assert torch.equal(found["x"] == 0, dropped)
    assert found["residual"].all()
    torch.testing.assert_close(found["x"][~dropped], found["residual"][~dropped] / (1 - p))


OPERANDS = [(op, name) for op in OPS for name in (*ALL_CASES[op].gradients, "cotangent") if name != "ln_bias"]


@pytest.mark.parametrize(("op", "name"), OPERANDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_travel_as_in_the_reference(op, name, value):
    shape = (37, 33)  # the last tile of rows is not full: nothing may come out of its empty rows
    inputs, cotangent = drawn(op, shape)
    if name == "cotangent":
        cotangent[5, 7] = value
    else:
        inputs[name][(5, 7) if inputs[name].dim() == 2 else 7] = value
    expected = gradients(op, inputs, cotangent, "reference")
    for what, gradient in gradients(op, inputs, cotangent).items():
        assert_close_calibrated(gradient, expected[what], expected[what], f"gradient of {what}", slack=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_closed_gate_lets_nothing_through(value):
    x = torch.tensor([[-1.0, 0.0, 1.0]], requires_grad=True)
    out = ALL_CASES["bias_gelu"].function(x, torch.zeros(3), "relu", backend="triton")
    (gradient,) = torch.autograd.grad(out, x, torch.full((1, 3), value))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, value]]), equal_nan=True)


@pytest.mark.parametrize("act", ["gelu_tanh", "gelu_erf"])
def test_slopes_of_large_values_are_exact(act):
    x = torch.tensor([[-1e4, -50.0, -6.0, 0.0, 6.0, 50.0, 1e4]], requires_grad=True)
    out = ALL_CASES["bias_gelu"].function(x, torch.zeros(7), act, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]]), atol=2e-6, rtol=0)
