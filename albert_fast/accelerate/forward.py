"""One call of an accelerated stack: read, packed, run on our kernels, unpacked; or the reason why the original forward runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ..layers.adapters import project
from ..layers.packing import Packing, pack
from ..layers.run import Run
from ..runtime import dispatch
from ..runtime.user_warnings import warn_user
from .calls import Call, read_call
from .families import Family
from .padded import PaddedQueries
from .state import STATE, Acceleration
from .view import StackView


@cache
def warn_of_original(reason: str) -> None:
    warn_user(
        f"albert_fast: an accelerated model runs its original forward, because {reason}. Said once; "
        "albert_fast.explain(model, ...) says it for any call."
    )


@torch.compiler.assume_constant_result  # a compiler runs it while it traces, and records nothing
def say_traced() -> None:
    """Warn once that a compiler or a tracer records the original forward."""
    warn_of_original("a compiler or tracer records it")


@cache
def warn_of_floats(reason: str) -> None:
    warn_user(f"albert_fast: an accelerated model runs in its own precision, because {reason}. Said once.")


def fast_forward(stack: Any, given: dict[str, Any]) -> Any:
    """The result on our kernels, or the reason why there is none."""
    acceleration: Acceleration = stack.__dict__[STATE]
    read = prepared(stack, acceleration, given)
    if isinstance(read, str):
        return read
    call, view, packing = read
    states: list[Tensor] | None = [] if call.wants_states or call.collector is not None else None
    packed = packing.gather(call.hidden)
    if acceleration.family.first is not None:
        packed = project(getattr(stack, acceleration.family.first), packed)
    dtype = _result_dtype(packed)
    reduced, reason = acceleration.reduced, None
    if reduced is not None and (reason := why_not_reduced(acceleration, stack, view, packing, packed)) is None:
        with torch.autocast(packed.device.type, enabled=False):
            out = reduced.layers(packed.to(reduced.dtype), packing, None, Run(states=states))
    else:
        view.take_modes(stack.training)
        if reason is not None and not view.training:
            warn_of_floats(reason)
        recompute = "layers" if view.training and view.modes.recomputes(stack) else "nothing"
        out = view(packed, packing, None, Run(recompute=recompute, states=states))
    unpacked = [packing.scatter(one.to(dtype)) for one in (out, *(states or ()))]
    return _output(acceleration.family, call, unpacked[0], unpacked[1:], view)


def why_not_reduced(
    acceleration: Acceleration, stack: nn.Module, view: StackView, packing: Packing, hidden: Tensor
) -> str | None:
    """Why the model's own parameters run instead of those in fewer bits; None where the latter do."""
    assert acceleration.reduced is not None
    if isinstance(packing, PaddedQueries):
        return "padding is computed too"
    return acceleration.reduced.why_not(stack, view, hidden)


def _result_dtype(hidden: Tensor) -> torch.dtype:
    """dtype of transformers' result for layers that start from `hidden`: autocast on a GPU computes norms in float32, and on a
    CPU they have their input's dtype."""
    return torch.float32 if hidden.is_cuda and torch.is_autocast_enabled("cuda") else hidden.dtype


def prepared(
    stack: nn.Module, acceleration: Acceleration, given: dict[str, Any]
) -> tuple[Call, StackView, Packing] | str:
    """What a call of `stack` with the arguments `given` runs on, or why it runs the original forward."""
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "torch.func or a forward-mode derivative transforms it"
    if stack.__dict__.get("_is_replica"):
        return "torch.nn.DataParallel copies layers in each call: take DistributedDataParallel"
    if given.get("output_attentions"):
        return "attention probabilities are asked for"
    view = acceleration.view(stack)
    if isinstance(view, str):
        return view
    family = acceleration.family
    norm, first = view.distinct()[0].attention.LayerNorm, family.first
    width = view.spec.hidden_size if first is None else getattr(stack, first).in_features
    call = read_call(given, family, width, norm.weight.dtype, _attention(stack))
    if isinstance(call, str):
        return call
    if (reason := no_kernel(call.hidden.device.type, _arithmetic(call.hidden))) is not None:
        return reason
    if stack.training and view.modes.drops_all():
        return "a dropout of 1 leaves nothing"
    packing = pack((call.hidden.shape[0], call.hidden.shape[1]), call.mask, call.hidden.device)
    if packing.indices is None or call.mask is None:
        return call, view, packing
    # A pooler or a classifier reads column 0, so zeros would change its numbers where padding is on the left.
    if acceleration.padding == "zeros" and bool(call.mask[:, 0].all()):
        return call, view, packing.with_sequence_order()
    return call, view, PaddedQueries.of(packing)


def _attention(stack: nn.Module) -> str:
    """transformers' name of the attention that `stack` runs; DistilBERT's layers have the configuration, its stack has none."""
    config: Any = next((module.config for module in stack.modules() if hasattr(module, "config")), None)
    return getattr(config, "_attn_implementation", None) or ""


def _arithmetic(hidden: Tensor) -> torch.dtype:
    """dtype in which the layers multiply."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@cache
def no_kernel(device_type: str, dtype: torch.dtype) -> str | None:
    """Why no kernel computes attention in this dtype, where torch's own operators are better than the reference."""
    if device_type == "cpu" and not dispatch.has_extension() and dtype == torch.float32:
        return None  # our form on torch's operators still leaves padding out
    backends = [name for name in dispatch.TABLE["attention"].get(device_type, ()) if name != "reference"]
    reasons = [dispatch.why_not("attention", device_type, name, dtype) for name in backends]
    return None if None in reasons else next(iter(reasons), None) or f"no kernel runs on {device_type}"


def _output(family: Family, call: Call, out: Tensor, states: list[Tensor], view: StackView) -> Any:
    """What the original forward returns, with the hidden states where they are asked for."""
    if call.collector is not None:
        chosen, found = call.collector.get("_hidden_states_layers"), call.collector["hidden_states"]
        for state in states:
            found.append(state if chosen is None or len(found) in chosen else None)
    # Before version 5 ALBERT's stack kept one state a group of layers.
    kept = tuple(states[:: len(view.groups()[0].inner)]) if call.wants_states else None
    if call.as_tuple:
        return (out,) if kept is None else (out, kept)
    import transformers.modeling_outputs as outputs

    return getattr(outputs, family.output)(last_hidden_state=out, hidden_states=kept)
