"""quantized_encoder in C++ against its reference and a simulation, the same bits in any batch, and its rounding."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
from albert_fast.layers.quantized import fits_sums
from albert_fast.ops import attention_ref
from albert_fast.ops._integers import channel_sums, pack, pack_channels, round_rows, unpack, unpack_channels
from albert_fast.ops.quantized_encoder import integer_attention_ref
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES, poison_empty
from albert_fast.testing.parity import check_forward, device_of, make_inputs, parity_tests

FORWARD, _ = parity_tests("quantized_encoder")
CASE = ALL_CASES["quantized_encoder"]


def drawn(shape, **options):
    return make_inputs(CASE, shape, options, torch.float32)


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("shape", [((40, 23), 64, 2, 96, 1, 1), ((29, 1, 30), 78, 3, 900, 1, 1)])
def test_most_rows_differ_from_the_simulation_by_float32_rounding_alone(precision, shape):
    # An element between two integers may go either way and then changes its row: few do in one layer.
    inputs = drawn(shape, precision=precision)
    with poison_empty():
        actual = CASE.run(inputs, "cpp")
    exact = CASE.exact(inputs)
    rows = ((actual - exact).abs().amax(1) / exact.abs().max()).sort().values
    assert rows[int(0.6 * len(rows))] < 2e-6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.sampled_from([(26, 1), (48, 3), (64, 2)]),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from(["int8", "int16"]),
)
def test_any_lengths(lengths, size, middle, wanted, precision):
    inputs = drawn((tuple(lengths), *size, middle, 1, 2), wanted=wanted, precision=precision)
    with poison_empty():
        actual = CASE.run(inputs, "cpp")
    exact = CASE.exact(inputs)
    # Of all elements together, since in rows as narrow as these one that was rounded the other way shows: 0.006 and 2e-4 at
    # most in 700 random cases.
    assert (actual - exact).norm() <= (0.015 if precision == "int8" else 4e-4) * exact.norm()


@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("lengths", [(3,), (40, 1, 7), (11,) * 30, (300,), (150, 0, 149, 2)])
@pytest.mark.parametrize("wanted", [False, True])
def test_bitwise_the_same_on_any_number_of_threads_and_in_any_batch(lengths, wanted, precision, threads):
    inputs = drawn((lengths, 64, 2, 1000, 2, 3), wanted=wanted, precision=precision)
    threads(1)
    expected = CASE.run(inputs, "cpp")
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(CASE.run(inputs, "cpp"), expected)
    if wanted:
        return
    for begin, end in itertools.pairwise(inputs["cu_seqlens"].tolist()):
        alone = {**inputs, "hidden": inputs["hidden"][begin:end], "cu_seqlens": torch.tensor([0, end - begin]).int()}
        assert torch.equal(CASE.run(alone, "cpp"), expected[begin:end])


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_nan_and_infinity_stay_in_their_sequence(precision):
    inputs = drawn(((6, 9, 3), 48, 2, 96, 1, 2), precision=precision)
    clean = CASE.run(inputs, "cpp")
    for value in (float("nan"), float("inf"), float("-inf")):
        hidden = inputs["hidden"].clone()
        hidden[8, 5] = value
        for backend in ("cpp", "reference"):
            out = CASE.run({**inputs, "hidden": hidden}, backend)
            assert out[6:15].isnan().all()
        out = CASE.run({**inputs, "hidden": hidden}, "cpp")
        assert torch.equal(out[:6], clean[:6])
        assert torch.equal(out[15:], clean[15:])


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", F32), ("cpp", F32), ("reference", BF16), ("triton", BF16)]
)
def test_rows_whose_extent_is_no_float32_are_rounded_as_those_of_others(backend, dtype):
    if reason := dispatch.why_not("quantized_encoder", device_of(backend).type, backend, dtype):
        pytest.skip(reason)
    inputs = make_inputs(CASE, ((5, 3), 48, 2, 96, 1, 1), {"precision": "int8"}, dtype, backend)
    hidden = torch.rand(8, 48) * 3.7 - 1.8
    hidden[:, 0], hidden[:, 47] = 1.9, -1.8
    inputs["hidden"] = hidden.to(inputs["hidden"])
    inputs["shifts"][0].zero_()

    def run(factor):  # a power of two, which changes no integer
        inputs["rescales"][0].fill_(factor)
        rest = [scale * 2.0**12 / factor if i == 0 else scale for i, scale in enumerate(inputs["scales"])]
        return CASE.run({**inputs, "scales": rest}, backend)

    expected = run(1.0)
    assert expected.isfinite().all()
    assert expected.std() > 0.1
    assert torch.equal(run(2.0**127), expected)


@pytest.mark.parametrize(
    ("precision", "width", "largest"), [("int8", 1536, 127), ("int16", 768, (2**31 - 1) // (8191 * 256))]
)
def test_the_largest_activations_and_weights_do_not_overflow(precision, width, largest):
    # Activations at the ends of their range, weights of the same signs: no term of a sum takes from another.
    inputs = drawn(((5,), width, 12, 96, 1, 1), precision=precision)
    signs = torch.where(torch.randn(width, generator=torch.Generator().manual_seed(1)) > 0, 1, -1)
    inputs["hidden"] = 3.0 * signs.expand(5, width).float()
    inputs["shifts"] = [torch.zeros_like(shift) for shift in inputs["shifts"]]
    inputs["rescales"] = [torch.ones_like(rescale) for rescale in inputs["rescales"]]
    integers = (
        (largest * signs).expand(3 * width, width).to(torch.int8 if precision == "int8" else torch.int16).contiguous()
    )
    if precision == "int16":
        assert fits_sums(integers)
        assert not fits_sums(integers + integers.sign())
    inputs["integers"][0] = pack("qkv", integers)
    inputs["scales"][0] = pack_channels("qkv", torch.full((3 * width,), 1e-3 / largest))
    inputs["sums"][0] = channel_sums("qkv", integers)
    actual, expected = CASE.run(inputs, "cpp"), CASE.run(inputs, "reference")
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 65, 128, 400])
def test_wide_heads_keep_the_bits_of_their_scores(head_dim):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(37, head_dim, generator=generator) for _ in range(3))
    cu = torch.tensor([0, 20, 37], dtype=torch.int32)
    exact = attention_ref(q, k, v, cu, cu, 1, 0.3)
    error = (integer_attention_ref(q, k, v, cu, cu, 1, 0.3) - exact).norm() / exact.norm()
    # 4e-4 to 6e-4; 3e-3 at 400 if all products of a row had to fit 32 bits at once
    assert error < 1e-3


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize(
    ("product", "shape"),
    [("qkv", (51, 17)), ("qkv", (192, 64)), ("dense", (33, 33)), ("ffn", (129, 31)), ("ffn_output", (17, 1601)),
     ("ffn_output", (64, 768))],
)  # fmt: skip
def test_packing_is_undone(product, shape, dtype):
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randint(-127, 128, shape, generator=generator).to(dtype)
    assert torch.equal(unpack(product, pack(product, matrix), shape), matrix)
    scale = torch.rand(shape[0], generator=generator)
    assert torch.equal(unpack_channels(product, pack_channels(product, scale), shape[0]), scale)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.floats(-30, 30), st.floats(1e-30, 1e30), st.booleans(), st.integers(0, 2**31))
def test_rounded_rows_are_within_half_a_step(width, offset, size, signed, seed):
    x = (torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) + offset) * size
    levels = 8191 if signed else 255
    integers, step, zero = round_rows(x, levels, signed)
    assert integers.abs().max() <= levels
    assert signed or integers.min() >= 0
    # half a step, and another half where the zero point was rounded the other way
    assert ((step * (integers - zero) - x).abs() <= step * 1.01 + 1e-37).all()


def test_rows_of_zeros_and_of_denormals_round_to_zero():
    for value in (0.0, 1e-44):
        integers, step, zero = round_rows(torch.full((1, 5), value), 255, signed=False)
        assert (step * (integers - zero) == 0).all()
        inputs = drawn(((2,), 48, 2, 96, 1, 1), precision="int8")
        inputs["hidden"] = torch.full_like(inputs["hidden"], value)
        torch.testing.assert_close(CASE.run(inputs, "cpp"), CASE.run(inputs, "reference"), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("48 columns are not a multiple of num_heads = 5", {"num_heads": 5}),
        ("unknown act 'swish'", {"act": "swish"}),
        (r"each from 0 to 0, got \[1\]", {"layer_indices": [1]}),
        (r"cu_seqlens must run from 0 to 7", {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}),
        ("give both wanted_rows and cu_wanted, or neither", {"wanted_rows": torch.tensor([0])}),
        ("unknown precision 'int4'; known: int8, int16, fp8", {"precision": "int4"}),
        ("fp8 expects hidden in torch.bfloat16, got torch.float32", {"precision": "fp8"}),
        (r"7 vectors, 4 integers.* are not those of whole layers", {"vectors": [torch.zeros(48)] * 7}),
        (r"expected integers of qkv of shape .* in torch.int16", {"precision": "int16"}),
    ],
)
def test_bad_input_is_named(message, changes):
    with pytest.raises(ValueError, match=message):
        ops.quantized_encoder(**{**drawn(((7,), 48, 2, 96, 1, 1), precision="int8"), **changes})


def test_misshapen_weights_are_named():
    for name in ("integers", "scales", "sums", "rescales", "shifts"):
        inputs = drawn(((7,), 48, 2, 96, 1, 1), precision="int8")
        inputs[name][2] = inputs[name][2][:-1].clone()
        with pytest.raises(ValueError, match=f"expected {name} of ffn"):
            ops.quantized_encoder(**inputs)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni"])
def test_the_environment_names_the_instruction_set(isa):
    code = "from albert_fast.runtime import dispatch; print(dispatch.extension().build_info()['isa'])"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ALBERT_FAST_ISA": isa}, capture_output=True,
                         text=True)  # fmt: skip
    if run.returncode:
        assert f"ALBERT_FAST_ISA={isa}" in run.stderr, "this CPU or this build lacks it, and says so"
    else:
        assert run.stdout.split() == [isa]


@pytest.mark.parametrize("op", ["encoder", "quantized_encoder"])
def test_a_gradient_is_refused(op):
    case = ALL_CASES[op]
    inputs = make_inputs(case, case.shapes[1], {}, torch.float32)
    inputs["hidden"].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{op}_fwd has no derivative"):
        case.run(inputs).sum().backward()
