"""bias_gelu: dropout(act(x + bias)), the FFN's middle, in one pass over memory (Hendrycks & Gimpel 2016, GELU).

Dropout follows the activation, as in torch.nn.TransformerEncoderLayer. ALBERT (Lan et al. 2019) and Hugging Face's model
have no dropout there: our models pass dropout_p = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_choice, check_launch, hold, matrix
from ..runtime.registration import as_dtype, forbid_second_derivative, needs_dispatcher, register, register_autograd
from . import _torch
from ._dropout import keep_scale_2d, seed_value

# The C++ and Triton kernels know an activation by its number in this order.
ACTS = ("gelu_tanh", "gelu_erf", "relu")
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715

dispatch.expect(acts=ACTS)


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


def _dropped_ref(u: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dropout(u), float32 (T, I); applied to a gradient it is dropout's gradient."""
    number = seed_value(seed, dropout_p)
    return u * keep_scale_2d(number, u.shape, dropout_p, u.device) if dropout_p else u


def bias_gelu_ref(x: Tensor, bias: Tensor, act: str, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Eager reference, float32 inside."""
    return _dropped_ref(act_ref(x.float() + bias.float(), act), dropout_p, seed).to(x.dtype)


def bias_gelu_bwd_ref(
    grad: Tensor, x: Tensor, bias: Tensor, act: str, dropout_p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dx = _dropped_ref(grad.float(), dropout_p, seed) * act_grad_ref(x.float() + bias.float(), act)
    return dx.to(x.dtype), dx.sum(0).to(bias.dtype)


def _operands(x: Tensor, bias: Tensor, act: str, grad: Tensor | None = None) -> list[Operand]:
    """The operands of the kernels, in the order of the C++ functions."""
    shape = matrix("bias_gelu", "x", x)
    check_choice("bias_gelu", "act", act, ACTS)
    return [("grad", grad, shape, x.dtype), ("x", x, shape, x.dtype), ("bias", bias, shape[1:], x.dtype)]


def _fwd(x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None, backend: str) -> Tensor:
    operands = _operands(x, bias, act)
    backend = dispatch.resolve("bias_gelu", x.device.type, x.dtype, backend)
    if backend == "cpp":
        memory = hold("bias_gelu", x.device, operands[1:])
        out = torch.empty(x.shape, dtype=x.dtype)
        dropout, code = (dropout_p, seed_value(seed, dropout_p)), dispatch.DTYPE_CODES[out.dtype]
        numbers = ACTS.index(act), *dropout, code, torch.get_num_threads()
        dispatch.extension().bias_gelu_fwd_cpu(*memory.addresses, out.data_ptr(), *out.shape, *numbers)
        return out
    check_launch("bias_gelu", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.bias_gelu import bias_gelu_fwd

        return bias_gelu_fwd(x, bias, act, dropout_p, seed_value(seed, dropout_p))
    return bias_gelu_ref(x, bias, act, dropout_p, seed)


def _bwd(
    grad: Tensor, x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    operands = _operands(x, bias, act, grad)
    backend = dispatch.resolve("bias_gelu", x.device.type, x.dtype, backend)
    if backend == "cpp":
        memory = hold("bias_gelu", x.device, operands)
        dx, dbias = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[1], dtype=torch.float32)
        dropout, code = (dropout_p, seed_value(seed, dropout_p)), dispatch.DTYPE_CODES[dx.dtype]
        numbers = ACTS.index(act), *dropout, code, torch.get_num_threads()
        results = dx.data_ptr(), dbias.data_ptr()
        dispatch.extension().bias_gelu_bwd_cpu(*memory.addresses, *results, *dx.shape, *numbers)
        return dx, dbias.to(dx.dtype)
    check_launch("bias_gelu", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.bias_gelu import bias_gelu_bwd

        return bias_gelu_bwd(grad, x, bias, act, dropout_p, seed_value(seed, dropout_p))
    return bias_gelu_bwd_ref(grad, x, bias, act, dropout_p, seed)


def _fwd_fake(x, bias, act, dropout_p, seed, backend):
    check("bias_gelu", x.device, _operands(x, bias, act))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_ARGUMENTS = "Tensor x, Tensor bias, str act, float dropout_p, Tensor? seed, str backend"
register(
    f"bias_gelu_fwd({_ARGUMENTS}) -> Tensor",
    _fwd,
    _fwd_fake,
)
register(
    f"bias_gelu_bwd(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _bwd,
    lambda grad, x, bias, *_: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(bias),
    ),
)


def _setup(ctx, inputs, output):
    x, bias, ctx.act, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(x, bias, seed)


def _backward(ctx, grad):
    x, bias, seed = ctx.saved_tensors
    gradients = torch.ops.albert_fast.bias_gelu_bwd(grad, x, bias, ctx.act, ctx.dropout_p, seed, ctx.backend)
    return *gradients, None, None, None, None


register_autograd("bias_gelu_fwd", _backward, _setup)
forbid_second_derivative("bias_gelu_bwd")


def bias_gelu(
    x: Tensor,
    bias: Tensor,
    act: str = "gelu_tanh",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """dropout(act(x + bias)).

    Args:
        x: (T, I), the FFN's first product without its bias.
        bias: (I,).
        act: "gelu_tanh", "gelu_erf" or "relu".
        dropout_p, seed: replayable dropout; `seed` from `albert_fast.ops.draw_seed()`.
        backend: "auto", or the name of one.

    Returns:
        (T, I), in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation, dropout_p outside [0, 1) or above 0 without a
            seed. TypeError: an argument that is no dense tensor of floating-point numbers.
    """
    (bias,) = as_dtype(x, bias)
    if not dropout_p and dispatch.runs_on_torch("bias_gelu", x.device.type, x.dtype, backend):
        check("bias_gelu", x.device, _operands(x, bias, act))
        return _torch.bias_gelu(x, bias, act)
    call = torch.ops.albert_fast.bias_gelu_fwd if needs_dispatcher(x, bias) else _fwd
    return call(x, bias, act, dropout_p, seed, backend)
