"""attention as decoders call it: causal, and with keys in caches that grow in place and that sequences share."""

import itertools

import pytest
import torch

from albert_fast import ops
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_backward, check_forward, device_of, float16_if_thorough, make_inputs

CASE = ALL_CASES["attention"]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])


def packed(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def call(q, k, v, lengths_q, lengths_k, backend, **options):
    device = device_of(backend)
    ends = packed(lengths_q, device), packed(lengths_k, device)
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    q, k, v = (t.to(device) for t in (q, k, v))
    return ops.attention(q, k, v, *ends, *longest, 2, backend=backend, **options).cpu()


def random_rows(count, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


@BACKENDS
@pytest.mark.parametrize("lengths", [((5,), (5,)), ((3, 1), (9, 4)), ((70,), (70,))], ids=str)
def test_a_causal_query_is_the_last_query_of_a_shorter_sequence(lengths, backend):
    (lengths_q, lengths_k), first_q, first_k = lengths, 0, 0
    q, k, v = random_rows(sum(lengths_q)), random_rows(sum(lengths_k)), random_rows(sum(lengths_k) + 1)[1:]
    causal = call(q, k, v, lengths_q, lengths_k, backend, causal=True)
    for queries, keys in zip(lengths_q, lengths_k, strict=True):
        for i in {0, queries // 2, queries - 1}:
            seen = slice(first_k, first_k + i + 1 + keys - queries)
            one = q[first_q + i : first_q + i + 1]
            alone = call(one, k[seen], v[seen], [1], [seen.stop - seen.start], backend)
            torch.testing.assert_close(causal[first_q + i : first_q + i + 1], alone, atol=1e-5, rtol=1e-5)
        first_q, first_k = first_q + queries, first_k + keys


@BACKENDS
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(backend):
    q, k, v = (random_rows(n).requires_grad_() for n in (20, 3, 3))
    ends, device = (packed([20, 0]), packed([3, 0])), device_of(backend)
    arguments = (*(t.to(device) for t in (q, k, v, *ends)), None, 20, 3, 2, 0.25, 0.0, None, True, None, backend)
    out, lse = torch.ops.albert_fast.attention_fwd(*arguments)
    assert not out[:17].any()
    assert (out[17:] != 0).all()
    assert torch.equal(lse.isneginf().cpu(), (torch.arange(20) < 17).expand(2, 20))
    assert lse[:, 17:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not dq[:17].any()
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
    assert dv.any()


@BACKENDS
def test_causal_attention_is_what_it_is_without_the_later_tokens(backend):
    q, k, v = (random_rows(40 + n)[:40] for n in range(3))
    whole = call(q, k, v, [40], [40], backend, causal=True)
    torch.testing.assert_close(whole[:25], call(q[:25], k[:25], v[:25], [25], [25], backend, causal=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("options", [{"dropout_p": 0.2}, {"sharpness": 40.0}], ids=str)
def test_several_blocks_of_queries(backend, options):
    shape = ((150, 0, 20, 70), (150, 3, 9, 131), 2, 26)
    check_forward(CASE, shape, {"causal": True, **options}, torch.float32, backend)
    check_backward(CASE, shape, {"causal": True, **options}, torch.float32, backend)


# Keys that are shared, absent, behind one another in reverse; one query, as in decoding, several, and more than keys.
CACHED_SHAPES = (
    ((1, 1, 1, 1), (7, 7, 0, 33), 2, 16),
    ((1,) * 5, (19, 1, 64, 64, 17), 3, 26),
    ((3, 0, 20), (9, 2, 5), 2, 40),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.2}], ids=str)
@pytest.mark.parametrize("shape", CACHED_SHAPES, ids=str)
@BACKENDS
def test_keys_of_a_cache(backend, shape, options, dtype):
    check_forward(CASE, shape, {"cached": True, **options}, dtype, backend)


@BACKENDS
def test_keys_of_a_cache_give_the_logsumexp_of_packed_keys(backend):
    shape = CACHED_SHAPES[1]
    kept, apart = (make_inputs(CASE, shape, {"cached": cached}, torch.float32, backend) for cached in (True, False))
    # Neighbours of one length share their keys: the packed keys of the second are those of the first.
    apart["k"][84:148], apart["v"][84:148] = apart["k"][20:84].clone(), apart["v"][20:84].clone()
    lse = []
    for inputs in (kept, apart):
        tensors = (inputs[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
        numbers = 1, 64, 3, inputs["softmax_scale"], 0.0, None, False
        lse.append(torch.ops.albert_fast.attention_fwd(*tensors, None, *numbers, inputs.get("key_lengths"), backend)[1])
    torch.testing.assert_close(*lse, atol=1e-5, rtol=1e-5)


def operator_arguments(backend, options):
    inputs = make_inputs(CASE, CACHED_SHAPES[2], options, torch.float32)
    if "cached" not in options:
        inputs.update({name: inputs[name].clone().requires_grad_() for name in "qkv"})
    schema = torch.ops.albert_fast.attention_fwd.default._schema
    values = {**inputs, "backend": backend}
    return tuple(values.get(argument.name) for argument in schema.arguments)


@pytest.mark.parametrize("options", [{"causal": True}, {"cached": True}], ids=str)
@BACKENDS
def test_opcheck(backend, options):
    torch.library.opcheck(torch.ops.albert_fast.attention_fwd.default, operator_arguments(backend, options))


def test_keys_of_a_cache_have_no_gradient():
    inputs = make_inputs(CASE, CACHED_SHAPES[0], {"cached": True}, torch.float32)
    leaf = inputs["q"].clone().requires_grad_()
    with pytest.raises(ValueError, match="key_lengths has no gradient"):
        ops.attention(**{**inputs, "q": leaf})
    with torch.no_grad():
        assert torch.equal(ops.attention(**{**inputs, "q": leaf}), ops.attention(**inputs))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("begins", "lengths", "message"),
    [
        ([0, 6], [5, 5], r"sequence 1 begin at 6 .* and are 5 .* in the 10 tokens"),
        ([-1, 0], [5, 5], r"sequence 0 begin at -1"),
        ([0, 2**31 - 1], [5, 2**31 - 1], r"sequence 1 begin at 2147483647"),
        ([0, 0], [5, -1], r"sequence 1 .* are -1"),
        ([0, 0], [5, 8], r"sequence 1 has 8 keys .*, max_seqlen is 7"),
    ],
)
def test_bad_ranges_of_keys_are_named(begins, lengths, message, backend):
    begins, lengths = (torch.tensor(numbers, dtype=torch.int32) for numbers in (begins, lengths))
    q, k = random_rows(2), random_rows(10)
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, k, packed([1, 1]), begins, 1, 7, 2, key_lengths=lengths, backend=backend)


def test_bad_key_lengths_are_named():
    q, k = random_rows(2), random_rows(10)
    lengths = torch.tensor([5, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q of shape \(4,\)"):
        ops.attention(q, k, k, packed([1, 1]), packed([5, 5]), 1, 5, 2, key_lengths=lengths)
    with pytest.raises(ValueError, match=r"key_lengths of shape \(2,\) in torch.int32"):
        ops.attention(q, k, k, packed([1, 1]), packed([5, 5])[:2], 1, 5, 2, key_lengths=lengths.long())


# Blocks of queries and keys that lie below, on and above the diagonal, in every dtype; more queries than keys; no keys.
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (((150, 0, 20), None, 1, 16), {"causal": True, "dropout_p": 0.2}),
        (((131,), None, 1, 64), {"causal": True, "sharpness": 40.0}),
        pytest.param(
            ((1, 2, 33), (70, 140, 129), 2, 64), {"causal": True, "dropout_p": 0.2}, marks=pytest.mark.thorough
        ),
        (((1, 33), (70, 80), 1, 64), {"causal": True, "dropout_p": 0.2}),
        (((110,), (40,), 1, 128), {"causal": True}),  # the first block of queries sees no key
        (((5, 3), (0, 2), 2, 1), {"causal": True}),
    ],
    ids=str,
)
@float16_if_thorough()
def test_triton_over_several_blocks(shape, options, dtype):
    check_forward(CASE, shape, options, dtype, "triton")
    check_backward(CASE, shape, options, dtype, "triton")


def test_triton_reads_no_key_outside_the_tensors_whatever_the_ranges_hold():
    attention_fwd = pytest.importorskip("albert_fast.kernels.attention").attention_fwd
    device, around = device_of("triton"), torch.full((30, 32), float("nan"))
    around[10:20] = random_rows(10)
    q, k = random_rows(5).to(device), around.to(device)[10:20]
    begins = torch.tensor([-5, 2**31 - 1, 3, -(2**31), 8], dtype=torch.int32, device=device)
    lengths = torch.tensor([10, 5, 2**31 - 1, -1, 2], dtype=torch.int32, device=device)
    ends = packed([1] * 5, device)
    out, _ = attention_fwd(q, k, k, ends, begins, None, 1, 10, 2, 0.25, key_lengths=lengths)
    assert out.isfinite().all()
    expected = ops.attention_ref(q[4:], k[8:], k[8:], packed([1], device), packed([2], device), 2, 0.25)
    torch.testing.assert_close(out[4:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"causal": True}, {"cached": True}], ids=str)
def test_the_result_does_not_depend_on_the_number_of_threads(threads, options):
    shape = CACHED_SHAPES[1] if "cached" in options else ((150, 0, 20), (150, 3, 9), 1, 16)
    inputs = make_inputs(CASE, shape, options, torch.float32)
    threads(1)
    expected = ops.attention(**inputs)
    for count in (2, 5):
        threads(count)
        assert torch.equal(ops.attention(**inputs), expected)
