"""The Triton kernels of quantized layers one by one: integers of a rounding, exact sums of a product, whole layers."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.nn import functional as F

from albert_fast.ops import bias_gelu_ref
from albert_fast.ops._integers import FORMATS, lay_out, round_rows
from albert_fast.ops._schema import PRODUCTS
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES, poison_empty
from albert_fast.testing.parity import device_of, make_inputs

pytest.importorskip("triton")
from albert_fast.kernels import _rounding, _tuning
from albert_fast.kernels.quantized_encoder import Matrix, quantized_product

DEVICE = device_of("triton")
CASE = ALL_CASES["quantized_encoder"]
NO_FP8 = dispatch.why_not_quantized("fp8", DEVICE, "triton")
FP8 = pytest.param("fp8", marks=pytest.mark.skipif(NO_FP8 is not None, reason=str(NO_FP8)))
PRECISIONS = pytest.mark.parametrize("precision", ["int8", FP8])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 312), (37, 31), (2, 1023)])


def drawn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def depth(width):
    return -(-width // 128) * 128


def matrix_of(weight, scales):
    """A `Matrix` of weight (N, K) and scales (N,) whose activations are rounded as they are."""
    laid = lay_out("dense", weight, scales, panels=False)
    return Matrix(*(t.to(DEVICE) for t in (*laid, torch.ones(weight.shape[1]), torch.zeros(weight.shape[1]))))


def rounded_of(values, steps, zeros):
    """`Rounded` with values (T, K), and numbers beyond K that no product may see."""
    padded = F.pad(values.view(torch.int8), (0, -values.shape[1] % 128), value=77).view(values.dtype)
    return _rounding.Rounded(*(None if t is None else t.to(DEVICE) for t in (padded, steps, zeros)))


def assert_rounded(rounded, y, precision):
    """`rounded` is y (T, K) float64 to the nearest number but where y is as near to two: there it may be the other one."""
    form, width = FORMATS[precision], y.shape[1]
    values, step, zero = round_rows(y, form.activation_levels, not form.zero_point, form.nearest)
    torch.testing.assert_close(rounded.steps[:, None].double(), step, rtol=1e-6, atol=0)
    if precision == "int8":
        zeros = rounded.zeros[:, None]
        assert (zeros + 128 - zero).abs().max() <= 1
        assert ((step * (rounded.values[:, :width].double() - zeros) - y).abs() <= 1.01 * step).all()
        # A zero point that was rounded the other way moves its whole row.
        difference = torch.where(zeros + 128 == zero, (rounded.values[:, :width].double() + 128 - values).abs(), 0.0)
        assert difference.max() <= 1
    else:
        assert rounded.zeros is None
        difference = (rounded.values[:, :width].double() - values).abs()
        # Neighbours are an eighth apart at most, and 2^-9 among denormals.
        assert (difference <= (values.abs() / 8).clamp(min=2**-9)).all()
    assert (difference > 0).double().mean() <= max(1e-3, 1.01 / difference.numel())


@PRECISIONS
@SHAPES
def test_round_rows(shape, precision):
    x, rescale, shift = drawn(*shape, 2, dtype=torch.bfloat16)[..., 0], drawn(shape[1]), drawn(shape[1])
    with poison_empty():
        rounded = _rounding.round_rows(x, rescale, shift, FORMATS[precision].dtype, depth(shape[1]))
    assert_rounded(rounded, x.double() * rescale.double() + shift.double(), precision)


@PRECISIONS
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_among_the_numbers_of_a_row_of_one_sign(precision, sign):
    # As wide as a program: there are no zeros behind the row.
    x = sign * (drawn(3, 128, dtype=torch.bfloat16).abs() + 1)
    ones, zeros = torch.ones(128, device=DEVICE), torch.zeros(128, device=DEVICE)
    rounded = _rounding.round_rows(x, ones, zeros, FORMATS[precision].dtype, 128)
    assert_rounded(rounded, x.double(), precision)


@PRECISIONS
@SHAPES
def test_add_layer_norm_rounded(shape, precision):
    x, residual = drawn(*shape, dtype=torch.bfloat16), drawn(*shape, 2, dtype=torch.bfloat16).flatten(1)[:, : shape[1]]
    weight, ln_bias = (drawn(shape[1], dtype=torch.bfloat16) for _ in range(2))
    bias, rescale, shift = (drawn(shape[1]) for _ in range(3))
    dtype = FORMATS[precision].dtype
    with poison_empty():
        out, rounded = _rounding.add_layer_norm_rounded(
            x, bias, residual, weight, ln_bias, 1e-12, rescale, shift, dtype, depth(shape[1])
        )
        alone, nothing = _rounding.add_layer_norm_rounded(
            x, bias, residual, weight, ln_bias, 1e-12, None, None, dtype, 0
        )
    z = x.double() + bias.double() + residual.double()
    exact = F.layer_norm(z, shape[1:], weight.double(), ln_bias.double(), 1e-12)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)
    assert nothing is None
    assert torch.equal(alone, out)
    columns = residual.t().contiguous().t()
    strided, _ = _rounding.add_layer_norm_rounded(x, bias, columns, weight, ln_bias, 1e-12, None, None, dtype, 0)
    assert torch.equal(strided, out)
    if shape[1] > 1:  # of one element the norm is what rounding leaves of zero
        assert_rounded(rounded, exact * rescale.double() + shift.double(), precision)


@PRECISIONS
@pytest.mark.parametrize("act", ["gelu_tanh", "gelu_erf", "relu"])
def test_bias_gelu_rounded(precision, act):
    x, (bias, rescale, shift) = drawn(5, 312, dtype=torch.bfloat16, scale=2.0), (drawn(312) for _ in range(3))
    with poison_empty():
        rounded = _rounding.bias_gelu_rounded(x, bias, act, rescale, shift, FORMATS[precision].dtype, 384)
    exact = bias_gelu_ref(x.float(), bias, act).double() * rescale.double() + shift.double()
    assert_rounded(rounded, exact, precision)


@PRECISIONS
def test_rows_too_wide_for_one_kernel_take_two(precision, monkeypatch):
    x, (bias, rescale, shift) = drawn(3, 200, dtype=torch.bfloat16), (drawn(200) for _ in range(3))
    monkeypatch.setattr(_rounding, "FUSED_ROW", 128)
    rounded = _rounding.bias_gelu_rounded(x, bias, "relu", rescale, shift, FORMATS[precision].dtype, 256)
    middle = (x.float() + bias).relu().bfloat16()
    assert_rounded(rounded, middle.double() * rescale.double() + shift.double(), precision)


@PRECISIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_takes_its_row_along_and_no_other(precision, value):
    x, ones, zeros = drawn(4, 31, dtype=torch.bfloat16), torch.ones(31, device=DEVICE), torch.zeros(31, device=DEVICE)
    clean = _rounding.round_rows(x, ones, zeros, FORMATS[precision].dtype, 128)
    x[2, 5] = value
    with warnings.catch_warnings():
        # What the interpreter says where that becomes an integer, which no chip promises anything of.
        warnings.filterwarnings("error", "invalid value encountered in cast")
        rounded = _rounding.round_rows(x, ones, zeros, FORMATS[precision].dtype, 128)
    assert rounded.steps.isnan().tolist() == [False, False, True, False]
    others = torch.tensor([0, 1, 3], device=DEVICE)
    found, expected = rounded.take(others), clean.take(others)
    assert torch.equal(found.values.view(torch.int8), expected.values.view(torch.int8))
    assert torch.equal(found.steps, expected.steps)


@PRECISIONS
@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-37])
def test_rows_of_zeros_and_of_steps_without_an_inverse_round_to_zero(precision, value):
    ones, zeros = torch.ones(9, device=DEVICE), torch.full((9,), value, device=DEVICE)
    x = torch.zeros(2, 9, dtype=torch.bfloat16, device=DEVICE)
    rounded = _rounding.round_rows(x, ones, zeros, FORMATS[precision].dtype, 128)
    zero = 0 if rounded.zeros is None else rounded.zeros[:, None]
    assert torch.equal(rounded.steps[:, None] * (rounded.values.float() - zero), torch.zeros(2, 128, device=DEVICE))


def test_a_row_whose_ends_and_zero_point_are_rounded_up_stays_within_its_levels():
    # Steps of 1: the zero point -1.5 to 2, and 253.5 + 2 to 256.
    x, ends = torch.ones(1, 2, dtype=torch.bfloat16, device=DEVICE), torch.tensor([253.5, -1.5], device=DEVICE)
    rounded = _rounding.round_rows(x, ends, torch.zeros(2, device=DEVICE), torch.int8, 128)
    assert rounded.steps.item() == 1
    assert rounded.values[0, :3].tolist() == [127, -128, 2 - 128]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (70, 33, 130), (5, 200, 256), (0, 16, 16)])
@PRECISIONS
def test_a_product_of_integers_is_exact(shape, precision):
    n_rows, n_cols, n_inner = shape
    form = FORMATS[precision]
    if precision == "int8":
        values, weight = (torch.randint(-128, 128, (n, n_inner)).to(form.dtype) for n in (n_rows, n_cols))
        zeros = torch.randint(-128, 128, (n_rows,), dtype=torch.int32)
        sums = values.long() @ weight.long().t() - zeros[:, None].long() * weight.long().sum(1)
    else:  # small integers, so that no order of a sum rounds
        values, weight = (torch.randint(-8, 9, (n, n_inner)).float().to(form.dtype) for n in (n_rows, n_cols))
        zeros, sums = None, values.double() @ weight.double().t()
    steps, scales, bias = torch.rand(n_rows) + 0.1, torch.rand(n_cols) + 0.1, torch.randn(n_cols)
    x, matrix = rounded_of(values, steps, zeros), matrix_of(weight, scales)
    expected = sums.float() * scales * steps[:, None]
    with poison_empty():
        assert torch.equal(quantized_product(x, matrix).cpu(), expected.bfloat16())
        biased = quantized_product(x, matrix, bias.to(DEVICE)).cpu()
        channels = quantized_product(x, matrix.channels(1, n_cols), None).cpu()
    torch.testing.assert_close(biased.float(), (expected + bias).bfloat16().float(), rtol=2**-7, atol=1e-6)
    assert torch.equal(channels, expected.bfloat16()[:, 1:])


def test_the_tuner_is_asked_by_type_and_sizes_rows_by_powers_of_two(monkeypatch):
    asked = []

    def choose(name, key, candidates, launch):
        asked.append((name, key(), len(candidates)))
        return candidates[-1]

    monkeypatch.setattr(_tuning, "choose", choose)
    x = rounded_of(torch.zeros(5, 130, dtype=torch.int8), torch.ones(5), torch.zeros(5, dtype=torch.int32))
    quantized_product(x, matrix_of(torch.zeros(33, 130, dtype=torch.int8), torch.ones(33)))
    assert asked == [("quantized_product", "torch.int8 T8 N33 K256", 4)]


def test_the_largest_sums_do_not_overflow():
    # A row of the least integers beside the largest zero point: nothing of a sum takes from another.
    n_inner, one = 1024, torch.ones(1)
    values, weight = (torch.full((1, n_inner), value, dtype=torch.int8) for value in (-128, 127))
    x, matrix = rounded_of(values, one, torch.full((1,), 127, dtype=torch.int32)), matrix_of(weight, one)
    expected = torch.tensor([[-255.0 * 127 * n_inner]]).bfloat16()
    assert torch.equal(quantized_product(x, matrix).cpu(), expected)


@PRECISIONS
@pytest.mark.parametrize("wanted", [False, True])
def test_layers_err_as_the_reference_does(precision, wanted):
    # bfloat16 between the kernels turns some roundings the other way; all together they err alike.
    options = {"precision": precision, "wanted": wanted}
    inputs = make_inputs(CASE, ((9, 1, 7), 64, 2, 96, 2, 3), options, torch.bfloat16, "triton")
    with poison_empty():
        actual = CASE.run(inputs, "triton").double()
    exact, reference = CASE.exact(inputs), CASE.run(inputs, "reference").double()
    assert (actual - exact).norm() <= 1.25 * (reference - exact).norm()
    assert (reference - exact).norm() <= 0.1 * exact.norm()


@PRECISIONS
def test_rows_that_are_asked_for_are_those_of_all(precision):
    options = {"precision": precision, "wanted": True}
    inputs = make_inputs(CASE, ((9, 0, 7), 64, 2, 96, 2, 3), options, torch.bfloat16, "triton")
    assert 0 < len(inputs["wanted_rows"]) < 16
    every = CASE.run({**inputs, "wanted_rows": None, "cu_wanted": None}, "triton")
    assert torch.equal(CASE.run(inputs, "triton"), every[inputs["wanted_rows"]])


@PRECISIONS
def test_a_sequence_is_the_same_in_any_batch(precision):
    lengths = (5, 0, 9)
    inputs = make_inputs(CASE, (lengths, 48, 2, 96, 1, 2), {"precision": precision}, torch.bfloat16, "triton")
    together, ends = CASE.run(inputs, "triton"), inputs["cu_seqlens"].tolist()
    for begin, end in itertools.pairwise(ends):
        cu_seqlens = torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE)
        alone = CASE.run({**inputs, "hidden": inputs["hidden"][begin:end], "cu_seqlens": cu_seqlens}, "triton")
        assert torch.equal(alone, together[begin:end])


@pytest.mark.parametrize("width", [100, 128])
def test_rows_are_padded_and_contiguous_whatever_the_matrix_was(width):
    matrix = torch.randint(-127, 128, (width, 40), dtype=torch.int8).t()
    values, scales, sums = lay_out("dense", matrix, torch.rand(40), panels=False)
    assert values.is_contiguous()
    assert values.shape == (40, 128)
    assert torch.equal(values[:, :width], matrix)
    assert not values[:, width:].any()
    assert torch.equal(sums.long(), matrix.long().sum(1))
    assert scales.dtype == torch.float32


def test_panels_are_for_the_cpu_kernel_and_rows_for_the_gpu():
    inputs = make_inputs(CASE, ((3,), 48, 2, 96, 1, 1), {}, torch.float32)
    rows = make_inputs(CASE, ((3,), 48, 2, 96, 1, 1), {}, torch.bfloat16)
    lists = ("integers", "scales", "sums")
    with pytest.raises(ValueError, match="the cpp kernel reads integers in panels, not in rows"):
        CASE.run({**inputs, **{name: rows[name] for name in lists}}, "cpp")
    with pytest.raises(ValueError, match="the triton kernel reads integers in rows, not in panels"):
        CASE.run({**rows, **{name: inputs[name] for name in lists}}, "triton")
    # The reference reads either.
    matrices = zip(PRODUCTS, rows["integers"], rows["scales"], (48, 48, 48, 96), strict=True)
    packed = zip(
        *(lay_out(name, matrix[:, :k], scale, panels=True) for name, matrix, scale, k in matrices), strict=True
    )
    mixed = CASE.run({**rows, **dict(zip(lists, map(list, packed), strict=True))}, "reference")
    assert torch.equal(mixed, CASE.run(rows, "reference"))
