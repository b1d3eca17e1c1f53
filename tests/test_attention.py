"""attention on every backend against plain torch: unequal sequences, dropout, gradients, and where NaN stays."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
from albert_fast.layers.packing import longest_first
from albert_fast.testing import ALL_CASES, poison_empty
from albert_fast.testing.parity import check_backward, check_forward, device_of, float16_if_thorough, parity_tests

FORWARD, BACKWARD = parity_tests("attention")


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])


def packed(lengths, heads=2, head_dim=16):
    width = heads * head_dim
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), 3 * width)
    return qkv, cu_seqlens


def run(qkv, cu_seqlens, backend, heads=2, **options):
    longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    device = device_of(backend)
    qkv, cu_seqlens = qkv.to(device), cu_seqlens.to(device)
    if options.get("sequence_order") is not None:
        options["sequence_order"] = options["sequence_order"].to(device)
    q, k, v = qkv.split(qkv.shape[1] // 3, dim=1)
    return ops.attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, heads, backend=backend, **options).cpu()


@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (3, 80), (2, 16)])
def test_heads_that_begin_at_words_are_not_copied(monkeypatch, heads, head_dim):
    pytest.importorskip("triton")
    from albert_fast.kernels import attention, attention_bwd

    for module in (attention, attention_bwd):
        monkeypatch.setattr(module, "padded_heads", None)
    qkv, cu_seqlens = packed([3, 2], heads, head_dim)
    device = device_of("triton")
    qkv = qkv.to(device).requires_grad_()
    q, k, v = qkv.split(heads * head_dim, dim=1)
    ends = cu_seqlens.to(device)
    ops.attention(q, k, v, ends, ends, 3, 3, heads, backend="triton").sum().backward()


@pytest.mark.parametrize("head_dim", [1, 37, 40])
def test_padding_of_heads_changes_no_bit(head_dim):
    """40 numbers are words, and three heads of them rows that Triton takes for any."""
    pytest.importorskip("triton")
    from albert_fast.kernels.attention import attention_fwd, heads_in_words, own_columns, padded_heads

    device = device_of("triton")
    qkv, ends = packed([9, 4], 3, head_dim)
    q, k, v = qkv.to(device).split(3 * head_dim, dim=1)
    assert not heads_in_words(3, q, k, v)
    schedule = (ends.to(device), ends.to(device), None, 9, 9, 3, 0.3)
    out, lse = attention_fwd(q, k, v, *schedule)
    wide = [padded_heads(t, 3) for t in (q, k, v)]
    assert heads_in_words(3, *wide)
    wide_out, wide_lse = attention_fwd(*wide, *schedule)
    assert torch.equal(out, own_columns(wide_out, 3, head_dim).flatten(1))
    assert not wide_out.unflatten(1, (3, -1))[..., head_dim:].any()
    assert torch.equal(lse, wide_lse)
    assert out.is_contiguous()


@BACKENDS
def test_a_row_of_weights_sums_to_one(backend):
    qkv, cu_seqlens = packed([9, 1, 5])
    qkv[:, 64:] = 1.0  # all values are one, so is every weighted mean of them
    torch.testing.assert_close(run(qkv, cu_seqlens, backend), torch.ones(15, 32))


@BACKENDS
def test_scores_may_be_shifted(backend):
    qkv, cu_seqlens = packed([7, 12])
    shifted = qkv.clone()
    shifted[:, 32:64] += 3.0  # the same vector added to every key shifts all scores of a query alike
    torch.testing.assert_close(run(shifted, cu_seqlens, backend), run(qkv, cu_seqlens, backend), atol=2e-5, rtol=1e-4)


@BACKENDS
def test_huge_scores_do_not_overflow(backend):
    qkv, cu_seqlens = packed([6])
    qkv[:, :64] *= 1e3
    assert run(qkv, cu_seqlens, backend).isfinite().all()


@BACKENDS
def test_nan_stays_in_its_sequence(backend):
    qkv, cu_seqlens = packed([4, 6])
    qkv[1, 40] = float("nan")
    out = run(qkv, cu_seqlens, backend)
    assert out[:4, :16].isnan().all()
    assert out[4:].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_same_whatever_else_is_in_the_batch(backend):
    qkv, cu_seqlens = packed([33, 5, 70])
    alone = run(qkv[33:38], torch.tensor([0, 5], dtype=torch.int32), backend)
    assert torch.equal(run(qkv, cu_seqlens, backend)[33:38], alone)


@BACKENDS
def test_dropout_is_replayed_alike_everywhere(backend):
    qkv, cu_seqlens = packed([5, 8])
    options = {"dropout_p": 0.4, "seed": torch.tensor(2**62 + 77)}
    expected = run(qkv, cu_seqlens, "reference", **options)
    torch.testing.assert_close(run(qkv, cu_seqlens, backend, **options), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, run(qkv, cu_seqlens, "reference"))


def gradients(qkv, cu_seqlens, backend, **options):
    """(T, 3H), the gradient of q, k and v side by side for a fixed gradient of the output."""
    leaf = qkv.detach().requires_grad_()
    out = run(leaf, cu_seqlens, backend, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return torch.autograd.grad(out, leaf, grad)[0]


# More than one block of queries and of keys in every dtype; heads that are padded, multiplied in chunks, or as they are.
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (((150, 0, 20), None, 1, 16), {"dropout_p": 0.2}),
        (((131,), None, 1, 64), {"sharpness": 40.0}),
        (((1, 2), (70, 140), 2, 64), {"dropout_p": 0.2}),
        (((66,), (3,), 1, 128), {}),
        (((9,), (70,), 1, 200), {"dropout_p": 0.2}),
        (((5, 3), (0, 2), 2, 1), {}),
    ],
    ids=str,
)
@float16_if_thorough()
def test_triton_gradients_over_several_blocks(shape, options, dtype):
    check_backward(ALL_CASES["attention"], shape, options, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("number", [1, 2])
def test_every_candidate_of_the_tuner_computes_the_same(dtype, number, monkeypatch):
    _tuning = pytest.importorskip("albert_fast.kernels._tuning")
    taken = set()

    def choose(kernel, key, candidates, launch):
        if number < len(candidates):
            taken.add(kernel)
        return candidates[min(number, len(candidates) - 1)]

    monkeypatch.setattr(_tuning, "choose", choose)
    check_forward(ALL_CASES["attention"], ((70,), (67,), 1, 64), {}, dtype, "triton")
    check_backward(ALL_CASES["attention"], ((70,), (67,), 1, 64), {"dropout_p": 0.2}, dtype, "triton")
    assert taken or number > 1


@BACKENDS
def test_gradients_are_the_same_bits_again_and_for_any_order(backend):
    qkv, cu_seqlens = packed([18, 0, 3, 7])
    options = {"dropout_p": 0.3, "seed": torch.tensor(77)}
    first = gradients(qkv, cu_seqlens, backend, **options)
    assert torch.equal(gradients(qkv, cu_seqlens, backend, **options), first)
    order = longest_first(cu_seqlens)
    assert order.tolist() == [0, 3, 2, 1]
    out = run(qkv, cu_seqlens, backend, **options)
    for turns in (order, order.flip(0)):
        assert torch.equal(gradients(qkv, cu_seqlens, backend, sequence_order=turns, **options), first)
        assert torch.equal(run(qkv, cu_seqlens, backend, sequence_order=turns, **options), out)


@BACKENDS
def test_the_gradient_of_nan_stays_in_its_sequence(backend):
    qkv, cu_seqlens = packed([4, 20, 6])
    expected = gradients(qkv, cu_seqlens, backend)
    qkv[5, 40] = float("nan")  # a key of the second sequence's first head
    actual = gradients(qkv, cu_seqlens, backend)
    for rows in (slice(0, 4), slice(24, 30)):
        assert torch.equal(actual[rows], expected[rows])
    assert actual[4:24, :16].isnan().all()
    assert torch.equal(actual[4:24, 16:32], expected[4:24, 16:32]), "the other head's"


@BACKENDS
def test_one_key_alone_takes_no_gradient_through_its_score(backend):
    qkv, cu_seqlens = packed([1, 1, 1])
    for options in ({}, {"dropout_p": 0.4, "seed": torch.tensor(3)}):
        assert not gradients(qkv, cu_seqlens, backend, **options)[:, :64].any()


@BACKENDS
@pytest.mark.parametrize("factor", [2**10, 2**20, 2**27, 2**34])
def test_tied_keys_share_the_gradient_however_large_the_scores(backend, factor):
    """Whole numbers and a scale of 1 / 4: every order of summation gives the same scores, so the exact answer is one for all."""
    generator = torch.Generator().manual_seed(7)
    q, k = (torch.randint(-4, 5, (40, 16), generator=generator).float() for _ in "qk")
    q, v = q * factor, torch.randn(40, 16, generator=generator)
    k[20:] = k[:20].clone()  # every key twice, 20 rows apart
    cotangent = torch.randn(40, 16, generator=generator)
    ends = torch.tensor([0, 40], dtype=torch.int32, device=device_of(backend))

    def gradients_of(run, dtype):
        leaves = [t.to(device_of(backend), dtype).requires_grad_() for t in (q, k, v)]
        return [g.cpu() for g in torch.autograd.grad(run(*leaves), leaves, cotangent.to(device_of(backend), dtype))]

    actual = gradients_of(lambda *qkv: ops.attention(*qkv, ends, ends, 40, 40, 1, backend=backend), torch.float32)
    eager = ALL_CASES["attention"].eager
    expected = gradients_of(lambda *qkv: eager(*qkv, ends, ends, 40, 40, 1, 0.25, 0.0, None), torch.float64)
    # dQ is a sum over tied keys of terms that cancel: held against these terms, of the size of the keys.
    for name, size in (("q", 4.0), ("k", 4.0 * factor), ("v", 1.0)):
        error = (actual["qkv".index(name)] - expected["qkv".index(name)]).abs().max()
        assert error <= 4e-6 * size, f"gradient of {name}: {error}"


@BACKENDS
def test_a_negative_or_zero_scale_is_a_scale(backend):
    qkv, cu_seqlens = packed([9, 5])
    for scale in (-0.7, 0.0):
        expected = gradients(qkv, cu_seqlens, "reference", softmax_scale=scale)
        torch.testing.assert_close(
            gradients(qkv, cu_seqlens, backend, softmax_scale=scale), expected, atol=1e-5, rtol=1e-4
        )
        out = run(qkv, cu_seqlens, backend, softmax_scale=scale)
        torch.testing.assert_close(out, run(qkv, cu_seqlens, "reference", softmax_scale=scale), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpp", "triton"])  # torch sums differently over other strides
def test_nothing_beside_the_rows_is_read(backend):
    qkv, cu_seqlens = packed([5, 0, 21])
    # Made where it is read: of a part of a matrix `Tensor.to` another device makes one without surroundings.
    around = torch.full((26 + 70, 96 + 33), float("nan"), device=device_of(backend))
    around[:26, :96] = qkv
    with poison_empty():
        actual = gradients(around[:26, :96], cu_seqlens, backend)
    expected = gradients(qkv, cu_seqlens, backend)
    if around.is_cuda:  # where the alignment of a row may decide in which order its numbers are added
        torch.testing.assert_close(actual.cpu(), expected, atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(actual, expected)


def test_a_gradient_compiles_with_its_forward():
    qkv, cu_seqlens = (x.to(device_of("triton")) for x in packed([3, 6]))
    compiled = torch.compile(partial(run, backend="triton", heads=2), fullgraph=True, backend="aot_eager")

    def gradient(function):
        leaf = qkv.clone().requires_grad_()
        return torch.autograd.grad(function(leaf, cu_seqlens).square().sum(), leaf)[0]

    torch.testing.assert_close(gradient(compiled), gradient(partial(run, backend="reference")), atol=1e-5, rtol=1e-4)


def test_cu_seqlens_may_be_strided():
    qkv, cu_seqlens = packed([4, 5])
    strided = torch.tensor([0, 77, 4, 77, 9, 77], dtype=torch.int32)[::2]
    assert torch.equal(run(qkv, strided, "cpp"), run(qkv, cu_seqlens, "cpp"))


@settings(max_examples=40, deadline=None)
# Of heads of one or two columns the gradient is a handful of numbers, and by chance torch may round all of them well.
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5), st.integers(1, 3), st.integers(3, 70))
def test_any_lengths_heads_and_widths(lengths, heads, head_dim):
    shape = (tuple(q for q, _ in lengths), tuple(k for _, k in lengths), heads, head_dim)
    check_forward(ALL_CASES["attention"], shape, {}, torch.float32, "cpp")
    check_backward(ALL_CASES["attention"], shape, {}, torch.float32, "cpp")


def test_bad_input_is_named():
    qkv, cu_seqlens = packed([3])
    with pytest.raises(ValueError, match="multiple of num_heads"):
        run(qkv, cu_seqlens, "auto", heads=3)
    with pytest.raises(ValueError, match="int32"):
        run(qkv, cu_seqlens.long(), "auto")
    with pytest.raises(ValueError, match=r"cu_seqlens.*0 to 3"):
        run(qkv, torch.tensor([0, 4], dtype=torch.int32), "auto")
    with pytest.raises(ValueError, match=r"expected sequence_order of shape \(1,\)"):
        run(qkv, cu_seqlens, "auto", sequence_order=cu_seqlens)
    with pytest.raises(ValueError, match=r"sequence_order must name every sequence once, got \[1\]"):
        run(qkv, cu_seqlens, "auto", sequence_order=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected k of shape .* in torch.float32, got .* in torch.float64"):
        ops.attention(qkv, qkv.double(), qkv.double(), cu_seqlens, cu_seqlens, 3, 3, 2)
    assert run(qkv[:0], torch.zeros(1, dtype=torch.int32), "auto").shape == (0, 32)
