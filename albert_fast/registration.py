"""How operators register with torch.library, and when eager code may skip the dispatcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("albert_fast", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `albert_fast::<schema>`; one implementation for every device, which picks the backend itself."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"albert_fast::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"albert_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def forbid_second_derivative(name: str) -> None:
    """Make a gradient through the gradient operator an error: its formula is not written, and silence would be wrong."""
    forbid_derivative(name, "for second derivatives use the models of albert_fast.reference")


def forbid_derivative(name: str, advice: str) -> None:
    """Make a gradient through the operator an error that gives `advice`."""

    def backward(ctx: Any, *_grads: Any) -> Any:
        raise NotImplementedError(f"albert_fast::{name} has no derivative of its own: {advice}")

    register_autograd(name, backward, lambda ctx, inputs, output: None)


def is_traced() -> bool:
    """Whether a tracer records operators instead of values: torch.compile, torch.export, torch.jit.trace, make_fx.

    Nothing may then depend on what tensors hold, and every call must go through torch's dispatcher: a tracer sees no other.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
    )


def refuse_onnx() -> None:
    """RuntimeError inside torch.onnx.export by tracing: ONNX has no form of these operators."""
    if torch.jit.is_tracing() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "albert_fast's operators have no ONNX form: call save_pretrained and export transformers' AlbertModel, or export "
            "the model of the same name in albert_fast.reference"
        )


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call must go through torch's dispatcher: for a gradient, for a tracer, for tensor subclasses.

    Otherwise the implementation is called directly, which saves 5 to 14 microseconds a call on a CPU.
    """
    if is_traced():
        return True
    grad = torch.is_grad_enabled()
    return any(t is not None and ((grad and t.requires_grad) or type(t) not in (Tensor, Parameter)) for t in tensors)


def rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous and rows dense, as the kernels without a row stride expect."""
    return x if x.is_contiguous() else x.contiguous()


def check_rows(op: str, x: Tensor, **vectors: tuple[Tensor, int]) -> None:
    """ValueError where `x` is not (rows, width) or a named vector does not have the width given beside it."""
    if x.dim() != 2:
        raise ValueError(f"{op}: expected x of shape (tokens, width), got {tuple(x.shape)}")
    for name, (vector, width) in vectors.items():
        if vector.shape != (width,):
            raise ValueError(
                f"{op}: expected {name} of shape ({width},) beside x {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
    check_devices(op, x, *(vector for vector, _ in vectors.values()))


def check_devices(op: str, first: Tensor, *others: Tensor | None) -> None:
    """ValueError where a tensor is not on the device of `first`: kernels take addresses and would follow any."""
    for other in others:
        if other is not None and other.device != first.device:
            raise ValueError(f"{op}: tensors on {first.device} and {other.device}; all must be on one device")


def as_dtype(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """`others` in the dtype of `x` (under autocast, activations come in fewer bits than parameters)."""
    return tuple(t if t.dtype == x.dtype else t.to(x.dtype) for t in others)
