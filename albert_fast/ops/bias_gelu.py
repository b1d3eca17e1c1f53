"""bias_gelu: act(x + bias), the FFN's middle, in one pass over memory (Hendrycks & Gimpel 2016; act of Lan et al. 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import dispatch
from ..registration import (
    as_dtype,
    check_rows,
    forbid_second_derivative,
    needs_dispatcher,
    register,
    register_autograd,
    rows,
)

# The order is the numbering that the C++ and Triton kernels share.
ACTS = ("gelu_tanh", "gelu_erf", "relu")
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def act_ref(u: Tensor, act: str) -> Tensor:
    """The activation itself, eager."""
    if act == "relu":
        return torch.relu(u)
    return torch.nn.functional.gelu(u, approximate="tanh" if act == "gelu_tanh" else "none")


def act_grad_ref(u: Tensor, act: str) -> Tensor:
    """d act(u) / du, written out."""
    if act == "relu":
        return (u > 0).to(u.dtype)
    if act == "gelu_erf":
        return 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi)
    t = torch.tanh(_SQRT_2_OVER_PI * (u + _CUBIC * u**3))
    return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * u * u)


def bias_gelu_ref(x: Tensor, bias: Tensor, act: str) -> Tensor:
    """Eager reference, float32 inside."""
    return act_ref(x.float() + bias.float(), act).to(x.dtype)


def bias_gelu_bwd_ref(grad: Tensor, x: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor]:
    dx = grad.float() * act_grad_ref(x.float() + bias.float(), act)
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)


def _fwd(x: Tensor, bias: Tensor, act: str, backend: str) -> Tensor:
    backend = dispatch.resolve("bias_gelu", x.device.type, x.dtype, backend)
    if backend == "cpp":
        x, bias = rows(x), rows(bias)
        out = torch.empty_like(x)
        dispatch.extension().bias_gelu_fwd_cpu(
            x.data_ptr(), bias.data_ptr(), out.data_ptr(), *x.shape, ACTS.index(act),
            dispatch.DTYPE_CODES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out
    if backend == "triton":
        from ..kernels.bias_gelu import bias_gelu_fwd

        return bias_gelu_fwd(x, bias, act)
    return bias_gelu_ref(x, bias, act)


def _bwd(grad: Tensor, x: Tensor, bias: Tensor, act: str, backend: str) -> tuple[Tensor, Tensor]:
    backend = dispatch.resolve("bias_gelu", x.device.type, x.dtype, backend)
    if backend == "triton":
        from ..kernels.bias_gelu import bias_gelu_bwd

        return bias_gelu_bwd(grad, x, bias, act)
    if backend == "reference":
        return bias_gelu_bwd_ref(grad, x, bias, act)
    grad, x, bias = rows(grad), rows(x), rows(bias)
    dx = torch.empty_like(x)
    dbias = torch.empty(x.shape[1], dtype=torch.float32)
    dispatch.extension().bias_gelu_bwd_cpu(
        grad.data_ptr(), x.data_ptr(), bias.data_ptr(), dx.data_ptr(), dbias.data_ptr(), *x.shape, ACTS.index(act),
        dispatch.DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dbias.to(bias.dtype)


register(
    "bias_gelu_fwd(Tensor x, Tensor bias, str act, str backend) -> Tensor",
    _fwd,
    lambda x, bias, act, backend: torch.empty_like(x, memory_format=torch.contiguous_format),
)
register(
    "bias_gelu_bwd(Tensor grad, Tensor x, Tensor bias, str act, str backend) -> (Tensor, Tensor)",
    _bwd,
    lambda grad, x, bias, act, backend: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(bias),
    ),
)


def _setup(ctx, inputs, output):
    x, bias, ctx.act, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad):
    return *torch.ops.albert_fast.bias_gelu_bwd(grad, *ctx.saved_tensors, ctx.act, ctx.backend), None, None


register_autograd("bias_gelu_fwd", _backward, _setup)
forbid_second_derivative("bias_gelu_bwd")


def bias_gelu(x: Tensor, bias: Tensor, act: str = "gelu_tanh", *, backend: str = "auto") -> Tensor:
    """act(x + bias).

    Args:
        x: (T, I), the FFN's first product without its bias.
        bias: (I,).
        act: "gelu_tanh", "gelu_erf" or "relu".
        backend: "auto", or the name of one.

    Returns:
        (T, I), in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
    """
    check_rows("bias_gelu", x, bias=(bias, x.shape[-1]))
    if act not in ACTS:
        raise ValueError(f"bias_gelu: unknown act {act!r}; known: {', '.join(ACTS)}")
    (bias,) = as_dtype(x, bias)
    return (torch.ops.albert_fast.bias_gelu_fwd if needs_dispatcher(x, bias) else _fwd)(x, bias, act, backend)
