"""Triton kernels reach elements that lie more than 2^31 elements from the start of a tensor."""

from __future__ import annotations

import pytest
import torch

from albert_fast import ops
from albert_fast.testing.parity import device_of

pytest.importorskip("triton")

import triton
import triton.language as tl
from albert_fast.kernels._matmul import tile_product

pytestmark = pytest.mark.xdist_group("large offsets")  # one after another: each takes up to 12 GiB of a GPU

DEVICE = device_of("triton")
ROWS, WIDTH = 3, 32
STRIDE = 2**30 + 16  # fits 32 bits, twice of it does not


@pytest.fixture(autouse=True)
def freed_memory():
    """A GPU has room for a few such tensors, and other processes test on it, too."""
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def far_rows(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(ROWS, WIDTH) random rows STRIDE elements apart: 4 GiB of address space of which three pages are touched."""
    try:
        x = torch.empty((ROWS - 1) * STRIDE + WIDTH, dtype=dtype, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for a tensor of 2^31 elements: {error}")
    return x.as_strided((ROWS, WIDTH), (STRIDE, 1)).copy_(torch.randn(ROWS, WIDTH, device=DEVICE))


def vector() -> torch.Tensor:
    return torch.randn(WIDTH, dtype=torch.bfloat16, device=DEVICE)


def assert_same(op, *arguments, **options):
    exact = op(*arguments, **options, backend="reference").float()
    torch.testing.assert_close(op(*arguments, **options, backend="triton").float(), exact, rtol=2**-7, atol=2**-7)


def assert_same_gradients(op, far, *arguments):
    """Of the Triton kernels and the reference, with the operand of index `far` and the cotangent far apart, too."""
    cotangent, found = far_rows(), {}
    for backend in ("triton", "reference"):
        leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        differentiated = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        out = op(*leaves, backend=backend)
        found[backend] = torch.autograd.grad(out, differentiated, cotangent)
    assert arguments[far].stride(0) == STRIDE
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=2**-6)


def test_bias_gelu():
    assert_same(ops.bias_gelu, far_rows(), vector())


def test_linear_gelu():
    weight = torch.randn(48, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.randn(48, dtype=torch.bfloat16, device=DEVICE)
    assert_same(
        ops.linear_gelu, far_rows(), weight, bias, "gelu_erf"
    )  # the form that is a kernel of ours on a GPU, too


@triton.jit
def _last_columns_kernel(
    x_ptr,  # (T, K), contiguous
    weight_ptr,  # (N, K), contiguous
    out_ptr,  # (T, BLOCK) float32
    n_rows,  # T
    n_cols,  # N
    n_inner,  # K
    BLOCK: tl.constexpr,
):
    rows, columns = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK)
    cols = n_cols - BLOCK + columns
    acc = tile_product(x_ptr, weight_ptr, rows, cols, n_rows, n_cols, n_inner, n_inner, BLOCK, True)
    tl.store(out_ptr + rows[:, None] * BLOCK + columns[None, :], acc, mask=(rows < n_rows)[:, None])


def test_weights_of_the_last_columns_of_a_product():
    block, n_cols = 16, 2**27 + 16
    try:
        weight = torch.empty((n_cols, block), dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for a tensor of 2^31 elements: {error}")
    last = weight[-block:].copy_(torch.randn(block, block, device=DEVICE))
    x = torch.randn(ROWS, block, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(ROWS, block, device=DEVICE)
    _last_columns_kernel[(1,)](x, weight, out, ROWS, n_cols, block, BLOCK=block)
    torch.testing.assert_close(out, x.float() @ last.float().t())


def test_gelu_layer_norm():
    assert_same(ops.gelu_layer_norm, far_rows(), vector(), vector(), vector(), 1e-12, "gelu_tanh")


@pytest.mark.parametrize("far", [0, 1], ids=["x", "residual"])
def test_add_layer_norm(far):
    x = [torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, device=DEVICE), far_rows()]
    assert_same(ops.add_layer_norm, x[1 - far], vector(), x[far], vector(), vector(), 1e-12)


def test_bias_gelu_gradient():
    assert_same_gradients(ops.bias_gelu, 0, far_rows(), vector())


def test_gelu_layer_norm_gradient():
    assert_same_gradients(ops.gelu_layer_norm, 0, far_rows(), vector(), vector(), vector(), 1e-12, "gelu_tanh")


@pytest.mark.parametrize("far", [0, 2], ids=["x", "residual"])
def test_add_layer_norm_gradient(far):
    x = {2 - far: torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, device=DEVICE), far: far_rows()}
    assert_same_gradients(ops.add_layer_norm, far, x[0], vector(), x[2], vector(), vector(), 1e-12)


def test_linear_cross_entropy():
    weight, bias = (torch.randn(7, *shape, dtype=torch.bfloat16, device=DEVICE) for shape in [(WIDTH,), ()])
    labels, ignored = (torch.tensor([1, 6, last], device=DEVICE) for last in (0, -100))
    assert_same(ops.linear_cross_entropy, far_rows(), weight, bias, ignored)
    x = far_rows().requires_grad_()
    actual, exact = (
        torch.autograd.grad(ops.linear_cross_entropy(x, weight, bias, labels, backend=backend), x)[0]
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(actual.float(), exact.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("far", ["rows", "columns"])
def test_what_graphs_read(far):
    ids, inputs = far_rows(torch.uint8), ops.GraphInputs(128, 128, DEVICE)
    ids.copy_(torch.randint(1, 100, ids.shape))
    batch = ids[:, :7] if far == "rows" else ids[:, :2].t()
    mask = torch.ones_like(batch, dtype=torch.int64)
    inputs.write_padded(batch, batch, batch, mask, mask.sum(1), batch.numel(), (32, 8))
    for written in inputs.views(batch.numel(), 8)[:3]:
        assert torch.equal(written, batch.flatten().long())


@pytest.mark.parametrize("far", range(3), ids=["q", "k", "v"])
def test_attention(far):
    x = [torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    x[far] = far_rows()
    cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32, device=DEVICE)
    assert_same(ops.attention, *x, cu_seqlens, cu_seqlens, ROWS, ROWS, 2)


@pytest.mark.parametrize("far", range(4), ids=["q", "k", "v", "grad"])
def test_attention_backward(far):
    x = [torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
    x[far] = far_rows()
    *leaves, grad = x
    cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32, device=DEVICE)

    def gradients(backend):
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        out = ops.attention(*inputs, cu_seqlens, cu_seqlens, ROWS, ROWS, 2, backend=backend)
        return torch.autograd.grad(out, inputs, grad)

    for actual, exact in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(actual.float(), exact.float(), rtol=2**-7, atol=2**-6)
