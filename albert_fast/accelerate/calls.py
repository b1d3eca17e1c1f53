"""Reads one call of a stack of layers: its hidden states, its mask, what it asks for, and why no kernel serves it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
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


def read_call(given: dict[str, Any], family: Family, width: int, dtype: torch.dtype, flash: bool) -> Call | str:
    """The call, or the reason why the original forward must run.

    Args:
        given: the arguments of the stack's forward by name. width: columns that the hidden states must have.
        dtype: of the layers' parameters. flash: whether transformers' attention reads sequences out of position_ids.
    """
    hidden = mask = None
    for name, value in given.items():
        if name in family.hidden_names:
            hidden = value
        elif name in family.mask_names:
            mask = value
        elif value is None or value is False or name in _HARMLESS or _is_empty(value):
            continue
        else:
            return f"{name} is given"
    if type(hidden) is not Tensor or hidden.dim() != 3 or hidden.shape[2] != width:
        return f"the hidden states are not (B, S, {width})"
    if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
        return f"the hidden states are {hidden.dtype}, the layers {dtype}"
    if flash and mask is None and given.get("position_ids") is not None:
        return "position_ids may separate sequences"
    collector = _collector()
    if collector is not None and (others := set(collector) - {"hidden_states", "_hidden_states_layers"}):
        return f"{' and '.join(sorted(others))} are asked for"
    found = padding_mask(mask, (hidden.shape[0], hidden.shape[1]))
    if isinstance(found, str):
        return found
    as_tuple = given.get("return_dict", True) is False
    return Call(hidden, found, collector or None, bool(given.get("output_hidden_states")), as_tuple)


def _is_empty(value: Any) -> bool:
    """Whether a list of masks of heads has none."""
    return isinstance(value, (list, tuple)) and all(one is None for one in value)


def _collector() -> dict[str, Any] | None:
    """What transformers 5 collects during this call, by name; empty or None for nothing."""
    module = sys.modules.get("transformers.utils.output_capturing")
    active = getattr(module, "_active_collector", None)
    found: dict[str, Any] | None = None if active is None else active.get()
    return found
