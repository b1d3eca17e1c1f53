"""Reads one call of a stack of layers: its hidden states, its mask, what it asks for, and why no kernel serves it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import isfunction, signature
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from .families import Family
from .masks import padding_mask

# Arguments that do not change what layers without a cache compute.
_HARMLESS = {"position_ids", "use_cache", "return_dict", "cache_position", "num_items_in_batch", "output_hidden_states"}


@dataclass(frozen=True)
class Call:
    """One call that our kernels serve.

    hidden: (B, S, E), the input of the stack. mask: (B, S) bool, False at padding; None where every token is real.
    collector: where transformers collects the hidden states of every layer; None where it does not. wants_states: whether
    the stack returns them itself, as before transformers 5. as_tuple: whether it returns a tuple.
    """

    hidden: Tensor
    mask: Tensor | None
    collector: dict[str, Any] | None
    wants_states: bool
    as_tuple: bool


def read_call(given: dict[str, Any], family: Family, width: int, dtype: torch.dtype, attention: str) -> Call | str:
    """The call, or the reason why the original forward must run.

    Args:
        given: the arguments of the stack's forward by name. width: columns that the hidden states must have.
        dtype: of the layers' parameters. attention: transformers' name of the attention that the original runs.
    """
    hidden = mask = None
    for name, value in given.items():
        if name in family.hidden_names:
            hidden = value
        elif name in family.mask_names:
            mask = value
        elif value is None or value is False or name in _HARMLESS or _is_empty(value):
            continue
        elif not _is_unread(name, value, family, attention):  # sentence-transformers' `modality` is
            return f"{name} is given"
    if type(hidden) is not Tensor or hidden.dim() != 3 or hidden.shape[2] != width:
        return f"the hidden states are not (B, S, {width})"
    if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
        return f"the hidden states are {hidden.dtype}, the layers {dtype}"
    # Flash attention reads sequences out of position_ids.
    if "flash" in attention and mask is None and given.get("position_ids") is not None:
        return "position_ids may separate sequences"
    collector = _collector()
    if collector is not None and (others := set(collector) - {"hidden_states", "_hidden_states_layers"}):
        return f"{' and '.join(sorted(others))} are asked for"
    found = padding_mask(mask, (hidden.shape[0], hidden.shape[1]))
    if isinstance(found, str):
        return found
    as_tuple = given.get("return_dict", True) is False
    return Call(hidden, found, collector or None, bool(given.get("output_hidden_states")), as_tuple)


def _is_unread(name: str, value: object, family: Family, attention: str) -> bool:
    """Whether nothing inside the original layers reads the plain value `name`, which they hand on to their attention."""
    if not isinstance(value, (str, bool, int, float)):
        return False
    interfaces = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    if name.startswith("output_") or interfaces is None or attention not in ("eager", "sdpa"):
        return False  # other attention functions hand keywords on to libraries
    function = None if attention == "eager" else interfaces[attention]
    if not (function is None or (isfunction(function) and function.__module__.startswith("transformers."))):
        return False
    # What eager attention does not read, and sdpa does, is left to the original as well.
    return name not in _names_read(family.module, function or interfaces["sdpa"])


@cache
def _names_read(module: str, attention: Callable[..., Any]) -> frozenset[str]:
    """Parameters of the functions of `module` and of `attention`, and the strings in them, by which they may look keywords up."""
    own = vars(sys.modules[module]).values()
    forwards = [getattr(one, "forward", None) for one in own if isinstance(one, type)]
    found: set[str] = set()
    function: Any
    for function in filter(isfunction, (attention, *forwards, *own)):
        found |= set(signature(function).parameters)
        while isfunction(function):  # decorators read keywords too
            found |= _strings(function.__code__)
            function = getattr(function, "__wrapped__", None)
    return frozenset(found)


def _strings(code: CodeType) -> set[str]:
    """The strings in a function's code, and in the functions inside it."""
    inside = (_strings(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {constant for constant in code.co_consts if isinstance(constant, str)}.union(*inside)


def _is_empty(value: Any) -> bool:
    """Whether a list of masks of heads has none."""
    return isinstance(value, (list, tuple)) and all(one is None for one in value)


def _collector() -> dict[str, Any] | None:
    """What transformers 5 collects during this call, by name; empty or None for nothing."""
    module = sys.modules.get("transformers.utils.output_capturing")
    active = getattr(module, "_active_collector", None)
    found: dict[str, Any] | None = None if active is None else active.get()
    return found
