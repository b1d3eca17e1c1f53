"""Dense products outside the fused operators: our own in C++, or torch's with the fastest library that it ships.

On a CPU in float32 without a gradient, a module's product runs in C++ on a packed copy of its weight. A row's result does not
depend on the rest of the batch or on the number of threads, to the bit, and no memory is kept per number of rows.

torch computes other products on a CPU. `torch.nn.functional.linear` in float32 calls MKL, which on some chips runs at two
thirds of the rate of oneDNN. torch ships oneDNN too, behind the operator to which its compiler lowers a Linear with constant
weights; float32 products use that operator, forward and backward. oneDNN keeps a compiled kernel for each number of rows,
half a megabyte each, and packed batches rarely repeat a number: so row counts are rounded up, to a few different ones.

GPUs and autocast use `torch.nn.functional.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import dispatch
from .derived import Derived
from .operands import check_launch, hold, hold_rows, matrix
from .registration import is_traced, needs_dispatcher, register, register_autograd

# With fewer multiplications, oneDNN's overhead a call (more if its code is not cached) exceeds what its kernels gain.
_SMALL = 2**22
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Row counts are rounded up to one of so many between a power of two and the next; that adds 3% of rows at most.
_COUNTS_PER_DOUBLING = 16


def _check(op: str, *operands: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raise for a tensor that does not fit: torch's operator for oneDNN does not check its arguments."""
    first = operands[0][1]
    assert first is not None
    check_launch(op, "cpp", first.device, [(*operand, first.dtype) for operand in operands])


def _step(rows: int) -> int:
    """The number of rows is rounded up to a multiple of this."""
    doubling = 1 << (rows - 1).bit_length()
    return max(doubling // (2 * _COUNTS_PER_DOUBLING), min(doubling, _COUNTS_PER_DOUBLING))


def _more_rows(x: Tensor) -> int:
    """How many rows are added to `x` (T, K) to round their number up."""
    return -len(x) % _step(len(x)) if len(x) else 0


def _runs_onednn(multiplications: int, dtype: torch.dtype) -> bool:
    return _HAS_ONEDNN and dtype == torch.float32 and multiplications >= _SMALL


def _padded(x: Tensor, more: int) -> Tensor:
    return F.pad(x, (0, 0, 0, more)) if more else x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (tokens, depth), (columns, _) = matrix("linear", "x", x), matrix("linear", "weight", weight)
    _check("linear", ("x", x, (tokens, depth)), ("weight", weight, (columns, depth)), ("bias", bias, (columns,)))
    bias = None if bias is None else bias.contiguous()  # oneDNN's operator ignores the strides of a bias
    more = _more_rows(x)
    padded = _padded(x, more)
    if _runs_onednn(x.shape[0] * weight.numel(), x.dtype):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    else:
        out = F.linear(padded, weight, bias)
    return out[: len(x)] if more else out


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    op = "linear_weight_gradient"
    (tokens, columns), (_, depth) = matrix(op, "grad", grad), matrix(op, "x", x)
    _check(op, ("grad", grad, (tokens, columns)), ("x", x, (tokens, depth)))
    rest = len(x) % _step(len(x)) if len(x) else 0
    whole = len(x) - rest
    if not whole or not _runs_onednn(x.numel() * grad.shape[1], x.dtype):
        more = _more_rows(x)
        return _padded(grad, more).t() @ _padded(x, more)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(grad[:whole].t(), x[:whole].t(), None, "none", [], "")
    # The few rows after the last whole step cost less than a padded copy of all rows.
    return out.addmm_(grad[whole:].t(), x[whole:]) if rest else out


# Wrapped in operators of our own, since torch's compiler accepts oneDNN's only with weights that are frozen into the graph.
register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _product,
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
)
register(
    "linear_weight_gradient(Tensor grad, Tensor x) -> Tensor",
    _weight_gradient,
    lambda grad, x: x.new_empty((grad.shape[1], x.shape[1])),
)


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dx = torch.ops.albert_fast.linear(grad, weight.t(), None) if need_x else None
    dweight = torch.ops.albert_fast.linear_weight_gradient(grad, x) if need_weight else None
    return dx, dweight, grad.sum(0) if need_bias else None


def _setup_gradient(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_gradient(ctx, second):
    grad, x = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad
    dgrad = torch.ops.albert_fast.linear(x, second, None) if need_grad else None
    return dgrad, torch.ops.albert_fast.linear(grad, second.t(), None) if need_x else None


register_autograd("linear", _backward, _setup)
register_autograd("linear_weight_gradient", _backward_gradient, _setup_gradient)


def _by_torch(device_type: str, *dtypes: torch.dtype) -> bool:
    """Whether `torch.nn.functional.linear` computes a product directly."""
    return device_type != "cpu" or torch.is_autocast_enabled("cpu") or len(set(dtypes)) > 1


def library(device_type: str, dtype: torch.dtype) -> str:
    """The library that computes a module's products of such activations now: it depends on autocast and gradients."""
    if device_type != "cpu":
        return "cuBLAS"
    if dtype == torch.float32 and not _by_torch("cpu") and not torch.is_grad_enabled() and dispatch.has_extension():
        return "cpp"
    return "oneDNN" if dtype == torch.float32 and _HAS_ONEDNN and not _by_torch("cpu") else "torch"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T (+ bias): x (T, K), weight (N, K), bias (N,) -> (T, N)."""
    if _by_torch(x.device.type, x.dtype, weight.dtype):
        more = 0 if x.device.type != "cpu" or is_traced() else _more_rows(x)
        return F.linear(_padded(x, more), weight, bias)[: len(x)] if more else F.linear(x, weight, bias)
    if needs_dispatcher(x, weight, bias):
        out: Tensor = torch.ops.albert_fast.linear(x, weight, bias)
        return out
    if _is_packable(weight) and x.dim() == 2:
        return _by_packed(x, weight, bias, tanh=False)
    return _product(x, weight, bias)


def linear_tanh(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """tanh(linear(x, weight, bias)). With torch's tanh an element's rounding depends on its index in the array; with ours not."""
    torchs = _by_torch(x.device.type, x.dtype, weight.dtype) or needs_dispatcher(x, weight, bias)
    if not torchs and _is_packable(weight) and x.dim() == 2:
        return _by_packed(x, weight, bias, tanh=True)
    return torch.tanh(linear(x, weight, bias))


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x: grad (T, N), x (T, K) -> (N, K), the gradient of the weight of `linear`."""
    if _by_torch(x.device.type, x.dtype, grad.dtype):
        return grad.t() @ x
    if needs_dispatcher(grad, x):
        out: Tensor = torch.ops.albert_fast.linear_weight_gradient(grad, x)
        return out
    return _weight_gradient(grad, x)


def _is_packable(weight: Tensor) -> bool:
    """Whether the C++ product takes `weight`: a module's parameter, so that a packed copy is used again."""
    if not isinstance(weight, Parameter) or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    return weight.is_contiguous() and not weight.is_neg() and weight.data_ptr() != 0 and dispatch.has_extension()


def _pack(weights: Sequence[Tensor]) -> Tensor:
    """A weight (N, K) in the layout of the C++ product."""
    (weight,), extension = weights, dispatch.extension()
    memory = torch.empty(extension.linear_packed_size_cpu(*weight.shape), dtype=torch.float32)
    held = hold("linear", memory.device, [("weight", weight, tuple(weight.shape), torch.float32)])
    extension.linear_pack_cpu(*held.addresses, memory.data_ptr(), *weight.shape, torch.get_num_threads())
    return memory


_PACKED = Derived(_pack)


def _by_packed(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    (tokens, depth), (columns, _) = matrix("linear", "x", x), weight.shape
    expected = tokens, weight.shape[1]
    rows, (stride,) = hold_rows("linear", weight.device, [("x", x, expected, torch.float32)])
    vector = hold("linear", weight.device, [("bias", bias, (columns,), torch.float32)])
    memory = _PACKED([weight])
    out = torch.empty((tokens, columns), dtype=torch.float32)
    addresses = *rows.addresses, stride, memory.data_ptr(), *vector.addresses, out.data_ptr()
    dispatch.extension().linear_fwd_cpu(*addresses, tokens, columns, depth, tanh, torch.get_num_threads())
    return out
