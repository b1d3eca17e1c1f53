"""Products outside fused operators: what they are equal to, in which batches, and what they leave in memory."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from albert_fast import (
    ALBERTConfig,
    ALBERTForMaskedLM,
    ALBERTForMultipleChoice,
    ALBERTForPreTraining,
    ALBERTForQuestionAnswering,
    ALBERTForSequenceClassification,
    ALBERTForTokenClassification,
    ALBERTModel,
)
from albert_fast.quantization.calibration import quantize
from albert_fast.runtime import dispatch
from albert_fast.runtime import linear as gemm

needs_extension = pytest.mark.skipif(not dispatch.has_extension(), reason="needs the C++ extension")
HEADS = (
    ALBERTModel, ALBERTForMaskedLM, ALBERTForPreTraining, ALBERTForSequenceClassification, ALBERTForTokenClassification,
    ALBERTForQuestionAnswering, ALBERTForMultipleChoice,
)  # fmt: skip
# Widths that are no multiple of a vector or a panel, and products with enough work for several tasks.
CONFIG = ALBERTConfig(
    vocab_size=211,
    embedding_size=36,
    hidden_size=120,
    num_attention_heads=4,
    num_hidden_layers=2,
    intermediate_size=200,
)


def made(rows, columns, depth):
    x, bias = torch.randn(rows, depth), torch.randn(columns)
    return x, nn.Parameter(torch.randn(columns, depth)), bias


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 1, 1), (1, 3, 5), (3, 17, 33), (85, 2, 64), (200, 129, 37), (90, 300, 128)]
)
def test_a_product_without_a_gradient_is_that_of_float64(rows, columns, depth, tanh):
    x, weight, bias = made(rows, columns, depth)
    function = gemm.linear_tanh if tanh else gemm.linear
    for b in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        if tanh:
            exact = exact.tanh()
        with torch.no_grad():
            wide = torch.randn(rows, 2 * depth)
            wide[:, :depth] = x
            for left in (x, wide[:, :depth], x.t().contiguous().t()):
                out = function(left, weight, b)
                assert out.is_contiguous()
                torch.testing.assert_close(out.double(), exact, atol=2e-6 * depth, rtol=1e-5)


@needs_extension
def test_tanh_of_any_float():
    weight, x = nn.Parameter(torch.ones(1, 1)), torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-38, 38, 500)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])])[:, None]
    with torch.no_grad():
        out = gemm.linear_tanh(x, weight)
    torch.testing.assert_close(out.double(), x.double().tanh(), atol=1e-38, rtol=4e-7, equal_nan=True)


@needs_extension
def test_a_row_is_the_same_beside_any_rows_and_on_any_threads(threads):
    x, weight, bias = made(181, 333, 257)
    with torch.no_grad():
        whole = gemm.linear(x, weight, bias)
        for count, (begin, rows) in itertools.product((1, 2, 3), ((0, 1), (5, 2), (80, 7), (7, 100), (180, 1))):
            threads(count)
            assert torch.equal(gemm.linear(x[begin : begin + rows], weight, bias), whole[begin : begin + rows])


@needs_extension
def test_a_changed_weight_is_packed_again():
    x, weight, bias = made(4, 40, 24)
    with torch.no_grad():
        before = gemm.linear(x, weight, bias)
        weight.mul_(2.0)
        torch.testing.assert_close(gemm.linear(x, weight), 2 * (before - bias))
        weight.data = torch.randn(40, 24)
        torch.testing.assert_close(gemm.linear(x, weight), F.linear(x, weight))
        weight.data.neg_()  # the version stays, the samples change
        torch.testing.assert_close(gemm.linear(x, weight), F.linear(x, weight))


@needs_extension
def test_a_misfit_is_an_error():
    x, weight, bias = made(4, 40, 24)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"expected x of shape \(4, 24\).*\(4, 23\)"):
            gemm.linear(x[:, :23].contiguous(), weight, bias)
        with pytest.raises(ValueError, match=r"expected bias of shape \(40,\).*\(39,\)"):
            gemm.linear(x, weight, bias[:39])


@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 7, 5), (3, 1536, 1024), (37, 512, 384), (129, 256, 300), (1030, 128, 96)]
)
def test_gradients_of_any_number_of_rows(rows, columns, depth):
    leaves = [t.detach().requires_grad_() for t in made(rows, columns, depth)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    cotangent = torch.randn(rows, columns)
    out, expected = gemm.linear(*leaves), F.linear(*exact)
    torch.testing.assert_close(out.double(), expected, atol=2e-6 * depth, rtol=1e-5)
    out.backward(cotangent)
    expected.backward(cotangent.double())
    for leaf, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), other.grad, atol=2e-6 * (rows + columns), rtol=1e-5)


def test_second_derivatives():
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (3, 4), (3,))]
    assert torch.autograd.gradgradcheck(gemm.linear, leaves)
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (5, 4))]
    assert torch.autograd.gradgradcheck(gemm.weight_gradient, weights)


def test_row_counts_are_rounded_up_to_few():
    steps = [gemm._step(rows) for rows in range(1, 20_000)]
    rounded = {-(-rows // step) * step for rows, step in enumerate(steps, 1)}
    assert len(rounded) < 130
    assert all(step <= max(16, rows / 16) and step < 2 * rows for rows, step in enumerate(steps, 1))


GROWTH = """
import random, sys, torch
from torch import nn
from albert_fast.runtime import linear as gemm

def resident():  # in MiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
gradient = sys.argv[1] == "gradient"
weight = nn.Parameter(torch.randn(512, 64))
def call(rows):
    with torch.set_grad_enabled(gradient):
        out = gemm.linear(torch.randn(rows, 64), weight)
    if gradient:
        out.sum().backward()
        weight.grad = None
gemm._SMALL = 0  # all by oneDNN
rows = list(range(1, 301))
random.Random(3).shuffle(rows)
for count in (300, 299, 17):
    call(count)
before = resident()
for count in rows:
    call(count)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["gradient", "inference"])
def test_row_counts_leave_no_memory(mode):
    done = subprocess.run([sys.executable, "-c", GROWTH, mode], capture_output=True, text=True, check=True)
    # Half a megabyte for each count and product would be 150 to 400.
    assert float(done.stdout) < (60 if mode == "gradient" else 20)


def tensors(output):
    return {name: output[name] for name in output.keys()}  # noqa: SIM118


def sequences(model, generator):
    """Random sequences of 1 to 70 tokens as the model takes one: ids (1, S), or (1, 2, S) for choices."""
    choices = isinstance(model, ALBERTForMultipleChoice)
    lengths = [1, 2, 3, *torch.randint(1, 70, (9,), generator=generator).tolist()]
    shape = (1, 2) if choices else (1,)
    return [torch.randint(1, CONFIG.vocab_size, (*shape, length), generator=generator) for length in lengths]


@needs_extension
@pytest.mark.parametrize("precision", ["fp32", "int16", "int8"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_sequence_is_bitwise_the_same_alone_in_any_batch_and_on_any_threads(kind, precision, threads):
    generator = torch.Generator().manual_seed(11)
    model = kind(CONFIG).eval()
    if precision != "fp32":
        quantize(model.base_model, precision)
    single = sequences(model, generator)
    with torch.inference_mode():
        alone = [tensors(model(ids)) for ids in single]
        assert all(alone)
        for count in (1, 2, 3):
            threads(count)
            for size in (1, 4, len(single)):
                chosen = torch.randperm(len(single), generator=generator)[:size].tolist()
                longest = max(single[i].shape[-1] for i in chosen)
                ids = torch.cat([F.pad(single[i], (0, longest - single[i].shape[-1])) for i in chosen])
                mask = torch.cat(
                    [F.pad(torch.ones_like(single[i]), (0, longest - single[i].shape[-1])) for i in chosen]
                )
                for name, batch in tensors(model(ids, mask)).items():
                    for row, i in zip(batch, chosen, strict=True):
                        expected = alone[i][name][0]
                        real = row[: len(expected)] if expected.shape != row.shape else row
                        assert torch.equal(real, expected), (name, count, size, single[i].shape)
