"""Detects adapters, hooks and other replacements of the modules whose weights fused operators read.

A fused operator reads a Linear's weight and does not call the module. An adapter around it (peft's LoRA), another forward or a
hook would be skipped, so where one is found the module is called instead. Embedding tables and LayerNorms are read inside
larger operators: a replaced one is refused. Hooks that torch runs for all modules of the process are always skipped.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from ..runtime.linear import linear, linear_tanh
from ..runtime.registration import is_traced


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: it has a hook, or a forward set on the object."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x @ weight.T + bias and nothing else; the weight may be parametrised."""
    return type(module).forward is nn.Linear.forward and not is_hooked(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is a Linear that computes with its own weight and bias, so that a copy of them serves several calls: it has
    no parametrisation, which may draw random numbers at each call, and no tensor subclass."""
    if not is_linear(module) or "parametrizations" in module._modules:
        return False
    return all(type(module._parameters.get(name)) in (Tensor, nn.Parameter) for name in ("weight", "bias"))


def project(module: nn.Module, x: Tensor) -> Tensor:
    """The result (T, N) of `module`, a Linear or its replacement, for x (T, K)."""
    return linear(x, module.weight, module.bias) if is_linear(module) else module(x)  # type: ignore[arg-type]


def project_tanh(module: nn.Module, x: Tensor) -> Tensor:
    """tanh(project(module, x))."""
    if not is_linear(module):
        return torch.tanh(module(x))
    return linear_tanh(x, module.weight, module.bias)  # type: ignore[arg-type]


def product(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`project` as a product (T, N) and a bias (N,) that the next fused operator adds: zeros where it is already added."""
    if is_linear(module) and module.bias is not None:
        return linear(x, module.weight), module.bias  # type: ignore[arg-type, return-value]
    out = project(module, x)
    return out, out.new_zeros(out.shape[-1])


def check_read(module: nn.Module, kind: type[nn.Module], where: str) -> None:
    """RuntimeError where `module` has another forward than `kind`: a fused operator reads its weights and does not call it."""
    if type(module).forward is not kind.forward or "forward" in module.__dict__:
        raise RuntimeError(
            f"{where} was replaced by {type(module).__name__}, which a fused operator would not call: leave it out of the "
            "adapter's targets, merge the adapter, or take albert_fast.reference, which calls every module"
        )
    check_heard(module, where)


def check_heard(module: nn.Module, where: str, instead: str = "a fused operator reads its weights") -> None:
    """Warn, once, where `module` has hooks although it is not called; `instead` says what happens in its place."""
    if is_hooked(module) and not is_traced():
        _warn_of_hooks(where, instead)


@cache
def _warn_of_hooks(where: str, instead: str) -> None:
    warnings.warn(f"albert_fast: hooks on {where} do not run: {instead}", stacklevel=3)
