"""Wrong calls of operators, public and registered: an error that names the argument, or the right result; never a crash."""

import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from albert_fast import ops
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES, hostile

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OPERATORS = torch.ops.albert_fast


def encoder_inputs(**changes):
    """Two layers, sequences of 3, 5, 0 and 2 tokens, two rows asked of the first, one of the second and the last each."""
    generator = torch.Generator().manual_seed(3)
    inputs = ALL_CASES["encoder"].make_inputs(((3, 5, 0, 2), 24, 2, 40, 1, 2), torch.float32, "cpu", generator)
    inputs["wanted_rows"], inputs["cu_wanted"] = (
        torch.tensor([0, 2, 4, 9]),
        torch.tensor([0, 2, 3, 3, 4], dtype=torch.int32),
    )
    return {**inputs, **changes}


@pytest.mark.parametrize(("seed", "dtype"), [(1, torch.float32), (2, torch.float32), (3, torch.bfloat16)])
def test_a_wrong_argument_is_named_or_the_result_is_right(seed, dtype):
    for name, kind, arguments in hostile.hostile_calls(seed, 25, dtype):
        results = hostile.run(name, arguments)
        if isinstance(results, Exception):
            assert str(results), f"{name}, {kind}"
            continue
        # What a backward is given must fit what its forward saved; what is infinite or saturated has no one right result.
        odd = name.endswith("_bwd") or any(word in kind for word in ("of other numbers", "value", "meta"))
        if odd or "backend" not in arguments or "encoder" in name:
            continue
        expected = hostile.run(name, {**arguments, "backend": "reference"})
        assert not isinstance(expected, Exception), f"{name}, {kind}: the reference says {expected!r}"
        for result, same in zip(results, expected, strict=True):
            error = (result.double() - same.double()).abs() / (1 + same.double().abs())
            error = error.masked_fill(result == same, 0.0)
            limit = 2e-2 if torch.bfloat16 in (dtype, result.dtype) else 1e-4
            assert not result.numel() or error.max() < limit, f"{name}, {kind}: {error.max()}"


@pytest.mark.parametrize("kind", ["strided", "lazily negated"])
def test_numbers_are_read_where_they_are(kind):
    for name, arguments in hostile.valid_calls().items():
        expected = hostile.run(name, arguments)
        for key, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                continue
            results = hostile.run(name, {**arguments, key: hostile.TENSORS[kind](value, None)})
            assert not isinstance(results, Exception), f"{name}, {key}: {results!r}"
            for result, same in zip(results, expected, strict=True):
                assert torch.allclose(result, same, rtol=1e-5, atol=1e-5), f"{name}, {key}"


@pytest.mark.parametrize("kept", [0, 8])
def test_released_memory_is_named(kept):
    for name, arguments in hostile.valid_calls().items():
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.nbytes > 8:
                gone = value.clone()
                gone.untyped_storage().resize_(kept)
                with pytest.raises(
                    ValueError, match=rf"{key} .* was released: \d+ bytes are read, its storage has {kept}"
                ):
                    getattr(OPERATORS, name)(**{**arguments, key: gone})


ROWS = [
    ({"wanted_rows": torch.tensor([9, 4, 2, 0])}, r"wanted_rows\[0\] is 9, outside its sequence.* 0 to 2"),
    ({"wanted_rows": torch.tensor([0, 2, -1, 9])}, r"wanted_rows\[2\] is -1, outside its sequence.* 3 to 7"),
    ({"wanted_rows": torch.tensor([0, 2, 4, 10])}, r"wanted_rows\[3\] is 10, .* 8 to 9"),
    (
        {"wanted_rows": torch.tensor([0, 2, 4, 9], dtype=torch.int32)},
        r"expected wanted_rows of shape .* in torch\.int64, got .* in torch\.int32",
    ),
    ({"wanted_rows": torch.tensor([0.0, 2.0, 4.0, 9.0])}, r"in torch\.float32"),
    ({"cu_wanted": torch.tensor([0, 3, 2, 3, 4], dtype=torch.int32)}, "cu_wanted must run from 0 to 4 and never fall"),
    ({"cu_wanted": torch.tensor([0, 2, 3, 4], dtype=torch.int32)}, r"cu_wanted of shape \(5,\)"),
    ({"cu_seqlens": torch.tensor([0, 3, 8, 8, 11], dtype=torch.int32)}, "cu_seqlens must run from 0 to 10"),
    ({"cu_seqlens": torch.tensor([1, 3, 8, 8, 10], dtype=torch.int32)}, "cu_seqlens must run from 0 to 10"),
    ({"cu_seqlens": torch.tensor([0, 2**31 - 1, -(2**31), 8, 10], dtype=torch.int32)}, "cu_seqlens must run"),
    ({"layer_indices": [0, 1]}, r"each from 0 to 0, got \[0, 1\]"),
    ({"num_heads": 0}, "at least 1, got 0"),
    ({"num_heads": 5}, "num_heads = 5"),
    ({"act": "swish"}, "unknown act 'swish'"),
]


@pytest.mark.parametrize(("changes", "message"), ROWS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", ["encoder", "quantized_encoder"])
def test_encoders_name_what_lies_outside(op, backend, changes, message):
    inputs = encoder_inputs()
    if op == "quantized_encoder":
        generator = torch.Generator().manual_seed(3)
        quantized = ALL_CASES[op].make_inputs(((3, 5, 0, 2), 24, 2, 40, 1, 2), torch.float32, "cpu", generator)
        inputs = {**quantized, "wanted_rows": inputs["wanted_rows"], "cu_wanted": inputs["cu_wanted"]}
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**{**inputs, **changes}, backend=backend)


def test_rows_asked_of_a_sequence_without_tokens_are_computed_from_zeros():
    # As a model asks for the first token of a row that is padding alone: behind a long sequence, in a group of its own.
    generator = torch.Generator().manual_seed(3)
    inputs = ALL_CASES["encoder"].make_inputs(((300, 0, 0), 24, 2, 40, 1, 2), torch.float32, "cpu", generator)
    inputs["cu_wanted"] = torch.arange(4, dtype=torch.int32)
    found = [ops.encoder(**{**inputs, "wanted_rows": torch.tensor(rows)}) for rows in ([7, 299, 299], [7, 0, 12])]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(
        found[0], ops.encoder(**inputs | {"wanted_rows": torch.tensor([7, 0, 0])}, backend="reference")
    )


def test_max_seqlen_below_the_longest_sequence_is_named():
    q = torch.randn(5, 8)
    ends = torch.tensor([0, 1, 5], dtype=torch.int32)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="cu_seqlens_k has a sequence of 4 tokens, max_seqlen is 3"):
            ops.attention(q, q, q, ends, ends, 4, 3, 2, backend=backend)


def test_forward_mode_derivatives_are_refused():
    x, bias = torch.randn(3, 8), torch.randn(8)
    operators = (
        lambda x: ops.bias_gelu(x, bias),
        lambda x: OPERATORS.bias_gelu_fwd(x, bias, "relu", 0.0, None, "auto"),
    )
    for operator in operators:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            operator(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(operator, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():  # what has no tangent goes on
            assert torch.equal(operator(x), operator(x.clone()))
    linear = lambda x: OPERATORS.linear(x, torch.ones(4, 8), None)  # noqa: E731
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="linear has no forward-mode"):
        linear(forward_ad.make_dual(x, torch.ones_like(x)))


def test_transforms_of_torch_func_are_right_or_refused():
    x, bias = torch.randn(4, 3, 8), torch.randn(8)
    operator = lambda x: ops.bias_gelu(x, bias, "relu")  # noqa: E731
    assert torch.equal(torch.func.vmap(operator)(x), torch.relu(x + bias))
    assert torch.equal(torch.func.functionalize(operator)(x[0]), torch.relu(x[0] + bias))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: operator(x).sum())(x[0])


def test_lists_and_arrays_are_refused_by_type():
    x, bias = torch.randn(3, 8), torch.randn(8)
    for arguments in (([1.0], bias), (x, [1.0] * 8), (x.numpy(), bias), (x, None)):
        with pytest.raises(TypeError):
            ops.bias_gelu(*arguments)
    with pytest.raises(TypeError, match="hidden must be a dense tensor, got list"):
        ops.encoder(**encoder_inputs(hidden=[1.0]))
    with pytest.raises(TypeError, match=r"x must be floating-point, got torch\.int64"):
        ops.bias_gelu(torch.ones(3, 8, dtype=torch.int64), bias)


def test_parameters_may_be_replaced_while_they_are_read():
    if dispatch.why_not("encoder", "cpu", "cpp") is not None:
        pytest.skip("no C++ kernels here")
    inputs = encoder_inputs()
    weights = [torch.nn.Parameter(w, requires_grad=False) for w in inputs["weights"]]
    saved, stop = [w.detach().clone() for w in weights], threading.Event()

    def replace():
        while not stop.is_set():
            for weight, old in zip(weights, saved, strict=True):
                weight.data = old.clone()  # frees what was there, as model.to() does

    expected = ops.encoder(**inputs)
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(50):
            found = ops.encoder(**{**inputs, "weights": weights})
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("width", [16, 128, 768])
@pytest.mark.parametrize("value", [1e19, 1e25, -1e30, 1e37])
def test_rows_beyond_the_squares_of_float_are_those_of_torch(width, value):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(5, width, generator=generator)
    x[1] += 3.0
    x[1:4] *= value
    zeros, weight, ln_bias = torch.zeros(width), torch.rand(width, generator=generator) + 0.5, torch.randn(width)
    expected = torch.nn.functional.layer_norm(x, (width,), weight, ln_bias, 1e-12)
    found = ops.add_layer_norm(x, zeros, torch.zeros_like(x), weight, ln_bias, 1e-12)
    torch.testing.assert_close(found, expected, equal_nan=True)
    # Rows of one large element alone are not among them: torch's result depends on where it stands.
    x = x.abs()
    relu = torch.nn.functional.layer_norm(x, (width,), weight, ln_bias, 1e-12)
    torch.testing.assert_close(ops.gelu_layer_norm(x, zeros, weight, ln_bias, 1e-12, "relu"), relu, equal_nan=True)
