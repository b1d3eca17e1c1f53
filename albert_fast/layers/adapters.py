"""Modules whose weights fused operators read, and what a user may have put in their place.

A Linear in a layer is a product with the next operator fused behind it, so the module is not called; an adapter around it
(peft's LoRA), another forward or a hook on it would be passed over, as hooks on all modules of the process are. Where one of
these is found the part is called as it stands. Tables and LayerNorms are read inside one operator with what surrounds them:
there a replaced one is refused.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from ..runtime.linear import linear, linear_tanh
from ..runtime.registration import is_traced


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` would do more than its class does: a hook, or a forward set on the object itself."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__
    )  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is x @ weight.T + bias and nothing else; the weight may be a parametrisation's."""
    return type(module).forward is nn.Linear.forward and not is_hooked(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is a Linear with a bias whose own parameters are what it computes with, so that a copy of them serves
    several calls: no parametrisation, which may draw at each call, and no tensor of another kind."""
    if not is_linear(module) or "parametrizations" in module._modules:
        return False
    return all(type(module._parameters.get(name)) in (Tensor, nn.Parameter) for name in ("weight", "bias"))


def project(module: nn.Module, x: Tensor) -> Tensor:
    """What `module`, a Linear or what stands in its place, makes of x (T, K): (T, N)."""
    return linear(x, module.weight, module.bias) if is_linear(module) else module(x)  # type: ignore[arg-type]


def project_tanh(module: nn.Module, x: Tensor) -> Tensor:
    """tanh(project(module, x))."""
    if not is_linear(module):
        return torch.tanh(module(x))
    return linear_tanh(x, module.weight, module.bias)  # type: ignore[arg-type]


def product(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`project` as a product (T, N) and the bias (N,) that a fused operator adds behind it: zeros where it is in already."""
    if is_linear(module) and module.bias is not None:
        return linear(x, module.weight), module.bias  # type: ignore[arg-type, return-value]
    out = project(module, x)
    return out, out.new_zeros(out.shape[-1])


def check_read(module: nn.Module, kind: type[nn.Module], where: str) -> None:
    """RuntimeError where `module` is not computed as a `kind` is: a fused operator reads its weights and does not call it."""
    if type(module).forward is not kind.forward or "forward" in module.__dict__:
        raise RuntimeError(
            f"{where} was replaced by {type(module).__name__}, which a fused operator would pass over: leave it out of the "
            "adapter's targets, merge the adapter, or take albert_fast.reference, which calls every module"
        )
    check_heard(module, where)


def check_heard(module: nn.Module, where: str) -> None:
    """A warning, once, where `module` has hooks although it is not called."""
    if is_hooked(module) and not is_traced():
        _warn_of_hooks(where)


@cache
def _warn_of_hooks(where: str) -> None:
    warnings.warn(f"albert_fast: hooks on {where} do not run: a fused operator reads its weights", stacklevel=3)
