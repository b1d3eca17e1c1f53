"""Dense products: torch's own, by the fastest library that it carries.

On a CPU, `torch.nn.functional.linear` in float32 calls MKL, which on some chips runs at two thirds of the rate of oneDNN;
torch ships oneDNN too, behind the operator that its compiler lowers a Linear with constant weights to. So float32 products
go there, forward and backward, and everything else (other dtypes, GPUs, autocast, a torch without oneDNN) takes the
ordinary way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import check_launch, matrix
from .registration import is_traced, needs_dispatcher, register, register_autograd

# Multiplications below which what oneDNN spends a call, more when its code is out of the caches, exceeds what its kernels gain.
_SMALL = 2**22
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch's operator trusts its callers.
    (tokens, depth), (columns, _) = matrix("onednn_linear", "x", x), matrix("onednn_linear", "weight", weight)
    operands = [("x", x, (tokens, depth)), ("weight", weight, (columns, depth)), ("bias", bias, (columns,))]
    check_launch("onednn_linear", "cpp", torch.device("cpu"), [(*operand, torch.float32) for operand in operands])
    bias = None if bias is None else bias.contiguous()  # it reads one without strides
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# An operator of our own around it: the compiler accepts torch's only with weights that are frozen into the graph.
register(
    "onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _onednn,
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
)


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    call = torch.ops.albert_fast.onednn_linear
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dx = call(grad, weight.t(), None) if need_x else None
    dweight = call(grad.t(), x.t(), None) if need_weight else None
    return dx, dweight, grad.sum(0) if need_bias else None


register_autograd("onednn_linear", _backward, _setup)


def _by_onednn(device_type: str, *dtypes: torch.dtype) -> bool:
    f32 = all(dtype == torch.float32 for dtype in dtypes)
    return f32 and device_type == "cpu" and _HAS_ONEDNN and not torch.is_autocast_enabled("cpu")


def library(device_type: str, dtype: torch.dtype) -> str:
    """What computes the products of such activations, in a word."""
    if device_type != "cpu":
        return "cuBLAS"
    return "oneDNN" if _by_onednn(device_type, dtype) else "torch"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T (+ bias): x (T, K), weight (N, K), bias (N,) -> (T, N)."""
    if not _by_onednn(x.device.type, x.dtype, weight.dtype):
        return F.linear(x, weight, bias)
    if not is_traced() and x.shape[0] * weight.numel() < _SMALL:
        return F.linear(x, weight, bias)
    if needs_dispatcher(x, weight, bias):
        out: Tensor = torch.ops.albert_fast.onednn_linear(x, weight, bias)
        return out
    return _onednn(x, weight, bias)
