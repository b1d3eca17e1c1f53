"""Registers operators with torch.library, and decides when eager code may skip torch's dispatcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn import Parameter

_LIBRARY = torch.library.Library("albert_fast", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator `albert_fast::<schema>`. Its one implementation serves every device and picks the backend."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

    def without_tangents(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        return implementation(*arguments)

    _LIBRARY.impl(name, without_tangents, "CompositeExplicitAutograd")
    torch.library.register_fake(f"albert_fast::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"albert_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def forbid_second_derivative(name: str) -> None:
    """Make a gradient through the gradient operator an error: it is not implemented, and torch would return a wrong one."""
    forbid_derivative(name, "for second derivatives use the models of albert_fast.reference")


def forbid_derivative(name: str, advice: str) -> None:
    """Make a gradient through the operator an error that gives `advice`."""

    def backward(ctx: Any, *_grads: Any) -> Any:
        raise NotImplementedError(f"albert_fast::{name} has no derivative of its own: {advice}")

    register_autograd(name, backward, lambda ctx, inputs, output: None)


def is_traced() -> bool:
    """Whether a tracer records operators instead of values: torch.compile, torch.export, torch.jit.trace, make_fx.

    Then nothing may depend on the values in tensors, and every call must go through torch's dispatcher, or the tracer
    misses it.
    """
    return (
        torch.compiler.is_compiling()
        or is_jit_traced()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
    )


def is_jit_traced() -> bool:
    """Whether torch.jit.trace records this call."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return traced


def refuse_onnx() -> None:
    """RuntimeError inside torch.onnx.export by tracing: ONNX has no form of these operators."""
    if is_jit_traced() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "albert_fast's operators have no ONNX form: call save_pretrained and export transformers' AlbertModel, or export "
            "the model of the same name in albert_fast.reference"
        )


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    """NotImplementedError for a tensor with a forward-mode tangent: torch would drop the tangent silently."""
    flat = [item for value in arguments for item in (value if isinstance(value, (list, tuple)) else (value,))]
    # torch.func.jvp has removed the tangents at this point.
    if eager_transforms.JVP_NESTING or any(
        isinstance(item, Tensor) and forward_ad.unpack_dual(item).tangent is not None for item in flat
    ):
        raise NotImplementedError(
            f"albert_fast::{name} has no forward-mode derivative: for torch.func.jvp and torch.autograd.forward_ad use the "
            "models of albert_fast.reference, or take torch.autograd.grad"
        )


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call must go through torch's dispatcher: for a gradient, a tracer, a transform of torch.func, a forward-mode
    derivative or a tensor subclass.

    Otherwise the implementation is called directly, which saves 5 to 14 microseconds a call on a CPU.
    """
    if is_traced():
        return True
    if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
        return True
    grad = torch.is_grad_enabled()
    return any(
        t is not None and ((type(t) not in (Tensor, Parameter) and _is_subclass(t)) or (grad and t.requires_grad))
        for t in tensors
    )


def _is_subclass(t: Tensor) -> bool:
    if not isinstance(t, Tensor):
        raise TypeError(f"expected a tensor, got {type(t).__name__}")
    return True


def as_dtype(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """`others` in the dtype of `x`: under autocast, activations have fewer bits than parameters.

    Raises:
        TypeError: an argument that is no tensor.
    """
    if not all(isinstance(t, Tensor) for t in (x, *others)):
        raise TypeError(f"expected tensors, got {', '.join(type(t).__name__ for t in (x, *others))}")
    return tuple(t if t.dtype == x.dtype else t.to(x.dtype) for t in others)
