"""gelu_layer_norm: LayerNorm(act(x + bias)), the masked-language-modelling head's transform, in one pass.

Devlin et al. 2018's masked LM head as ALBERT has it (width E); in Hugging Face `AlbertMLMHead`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_choice, check_launch, hold, matrix
from ..runtime.registration import as_dtype, forbid_second_derivative, needs_dispatcher, register, register_autograd
from . import _torch
from .add_layer_norm import layer_norm_bwd_ref, layer_norm_stats_ref
from .bias_gelu import ACTS, act_grad_ref, act_ref


def gelu_layer_norm_ref(x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor, eps: float, act: str) -> Tensor:
    """Eager reference, float32 inside."""
    z = act_ref(x.float() + bias.float(), act)
    return torch.nn.functional.layer_norm(z, z.shape[1:], weight.float(), ln_bias.float(), eps).to(x.dtype)


def _operands(x: Tensor, bias: Tensor, weight: Tensor, act: str) -> list[Operand]:
    """The operands of both kernels, in the order of the C++ functions."""
    shape, dtype = matrix("gelu_layer_norm", "x", x), x.dtype
    check_choice("gelu_layer_norm", "act", act, ACTS)
    return [("x", x, shape, dtype), ("bias", bias, shape[1:], dtype), ("weight", weight, shape[1:], dtype)]


def _fwd(
    x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor, eps: float, act: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _operands(x, bias, weight, act)
    operands.append(("ln_bias", ln_bias, x.shape[1:], x.dtype))
    backend = dispatch.resolve("gelu_layer_norm", x.device.type, x.dtype, backend)
    if backend == "cpp":
        memory = hold("gelu_layer_norm", x.device, operands)
        out = torch.empty(x.shape, dtype=x.dtype)
        mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
        results = out.data_ptr(), mean.data_ptr(), rstd.data_ptr()
        numbers = eps, ACTS.index(act), dispatch.DTYPE_CODES[out.dtype], torch.get_num_threads()
        dispatch.extension().gelu_layer_norm_fwd_cpu(*memory.addresses, *results, *out.shape, *numbers)
        return out, mean, rstd
    check_launch("gelu_layer_norm", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.gelu_layer_norm import gelu_layer_norm_fwd

        return gelu_layer_norm_fwd(x, bias, weight, ln_bias, eps, act)
    z = act_ref(x.float() + bias.float(), act)
    return gelu_layer_norm_ref(x, bias, weight, ln_bias, eps, act), *layer_norm_stats_ref(z, eps)


def _bwd(
    grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, act: str, backend: str
) -> tuple[Tensor, ...]:
    """dx, dbias, dweight, dln_bias."""
    operands: list[Operand] = [("grad", grad, x.shape, x.dtype), *_operands(x, bias, weight, act)]
    operands += [(name, t, x.shape[:1], torch.float32) for name, t in (("mean", mean), ("rstd", rstd))]
    backend = dispatch.resolve("gelu_layer_norm", x.device.type, x.dtype, backend)
    if backend != "cpp":
        check_launch("gelu_layer_norm", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.gelu_layer_norm import gelu_layer_norm_bwd

        return gelu_layer_norm_bwd(grad, x, bias, weight, mean, rstd, act)
    if backend == "reference":
        u = x.float() + bias.float()
        dz, dweight, dln_bias = layer_norm_bwd_ref(grad.float(), act_ref(u, act), weight.float(), mean, rstd)
        dx = dz * act_grad_ref(u, act)
        return dx.to(x.dtype), *(d.to(bias.dtype) for d in (dx.sum(0), dweight, dln_bias))
    memory = hold("gelu_layer_norm", x.device, operands)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dbias, dweight, dln_bias = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(3))
    results = dx.data_ptr(), dbias.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr()
    numbers = ACTS.index(act), dispatch.DTYPE_CODES[dx.dtype], torch.get_num_threads()
    dispatch.extension().gelu_layer_norm_bwd_cpu(*memory.addresses, *results, *dx.shape, *numbers)
    return dx, *(d.to(dx.dtype) for d in (dbias, dweight, dln_bias))


def _fwd_fake(x, bias, weight, ln_bias, eps, act, backend):
    operands = _operands(x, bias, weight, act)
    check("gelu_layer_norm", x.device, [*operands, ("ln_bias", ln_bias, x.shape[1:], x.dtype)])
    stats = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), stats, torch.empty_like(stats)


def _bwd_fake(grad, x, bias, weight, mean, rstd, act, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(bias), torch.empty_like(bias), torch.empty_like(bias)


register(
    "gelu_layer_norm_fwd(Tensor x, Tensor bias, Tensor weight, Tensor ln_bias, float eps, str act, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
register(
    "gelu_layer_norm_bwd(Tensor grad, Tensor x, Tensor bias, Tensor weight, Tensor mean, Tensor rstd, str act, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    x, bias, weight, _, _, ctx.act, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, bias, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    grads = torch.ops.albert_fast.gelu_layer_norm_bwd(grad, *ctx.saved_tensors, ctx.act, ctx.backend)
    return *grads, None, None, None


register_autograd("gelu_layer_norm_fwd", _backward, _setup)
forbid_second_derivative("gelu_layer_norm_bwd")


def gelu_layer_norm(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    act: str = "gelu_tanh",
    *,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(act(x + bias)) * weight + ln_bias, statistics in float32.

    Args:
        x: (T, E), the head's product without its bias.
        bias, weight, ln_bias: (E,).
        eps: added to the variance.
        act: "gelu_tanh", "gelu_erf" or "relu".
        backend: "auto", or the name of one.

    Returns:
        (T, E), in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation. TypeError: an argument that is no dense
            floating-point tensor.
    """
    bias, weight, ln_bias = as_dtype(x, bias, weight, ln_bias)
    if dispatch.runs_on_torch("gelu_layer_norm", x.device.type, x.dtype, backend):
        operands = _operands(x, bias, weight, act)
        check("gelu_layer_norm", x.device, [*operands, ("ln_bias", ln_bias, x.shape[1:], x.dtype)])
        return _torch.gelu_layer_norm(x, bias, weight, ln_bias, eps, act)
    traced = needs_dispatcher(x, bias, weight, ln_bias)
    call = torch.ops.albert_fast.gelu_layer_norm_fwd if traced else _fwd
    return call(x, bias, weight, ln_bias, eps, act, backend)[0]
