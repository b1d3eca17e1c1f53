"""add_layer_norm: LayerNorm(dropout(x + bias) + residual) in one pass; it follows both products of the layer.

Post-norm as in Vaswani et al. 2017, section 5.4; in Hugging Face `LayerNorm(hidden_states + dropout(dense(...)))`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_launch, hold, matrix
from ..runtime.registration import as_dtype, forbid_second_derivative, needs_dispatcher, register, register_autograd
from . import _torch
from ._dropout import keep_scale_2d, seed_value


def layer_norm_stats_ref(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and 1 / sqrt(variance + eps) of each row of float32 `z` (T, N), each (T,), as torch's layer_norm has them."""
    _, mean, rstd = torch.native_layer_norm(z, z.shape[1:], None, None, eps)
    return mean.squeeze(1), rstd.squeeze(1)


def layer_norm_bwd_ref(
    grad: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm(z) * weight + ln_bias with respect to z (T, N), weight (N,) and ln_bias (N,), float32."""
    z_hat = (z - mean[:, None]) * rstd[:, None]
    g = grad * weight
    dz = (g - g.mean(1, keepdim=True) - z_hat * (g * z_hat).mean(1, keepdim=True)) * rstd[:, None]
    return dz, (grad * z_hat).sum(0), grad.sum(0)


def _sum_ref(x: Tensor, bias: Tensor, residual: Tensor, dropout_p: float, seed: int) -> tuple[Tensor, Tensor | None]:
    u = x.float() + bias.float()
    keep = keep_scale_2d(seed, x.shape, dropout_p, x.device) if dropout_p else None
    return (u if keep is None else u * keep) + residual.float(), keep


def add_layer_norm_ref(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Eager reference, float32 inside."""
    z, _ = _sum_ref(x, bias, residual, dropout_p, seed_value(seed, dropout_p))
    return torch.nn.functional.layer_norm(z, z.shape[1:], weight.float(), ln_bias.float(), eps).to(x.dtype)


def _operands(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor) -> list[Operand]:
    """The operands of both kernels, in the order of the C++ functions."""
    shape, dtype = matrix("add_layer_norm", "x", x), x.dtype
    vector = shape[1:]
    return [
        ("x", x, shape, dtype),
        ("bias", bias, vector, dtype),
        ("residual", residual, shape, dtype),
        ("weight", weight, vector, dtype),
    ]


def _fwd(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _operands(x, bias, residual, weight)
    operands.append(("ln_bias", ln_bias, x.shape[1:], x.dtype))
    backend = dispatch.resolve("add_layer_norm", x.device.type, x.dtype, backend)
    if backend == "cpp":
        memory = hold("add_layer_norm", x.device, operands)
        out = torch.empty(x.shape, dtype=x.dtype)
        mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
        results = out.data_ptr(), mean.data_ptr(), rstd.data_ptr()
        numbers = eps, dropout_p, seed_value(seed, dropout_p), dispatch.DTYPE_CODES[out.dtype], torch.get_num_threads()
        dispatch.extension().add_layer_norm_fwd_cpu(*memory.addresses, *results, *out.shape, *numbers)
        return out, mean, rstd
    check_launch("add_layer_norm", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.add_layer_norm import add_layer_norm_fwd

        return add_layer_norm_fwd(x, bias, residual, weight, ln_bias, eps, dropout_p, seed_value(seed, dropout_p))
    z, _ = _sum_ref(x, bias, residual, dropout_p, seed_value(seed, dropout_p))
    return add_layer_norm_ref(x, bias, residual, weight, ln_bias, eps, dropout_p, seed), *layer_norm_stats_ref(z, eps)


def _bwd(
    grad: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """dx, dresidual (empty without dropout: then it equals dx), dbias, dweight, dln_bias."""
    operands: list[Operand] = [("grad", grad, x.shape, x.dtype), *_operands(x, bias, residual, weight)]
    operands += [(name, t, x.shape[:1], torch.float32) for name, t in (("mean", mean), ("rstd", rstd))]
    backend = dispatch.resolve("add_layer_norm", x.device.type, x.dtype, backend)
    if backend != "cpp":
        check_launch("add_layer_norm", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.add_layer_norm import add_layer_norm_bwd

        return add_layer_norm_bwd(grad, x, bias, residual, weight, mean, rstd, dropout_p, seed_value(seed, dropout_p))
    if backend == "reference":
        z, keep = _sum_ref(x, bias, residual, dropout_p, seed_value(seed, dropout_p))
        dz, dweight, dln_bias = layer_norm_bwd_ref(grad.float(), z, weight.float(), mean, rstd)
        dx = dz if keep is None else dz * keep
        dresidual = dz.to(x.dtype) if dropout_p else x.new_empty(0, x.shape[1])
        return dx.to(x.dtype), dresidual, *(d.to(bias.dtype) for d in (dx.sum(0), dweight, dln_bias))
    memory = hold("add_layer_norm", x.device, operands)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dresidual = torch.empty(x.shape if dropout_p else (0, x.shape[1]), dtype=x.dtype)
    dbias, dweight, dln_bias = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(3))
    vectors = dbias.data_ptr(), dweight.data_ptr(), dln_bias.data_ptr()
    results = dx.data_ptr(), dresidual.data_ptr() if dropout_p else 0, *vectors
    numbers = dropout_p, seed_value(seed, dropout_p), dispatch.DTYPE_CODES[dx.dtype], torch.get_num_threads()
    dispatch.extension().add_layer_norm_bwd_cpu(*memory.addresses, *results, *dx.shape, *numbers)
    return dx, dresidual, *(d.to(dx.dtype) for d in (dbias, dweight, dln_bias))


def _fwd_fake(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, backend):
    operands = _operands(x, bias, residual, weight)
    check("add_layer_norm", x.device, [*operands, ("ln_bias", ln_bias, x.shape[1:], x.dtype)])
    stats = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), stats, torch.empty_like(stats)


def _bwd_fake(grad, x, bias, residual, weight, mean, rstd, dropout_p, seed, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dx) if dropout_p else x.new_empty(0, x.shape[1])
    return dx, dresidual, torch.empty_like(bias), torch.empty_like(bias), torch.empty_like(bias)


_ARGUMENTS = "float dropout_p, Tensor? seed, str backend"
register(
    "add_layer_norm_fwd(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor ln_bias, float eps, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
register(
    "add_layer_norm_bwd(Tensor grad, Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor mean, Tensor rstd, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    x, bias, residual, weight, _, _, ctx.dropout_p, seed, ctx.backend = inputs
    _, mean, rstd = output
    # x and not `out`: to get z back from it, one would divide by weights near 0. To save z would cost as much as x.
    ctx.save_for_backward(x, bias, residual, weight, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    *saved, seed = ctx.saved_tensors
    dx, dresidual, dbias, dweight, dln_bias = torch.ops.albert_fast.add_layer_norm_bwd(
        grad, *saved, ctx.dropout_p, seed, ctx.backend
    )
    return dx, dbias, dresidual if ctx.dropout_p else dx, dweight, dln_bias, None, None, None, None


register_autograd("add_layer_norm_fwd", _backward, _setup)
forbid_second_derivative("add_layer_norm_bwd")


def add_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(dropout(x + bias) + residual) * weight + ln_bias, statistics in float32.

    Args:
        x: (T, H), a product without its bias.
        bias: (H,), that product's bias.
        residual: (T, H).
        weight, ln_bias: (H,), LayerNorm's scale and shift.
        eps: added to the variance.
        dropout_p, seed: replayable dropout; `seed` from `albert_fast.ops.draw_seed()`.
        backend: "auto", or the name of one.

    Returns:
        (T, H), in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: an argument that is no dense floating-point tensor.
    """
    bias, residual, weight, ln_bias = as_dtype(x, bias, residual, weight, ln_bias)
    if not dropout_p and dispatch.runs_on_torch("add_layer_norm", x.device.type, x.dtype, backend):
        operands = _operands(x, bias, residual, weight)
        check("add_layer_norm", x.device, [*operands, ("ln_bias", ln_bias, x.shape[1:], x.dtype)])
        return _torch.add_layer_norm(x, bias, residual, weight, ln_bias, eps)
    traced = needs_dispatcher(x, bias, residual, weight, ln_bias)
    call = torch.ops.albert_fast.add_layer_norm_fwd if traced else _fwd
    return call(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, backend)[0]
