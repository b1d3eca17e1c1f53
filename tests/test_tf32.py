"""float32 is multiplied exactly, and as TF32 where torch is asked for it: every operator whose kernels multiply."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from albert_fast.kernels import _tuning, linear_gelu

from albert_fast import ops
from albert_fast.testing import ALL_CASES
from albert_fast.testing.gpu.tf32 import TF32Products, tf32_asked_for, truncated_to_tf32
from albert_fast.testing.parity import _gradients, check_backward, check_forward, make_inputs
from albert_fast.testing.tolerances import largest_error

# What is set, one after another in one process, and whether float32 is multiplied as TF32 then.
SETTINGS = """
from albert_fast.kernels._precision import multiplies_tf32, tf32_asked_for
import torch

cuda = torch.backends.cuda.matmul
asked = [tf32_asked_for()]
torch.set_float32_matmul_precision("high"); asked.append(tf32_asked_for())
torch.set_float32_matmul_precision("highest"); asked.append(tf32_asked_for())
torch.set_float32_matmul_precision("medium"); asked.append(tf32_asked_for())
cuda.fp32_precision = "ieee"; asked.append(tf32_asked_for())
cuda.allow_tf32 = True; asked.append(tf32_asked_for())
cuda.allow_tf32 = False; asked.append(tf32_asked_for())
cuda.fp32_precision = "tf32"; asked.append(tf32_asked_for())
assert multiplies_tf32(torch.float32) and not multiplies_tf32(torch.bfloat16) and not multiplies_tf32(torch.float64)
cuda.fp32_precision = "none"; asked.append(tf32_asked_for())
torch.backends.fp32_precision = "tf32"; asked.append(tf32_asked_for())
torch.backends.fp32_precision = "ieee"; asked.append(tf32_asked_for())
torch.backends.cudnn.fp32_precision = "tf32"; asked.append(tf32_asked_for())
print(*map(int, asked))
"""

# More than one tile of everything that a program walks over; few queries; chunks of columns; K of whole steps and of parts.
SHAPES = {
    "attention": [
        ((35, 0, 13), None, 2, 64),
        ((5, 16), (3, 40), 1, 128),
        ((40,), (67,), 1, 26),
        ((9,), (33,), 1, 200),
    ],
    "linear_gelu": [(70, 44, 144), (65, 64, 48)],
    "linear_cross_entropy": [(70, 64, 80), (13, 200, 77), (67, 33, 70)],
    "encoder": [((5, 3), 32, 2, 64, 1, 2), ((20, 1, 11), 48, 3, 80, 1, 1)],
}
# Every shape and every set of options of an operator; the other half of their combinations is thorough.
PARITY = [
    pytest.param(op, shape, options, marks=[pytest.mark.thorough] * ((row + column) % 2))
    for op, shapes in SHAPES.items()
    for row, shape in enumerate(shapes)
    for column, options in enumerate(ALL_CASES[op].options)
]
OPERATORS = pytest.mark.parametrize("op", SHAPES)


def test_whichever_way_it_was_asked_for():
    """Ways that exclude each other too: then some of torch's own getters raise."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", SETTINGS], capture_output=True, text=True)
    assert done.stdout.split() == list("010101010101"), done.stderr


@pytest.mark.parametrize(("op", "shape", "options"), PARITY, ids=str)
def test_errors_are_those_of_torch_with_factors_cut_alike(op, shape, options):
    with tf32_asked_for(), TF32Products():
        check_forward(ALL_CASES[op], shape, options, torch.float32, "triton")
        if ALL_CASES[op].gradients:
            check_backward(ALL_CASES[op], shape, options, torch.float32, "triton")


def results(op, dtype=torch.float32, exact=False):
    """The output and every gradient, by name; in float64 by torch if `exact`."""
    case = ALL_CASES[op]
    inputs = make_inputs(case, SHAPES[op][0], {}, dtype, "triton")
    run = case.exact if exact else lambda leaves: case.run(leaves, "triton")
    cotangent = torch.randn(case.output_like(inputs).shape, generator=torch.Generator().manual_seed(12))
    found = {"output": run(inputs)}
    if case.gradients:
        found |= _gradients(case, inputs, cotangent.to(found["output"].device), run)
    return found


@OPERATORS
def test_every_result_is_exact_by_default_and_tf32_where_asked_for(op):
    exact, default = results(op, exact=True), results(op)
    with tf32_asked_for():
        asked = results(op)
    again = results(op)
    for name, expected in exact.items():
        size = float(expected.abs().max())
        assert largest_error(default[name], expected) < 2**-18 * size, name
        assert 2**-15 * size < largest_error(asked[name], expected) < 2**-7 * size, name
        assert torch.equal(again[name], default[name]), f"{name}: the setting outlives its block"


@OPERATORS
def test_other_numbers_do_not_change(op):
    expected = results(op, torch.bfloat16)
    with tf32_asked_for():
        found = results(op, torch.bfloat16)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_gradient_goes_by_the_setting_of_its_own_time():
    found = []
    for forward, backward in ((False, False), (True, True), (False, True)):
        inputs = make_inputs(ALL_CASES["attention"], SHAPES["attention"][0], {}, torch.float32, "triton")
        inputs["v"].requires_grad_()
        with tf32_asked_for(forward):
            output = ALL_CASES["attention"].run(inputs, "triton")
        with tf32_asked_for(backward):
            found.append(torch.autograd.grad(output, inputs["v"], torch.ones_like(output))[0])
    exact, tf32, mixed = found
    # All that the backward has from the forward are the rows' sums, and those it takes again.
    assert (mixed - tf32).norm() < 0.1 * (exact - tf32).norm()


def test_a_compiled_operator_asks_when_it_runs():
    inputs = make_inputs(ALL_CASES["attention"], SHAPES["attention"][0], {}, torch.float32, "triton")
    compiled = torch.compile(ALL_CASES["attention"].function, fullgraph=True, backend="aot_eager")
    expected = [compiled(**inputs, backend="triton")]
    with tf32_asked_for():
        expected.append(ALL_CASES["attention"].run(inputs, "triton"))
        assert torch.equal(compiled(**inputs, backend="triton"), expected[1])
    assert torch.equal(compiled(**inputs, backend="triton"), expected[0])
    assert not torch.equal(*expected)


def test_the_tuner_keeps_them_apart(monkeypatch):
    keys = {False: [], True: []}
    for asked, found in keys.items():

        def choose(kernel, key, candidates, launch, found=found):
            found.append(f"{kernel} {key()}")
            return candidates[-1]

        monkeypatch.setattr(_tuning, "choose", choose)
        monkeypatch.setattr(_tuning, "known", lambda kernel, key, found=found: found.append(f"{kernel} {key}"))
        with tf32_asked_for(asked):
            results("attention")
            assert not ops.kernel_is_faster(torch.float32, 7, (32, 64), None)
            with monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "is_cuda", True)
                x = make_inputs(ALL_CASES["linear_gelu"], (3, 16, 32), {}, torch.float32, "triton")
                linear_gelu.linear_gelu_fwd(*x.values(), keep_sums=False)
    assert [key.split()[0] for key in keys[False]] == [
        *["attention_fwd"] * 2, "attention_bwd_dq", "attention_bwd_dkdv", "encoder", "linear_gelu_fwd",
    ]  # fmt: skip
    assert keys[True] == [key.replace("float32", "tf32") for key in keys[False]]
    assert all("float32" in key for key in keys[False])


def test_what_a_tensor_core_reads():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, -(1 + 2**-23), float("inf"), float("nan"), 2.0**-126, 0.0])
    cut = truncated_to_tf32(x)
    assert cut[:5].tolist() == [1.0, 1 + 2**-10, 1.0, -1.0, float("inf")]
    assert cut[5].isnan()
    assert cut[6:].tolist() == [2.0**-126, 0.0]
