"""Watches the modules inside a stack: which are there, of which class, and whether hooks hang on them."""

from __future__ import annotations

from itertools import repeat
from operator import itemgetter
from typing import Any

from torch import nn

# transformers hangs hooks on the layers when hidden states are asked for, and leaves them there. They do nothing in a call
# that asks for none; such calls are told apart by `calls.read_call`.
_CAPTURE = "transformers.utils.output_capturing"
# Read anew at every call: users may put another dictionary in the place of the one that was there.
_HOOKS = tuple(itemgetter(f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


class Structure:
    """The modules inside a stack as they were when this object was made. Asking whether they still are costs microseconds."""

    def __init__(self, stack: nn.Module) -> None:
        self.stack = stack
        named = list(stack.named_modules())
        modules = [module for _, module in named]
        self._children = [(module._modules, tuple(module._modules.values())) for module in modules if module._modules]
        self._modules, self._types = modules, [*map(type, modules)]
        inside = named[1:]
        self._attributes = [module.__dict__ for _, module in inside]
        self._names = [name for name, _ in inside]

    def is_current(self) -> bool:
        """Whether the same modules of the same classes are there."""
        if [*map(type, self._modules)] != self._types:
            return False
        return all(tuple(children.values()) == seen for children, seen in self._children)

    def hooked(self) -> str | None:
        """Why calling a module inside does more than its class's forward; None where it does not."""
        if any(any(map(hooks, self._attributes)) for hooks in _HOOKS):
            for name, attributes in zip(self._names, self._attributes, strict=True):
                found = [hook for hooks in _HOOKS for hook in hooks(attributes).values()]
                if any(getattr(hook, "__module__", None) != _CAPTURE for hook in found):
                    return f"a hook hangs on {name}"
        if any(map(dict.__contains__, self._attributes, repeat("forward"))):
            for number, attributes in enumerate(self._attributes):
                if "forward" in attributes and not _is_own(attributes["forward"], self._modules[number + 1]):
                    return f"{self._names[number]} has a forward of its own"
        return None


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward set on an object is the one of its class: transformers 5.0 puts it there when it has collected states."""
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
