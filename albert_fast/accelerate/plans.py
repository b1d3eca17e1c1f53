"""What a call of an accelerated model would run where, and why, without running its layers: for `albert_fast.explain`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..layers.packing import Packing
from ..runtime import dispatch
from .calls import Call
from .padded import PaddedQueries
from .view import StackView

# What `inspect.explain.Step` has: name, times, rows, backend, GFLOP, why.
Row = tuple[str, int, int, str, float, str]
Layers = Callable[[StackView, Packing, Tensor], StackView | str | None]


class _Reached(Exception):
    """Ends a forward where it reaches a stack."""


def at_the_stack(model: nn.Module, stack: nn.Module, arguments: Mapping[str, Any], look: Callable[..., Any]) -> Any:
    """What `look` returns for the arguments with which `model(**arguments)` calls `stack`; the stack itself does not run.

    Raises:
        RuntimeError: the call did not reach the stack.
    """
    thread, found = threading.get_ident(), []

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == thread:
            found.append(look(*args, **kwargs))
            raise _Reached

    # transformers 5.0 sets the forward of every layer while it collects states, and an exception would leave it there.
    own = [(module.__dict__, module.__dict__.get("forward")) for module in model.modules()]
    handle = stack.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**arguments)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
        for attributes, forward in own:
            if attributes.get("forward") is not forward:
                attributes.pop("forward") if forward is None else attributes.update(forward=forward)
    raise RuntimeError(f"{type(model).__name__} was called and did not reach its {type(stack).__name__}")


def caller_of(module: nn.Module, stack: nn.Module) -> nn.Module:
    """The outermost model of transformers in `module` that holds `stack`; a SentenceTransformer takes other arguments."""
    for inner in module.modules():
        takes_ids = {"input_ids", "args"} & set(signature(inner.forward).parameters)
        if inner is not stack and hasattr(inner, "config") and takes_ids and stack in inner.modules():
            return inner
    raise ValueError(f"{type(module).__name__} holds no model of transformers around its {type(stack).__name__}")


def described(name: str, answer: tuple[Call, StackView, Packing] | str, stack: nn.Module, layers: Layers) -> Row:
    """One row of the plan: how the layers of `stack` run.

    Args:
        layers: chooses what runs for a call: a view in fewer bits, or the reason for the model's own; None without either.
    """
    if isinstance(answer, str):
        return name, 1, 0, "transformers", 0.0, f"original forward: {answer}"
    call, view, packing = answer
    tokens = call.hidden.shape[0] * call.hidden.shape[1] if packing.indices is None else len(packing.indices)
    hidden = call.hidden[:1, :1, :1].expand(1, tokens, view.spec.hidden_size)[0]
    chosen = layers(view, packing, call.hidden)
    instead = f"in the model's own precision: {chosen}; " if isinstance(chosen, str) else ""
    view.take_modes(stack.training)
    runs = chosen if isinstance(chosen, StackView) else view
    if runs is not view:
        hidden = hidden.to(next(runs.parameters()).dtype)
    reason = None if runs.quantized else runs.why_not_one_call(hidden, "auto")
    if call.wants_states or call.collector is not None:
        reason = "every layer's states are asked for"
    if isinstance(packing, PaddedQueries):
        reason = "padding is computed too: it is kept, or the first column has some"
    op = "quantized_encoder" if runs.quantized else "encoder" if reason is None else "attention"
    backend = dispatch.resolve(op, hidden.device.type, hidden.dtype)
    how = "all layers in one call" if reason is None or runs.quantized else f"operator by operator: {reason}"
    bits = f"{runs.quantized} weights, " if runs.quantized else ""
    return name, len(view.layer_indices), tokens, backend, _gflop(view, packing, tokens), instead + bits + how


def _gflop(view: Any, packing: Packing, tokens: int) -> float:
    spec = view.spec
    lengths = (packing.real or packing if isinstance(packing, PaddedQueries) else packing).cu_seqlens.diff().double()
    queries = lengths * 0 + packing.max_seqlen if isinstance(packing, PaddedQueries) else lengths
    pairs = float((queries * lengths).sum())
    products = tokens * (4 * spec.hidden_size**2 + 2 * spec.hidden_size * spec.intermediate_size)
    return len(view.layer_indices) * (2 * products + 4 * pairs * spec.hidden_size) / 1e9
