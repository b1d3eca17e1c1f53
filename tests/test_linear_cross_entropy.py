"""linear_cross_entropy against plain torch and float64, without memory for the logits, and its ignored and extreme rows."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
from albert_fast.testing import ALL_CASES, poison_empty
from albert_fast.testing.parity import check_backward, check_forward, device_of, parity_tests

OP = "linear_cross_entropy"
FORWARD, BACKWARD = parity_tests(OP)
CLEAR_REFS = Path("/proc/self/clear_refs")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 90), st.integers(1, 150), st.integers(1, 400), st.sampled_from([0.0, 0.2, 1.0]))
def test_any_shape(rows, width, vocabulary, labelled):
    for check in (check_forward, check_backward):
        check(ALL_CASES[OP], (rows, width, vocabulary), {"labelled": labelled}, torch.float32, "cpp")


def inputs(rows=37, width=16, vocabulary=307, dtype=torch.float32, labelled=0.5):
    made = ALL_CASES[OP].make_inputs((rows, width, vocabulary), dtype, generator=torch.Generator().manual_seed(3),
                                     labelled=labelled)  # fmt: skip
    del made["label_smoothing"]
    return made | {name: made[name].requires_grad_() for name in ("x", "weight", "bias")}


def run(made, backend, label_smoothing=0.0):
    """The loss, computed where `backend` runs."""
    tensors = {name: t.to(device_of(backend)) for name, t in made.items()}
    return ops.linear_cross_entropy(**tensors, label_smoothing=label_smoothing, backend=backend).cpu()


def gradients(made, backend, label_smoothing=0.0):
    """The loss, and its gradients of x, weight and bias."""
    loss = run(made, backend, label_smoothing)
    return loss, *torch.autograd.grad(loss, [made[name] for name in ("x", "weight", "bias")])


def test_the_reference_has_the_derivative_that_differences_give():
    made = inputs(7, 5, 11, torch.float64)
    labels = made.pop("labels")
    assert (labels == -100).any()
    for smoothing in (0.0, 0.2):
        function = lambda *tensors: ops.linear_cross_entropy(*tensors, labels, smoothing, backend="reference")  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, tuple(made.values()))


@BACKENDS
@pytest.mark.parametrize(("scale", "smoothing"), [(1, 0.0), (30, 0.0), (1, 0.1), (30, 0.1)])
def test_against_float64(backend, scale, smoothing):
    """A logit of size s is rounded by s * 2^-24 in its product and its sum, and its probability by as much of itself."""
    made = inputs()
    made["x"] = (made["x"].detach() * scale).requires_grad_()
    logits = made["x"] @ made["weight"].t() + made["bias"]
    allowed = 1e-6 + 2 * float(logits.detach().abs().max()) * 2**-24
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in made.items()
    }
    expected_ones = gradients(exact, "reference", smoothing)
    for actual, expected in zip(gradients(made, backend, smoothing), expected_ones, strict=True):
        assert (actual - expected).abs().max() <= allowed * expected.abs().max()


def largest_allocation(made, backend):
    """Bytes of the largest tensor that is allocated for the loss and its gradients, inside the operators as well."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients(made, backend)
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize(("backend", "holds_logits"), [("reference", True), ("cpp", False), ("triton", False)])
def test_no_tensor_is_as_large_as_the_logits(backend, holds_logits):
    made = inputs(rows=140, width=8, vocabulary=241, labelled=1.0)
    assert (largest_allocation(made, backend) >= 140 * 241 * 4) == holds_logits


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak of a process cannot be counted anew here")
def test_the_kernel_has_no_memory_for_the_logits_of_its_own():
    few = inputs(rows=300, width=8, vocabulary=4_001, labelled=1.0)
    gradients(few, "cpp")  # what the extension keeps for the next call
    many = inputs(rows=20_000, width=8, vocabulary=4_001, labelled=1.0)
    resident = resident_memory("VmRSS")
    CLEAR_REFS.write_text("5")
    gradients(many, "cpp")
    logits = 20_000 * 4_001 * 4
    assert resident_memory("VmHWM") - resident < logits / 8


def resident_memory(field):
    """Bytes of this process in memory: VmRSS now, VmHWM at its peak since CLEAR_REFS was written to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


@BACKENDS
@pytest.mark.parametrize("factor", [1e4, 1e30])
def test_huge_logits_do_not_overflow(backend, factor):
    made = inputs(rows=9, labelled=1.0)
    made["x"] = (made["x"].detach() * factor).requires_grad_()
    for value in gradients(made, backend):
        assert value.isfinite().all()


@BACKENDS
def test_a_saturated_label_has_no_loss(backend):
    """Logits up to 10,000, none but the label's above 0: the rounding of such numbers may not be left."""
    weight = torch.eye(8) * 10_000
    labels = torch.tensor([3, 0, 7])
    x = torch.eye(8)[labels].requires_grad_()
    loss = run({"x": x, "weight": weight, "bias": torch.zeros(8), "labels": labels}, backend)
    assert loss.abs() < 1e-6
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


@BACKENDS
def test_words_that_cannot_be_have_no_probability(backend):
    made = inputs(labelled=1.0)
    bias = made["bias"].detach().clone()
    bias[:200] = float("-inf")
    made |= {"bias": bias.requires_grad_(), "labels": made["labels"].clamp(min=200)}
    for actual, expected in zip(gradients(made, backend), gradients(made, "reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert run(made, backend).isfinite()


@BACKENDS
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_torch_s(backend, smoothing):
    made = inputs(rows=70, vocabulary=1301)
    exact = {name: t.detach().double() if t.is_floating_point() else t for name, t in made.items()}
    leaves = [exact[name].requires_grad_() for name in ("x", "weight", "bias")]
    logits = exact["x"] @ exact["weight"].t() + exact["bias"]
    expected = F.cross_entropy(logits, made["labels"], label_smoothing=smoothing)
    found = gradients(made, backend, smoothing)
    for actual, wanted in zip(found, (expected, *torch.autograd.grad(expected, leaves)), strict=True):
        torch.testing.assert_close(actual, wanted.float(), rtol=1e-5, atol=1e-7)


@BACKENDS
def test_what_all_logits_share_does_not_blur_a_smoothed_loss(backend):
    made, shared = inputs(vocabulary=3001), 2.0**16
    bias = (made["bias"].detach() * 3).round()  # whole numbers, which the shared one does not round
    made |= {"x": torch.zeros(37, 16), "bias": bias + shared}
    exact = F.cross_entropy(bias.double().expand(37, -1), made["labels"], label_smoothing=0.1)
    torch.testing.assert_close(run(made, backend, 0.1), exact.float(), rtol=2e-6, atol=0)


@BACKENDS
def test_a_smoothed_loss_is_infinite_with_a_word_that_cannot_be(backend):
    made = inputs(labelled=1.0)
    bias = made["bias"].detach().clone()
    bias[200:] = float("-inf")
    made |= {"bias": bias, "labels": made["labels"].clamp(max=199)}
    assert run(made, backend, 0.1).isposinf()


@BACKENDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_nan_makes_the_loss_nan_and_its_gradient_and_no_other_rows(backend, value):
    made = inputs(labelled=1.0)
    x = made["x"].detach().clone()
    x[5, 2] = value
    made["x"] = x.requires_grad_()
    loss, dx, _, _ = gradients(made, backend)
    assert loss.isnan()
    assert dx[5].isnan().all()
    assert dx[torch.arange(len(x)) != 5].isfinite().all()


@BACKENDS
def test_ignored_rows_are_not_read(backend):
    made = inputs()
    ignored = made["labels"] == -100
    expected = gradients(made, backend)
    made["x"] = made["x"].detach().masked_fill(ignored[:, None], float("nan")).requires_grad_()
    for actual, same in zip(gradients(made, backend), expected, strict=True):
        assert torch.equal(actual, same)
    assert (expected[1][ignored] == 0).all()


@BACKENDS
def test_without_a_label_all_is_zero(backend):
    for rows in (0, 5):
        made = inputs(rows, labelled=0.0)
        with poison_empty():
            for value in gradients(made, backend):
                assert (value == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_does_not_depend_on_the_number_of_threads(threads, dtype):
    made = inputs(600, 24, 1009, dtype)
    threads(1)
    expected = gradients(made, "cpp")
    for count in (2, 5):
        threads(count)
        for actual, same in zip(gradients(made, "cpp"), expected, strict=True):
            assert torch.equal(actual, same)


@BACKENDS
def test_strided_rows_and_columns(backend):
    made = inputs()
    expected = gradients(made, backend)
    wide = torch.randn(37, 50)
    wide[:, 3:19] = made["x"].detach()
    made |= {
        "x": wide[:, 3:19].requires_grad_(),
        "weight": made["weight"].detach().t().contiguous().t().requires_grad_(),
    }
    for actual, same in zip(gradients(made, backend), expected, strict=True):
        torch.testing.assert_close(actual, same)


@BACKENDS
def test_the_gradient_is_scaled(backend):
    made = inputs()
    loss, dx, _, _ = gradients(made, backend)
    (scaled,) = torch.autograd.grad(-3 * run(made, backend), made["x"])
    torch.testing.assert_close(scaled, -3 * dx)
    expected = F.cross_entropy(made["x"] @ made["weight"].t() + made["bias"], made["labels"])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("label", [-1, 307, 2**40 + 3])
def test_a_label_outside_the_vocabulary_is_named(backend, label):
    made = inputs()
    made["labels"][4] = label
    with pytest.raises(IndexError, match=rf"labels\[4\] is {label}, outside the vocabulary of 307"):
        ops.linear_cross_entropy(**made, backend=backend)


@pytest.mark.parametrize("label", [-1, 307, 2**40 + 3])
def test_a_label_outside_the_vocabulary_is_nan_where_nothing_is_waited_for(label):
    made = inputs()
    made["labels"][4] = label
    for value in gradients(made, "triton"):
        assert value.isnan().any()


def test_labels_of_fewer_bits_and_parameters_of_another_dtype():
    made = inputs()
    expected = ops.linear_cross_entropy(**made, backend="cpp")
    made |= {"labels": made["labels"].int(), "weight": made["weight"].double(), "bias": made["bias"].double()}
    assert ops.linear_cross_entropy(**made, backend="cpp") == expected


def test_bad_input_is_named():
    made = inputs()
    with pytest.raises(ValueError, match=r"expected bias of shape \(307,\).*\(306,\)"):
        ops.linear_cross_entropy(**made | {"bias": made["bias"][:306]})
    with pytest.raises(ValueError, match="vocabulary is empty"):
        ops.linear_cross_entropy(**made | {"weight": made["weight"][:0], "bias": made["bias"][:0]})
    with pytest.raises(ValueError, match=r"\(36,\)"):
        ops.linear_cross_entropy(**made | {"labels": made["labels"][:36]})
    with pytest.raises(ValueError, match="one device"):
        ops.linear_cross_entropy(**made | {"weight": made["weight"].to("meta")})
    with pytest.raises(TypeError, match="float32"):
        ops.linear_cross_entropy(**made | {"labels": made["labels"].float()})
    for smoothing in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got"):
            ops.linear_cross_entropy(**made, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="1025 columns"):
        ops.linear_cross_entropy(**inputs(2, 1025, 3), backend="triton")


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 6000])  # one program, two, one that counts in two steps
@pytest.mark.parametrize("labelled", [0.0, 0.4, 1.0])
def test_labelled_rows_are_found_in_order(rows, labelled):
    kernel = pytest.importorskip("albert_fast.kernels._labelled_rows")
    device = device_of("triton")
    labels = torch.randint(0, 50, (rows,)).where(torch.rand(rows) < labelled, -100)
    labels[::7] = labels[::7].where(labels[::7] == -100, 51)
    with poison_empty():
        found, targets, count = (t.cpu() for t in kernel.find_labelled(labels.to(device), 50, rows))
    wanted = (labels != -100).nonzero()[:, 0]
    assert count.item() == len(wanted)
    assert torch.equal(found[: len(wanted)].long(), wanted)
    assert torch.equal(targets[: len(wanted)].long(), labels[wanted].where(labels[wanted] < 50, -1))
