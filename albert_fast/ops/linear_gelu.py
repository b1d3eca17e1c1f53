"""linear_gelu: act(x @ weight^T + bias), the FFN's first product and its activation (Lan et al. 2019, section 3.1).

For GPUs, where a product that is not written and read again saves time: see kernels/linear_gelu.py. On a CPU a library
computes the product and bias_gelu the rest; the fused operator there is `encoder`. The backward pass is bias_gelu's, on the
sums before the activation, which the forward saves; and two more products of a library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import dispatch
from ..runtime.linear import linear, weight_gradient
from ..runtime.operands import Operand, check, check_choice, check_launch, matrix
from ..runtime.registration import (
    as_dtype,
    forbid_derivative,
    forbid_second_derivative,
    needs_dispatcher,
    register,
    register_autograd,
)
from . import _torch
from ._dtypes import widened
from .bias_gelu import ACTS, act_grad_ref, act_ref, bias_gelu


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """Eager reference, float32 inside (float64 for float64)."""
    return act_ref(F.linear(*map(widened, (x, weight, bias))), act).to(x.dtype)


def _bwd_ref(
    grad: Tensor, x: Tensor, weight: Tensor, sums: Tensor, act: str, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    du = widened(grad) * act_grad_ref(widened(sums), act)
    dx = (du @ widened(weight)).to(x.dtype) if need_x else x.new_empty(0)
    dweight = (du.t() @ widened(x)).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dx, dweight, du.sum(0).to(x.dtype)


def _operands(x: Tensor, weight: Tensor, act: str, bias: Tensor | None = None) -> list[Operand]:
    op, dtype = "linear_gelu", x.dtype
    (tokens, depth), (columns, _) = matrix(op, "x", x), matrix(op, "weight", weight)
    check_choice(op, "act", act, ACTS)
    shape = columns, depth
    return [("x", x, (tokens, depth), dtype), ("weight", weight, shape, dtype), ("bias", bias, (columns,), dtype)]


def _inference(x: Tensor, weight: Tensor, bias: Tensor, act: str, backend: str) -> Tensor:
    backend = dispatch.resolve("linear_gelu", x.device.type, x.dtype, backend)
    check_launch("linear_gelu", backend, x.device, _operands(x, weight, act, bias))
    if backend == "cpp":
        return bias_gelu(linear(x, weight), bias, act, backend=backend)
    if backend == "triton":
        from ..kernels.linear_gelu import linear_gelu_fwd

        return linear_gelu_fwd(x, weight, bias, act, keep_sums=False)[0]
    return linear_gelu_ref(x, weight, bias, act)


def _fwd(x: Tensor, weight: Tensor, bias: Tensor, act: str, backend: str) -> tuple[Tensor, Tensor]:
    """The output, and x @ weight^T + bias in its dtype, both (T, N)."""
    backend = dispatch.resolve("linear_gelu", x.device.type, x.dtype, backend)
    check_launch("linear_gelu", backend, x.device, _operands(x, weight, act, bias))
    if backend == "triton":
        from ..kernels.linear_gelu import linear_gelu_fwd

        out, kept = linear_gelu_fwd(x, weight, bias, act, keep_sums=True)
        assert kept is not None
        return out, kept
    if backend == "cpp":
        # The product adds the bias, so that sums are rounded once: see kernels/linear_gelu.py.
        sums = linear(x, weight, bias)
        return bias_gelu(sums, torch.zeros_like(bias), act, backend=backend), sums
    sums = F.linear(*map(widened, (x, weight, bias)))
    return act_ref(sums, act).to(x.dtype), sums.to(x.dtype)


def _bwd(
    grad: Tensor, x: Tensor, weight: Tensor, sums: Tensor, act: str, backend: str, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. One that is not needed (of frozen weights, say) is empty and not computed."""
    operands = _operands(x, weight, act)
    shape = len(x), len(weight)
    operands += [(name, t, shape, x.dtype) for name, t in (("grad", grad), ("sums", sums))]
    backend = dispatch.resolve("linear_gelu", x.device.type, x.dtype, backend)
    check_launch("linear_gelu", backend, x.device, operands)
    # A backward may be called under autocast; it computes in the dtypes of the forward.
    with torch.autocast(x.device.type, enabled=False):
        if backend == "reference":
            return _bwd_ref(grad, x, weight, sums, act, need_x, need_weight)
        if backend == "triton":
            from ..kernels.bias_gelu import bias_gelu_bwd

            du, dbias = bias_gelu_bwd(grad, sums, None, act)
        else:
            zeros = sums.new_zeros(sums.shape[1])
            du, dbias = torch.ops.albert_fast.bias_gelu_bwd(grad, sums, zeros, act, 0.0, None, backend)
        dx = linear(du, weight.t()) if need_x else x.new_empty(0)
        return dx, weight_gradient(du, x) if need_weight else weight.new_empty(0), dbias


def _bwd_fake(grad, x, weight, sums, act, backend, need_x, need_weight):
    shapes = x.shape if need_x else (0,), weight.shape if need_weight else (0,), sums.shape[1:]
    return tuple(x.new_empty(shape) for shape in shapes)


def _out_fake(x, weight, bias, act, backend):
    check("linear_gelu", x.device, _operands(x, weight, act, bias))
    return x.new_empty((x.shape[0], weight.shape[0]))


_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias"
register(f"linear_gelu_inference({_ARGUMENTS}, str act, str backend) -> Tensor", _inference, _out_fake)
register(
    f"linear_gelu_fwd({_ARGUMENTS}, str act, str backend) -> (Tensor, Tensor)",
    _fwd,
    lambda *arguments: (_out_fake(*arguments), _out_fake(*arguments)),
)
register(
    "linear_gelu_bwd(Tensor grad, Tensor x, Tensor weight, Tensor sums, str act, str backend, bool need_x, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    x, weight, _, ctx.act, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    needed = ctx.needs_input_grad[:3]
    gradients = torch.ops.albert_fast.linear_gelu_bwd(grad, *ctx.saved_tensors, ctx.act, ctx.backend, *needed[:2])
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None


register_autograd("linear_gelu_fwd", _backward, _setup)
forbid_second_derivative("linear_gelu_bwd")
forbid_derivative("linear_gelu_inference", "linear_gelu chooses the operator that keeps what a gradient needs")


def _call(x: Tensor, weight: Tensor, bias: Tensor, act: str, backend: str) -> Tensor:
    """Run the operator that saves the sums if a gradient may be asked for, else the one that does not."""
    operators = torch.ops.albert_fast
    out: Tensor
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        out, _ = operators.linear_gelu_fwd(x, weight, bias, act, backend)
    else:
        call = operators.linear_gelu_inference if needs_dispatcher(x, weight, bias) else _inference
        out = call(x, weight, bias, act, backend)
    return out


def without_tiles(backend: str, columns: int) -> str:
    """An addition to the reason for a backend, if its Triton kernel has no tiles for so many columns; else ""."""
    if backend == "triton":
        from ..kernels.linear_gelu import has_tiles

        if not has_tiles(columns):
            return f"; {columns} columns are no multiple of 16: cuBLASLt's product, no Triton tile"
    return ""


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, act: str = "gelu_tanh", *, backend: str = "auto") -> Tensor:
    """act(x @ weight^T + bias).

    Args:
        x: (T, K); rows may be strided.
        weight: (N, K). bias: (N,).
        act: "gelu_tanh", "gelu_erf" or "relu".
        backend: "auto", or the name of one.

    Returns:
        (T, N), in x's dtype; under autocast in autocast's, as torch.nn.functional.linear.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation. TypeError: an argument that is no dense
            floating-point tensor.
    """
    matrix("linear_gelu", "x", x)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        weight, bias = as_dtype(x, weight, bias)
        if dispatch.runs_on_torch("linear_gelu", device, x.dtype, backend):
            check("linear_gelu", x.device, _operands(x, weight, act, bias))
            return _torch.linear_gelu(x, weight, bias, act)
        return _call(x, weight, bias, act, backend)
    if x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    # All tensors have autocast's dtype now: inside, autocast is off.
    with torch.autocast(device, enabled=False):
        weight, bias = as_dtype(x, weight, bias)
        return _call(x, weight, bias, act, backend)
