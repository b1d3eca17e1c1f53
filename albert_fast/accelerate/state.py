"""What an accelerated stack of layers holds: how it runs, and a view of its layers, made again where its modules change."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.watched import Watched
from .families import Family
from .reduced import ReducedLayers
from .view import StackView, Unsupported

# transformers hangs hooks on the layers when hidden states are asked for, and leaves them there. They do nothing in a call
# that asks for none; such calls are told apart by `calls.read_call`.
_CAPTURE = "transformers.utils.output_capturing"
STATE = "_albert_fast"  # the attribute of an accelerated stack that holds its Acceleration


class Acceleration:
    """How an accelerated stack runs, and a view of its layers, which is made when it is needed.

    padding: "zeros" or "keep", what stands in the result at padding. reduced: the layers in fewer bits, if inference takes
    those.
    """

    def __init__(self, family: Family, padding: str, reduced: ReducedLayers | None = None) -> None:
        self.family, self.padding, self.reduced = family, padding, reduced
        self._seen: _Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a copy has modules of its own, and looks at them itself

    def view(self, stack: nn.Module) -> StackView | str:
        """The layers of `stack`, or why ours do not compute them."""
        seen = self._seen
        if seen is None or seen.stack is not stack or not seen.watched.is_current():
            seen = self._seen = _Seen(stack, self.family)
        return seen.hooked() or seen.view


class _Seen:
    """The modules of a stack at one time, and the view of them, or why there is none.

    They are one object, so that a thread never mixes old modules with a new view.
    """

    def __init__(self, stack: nn.Module, family: Family) -> None:
        self.stack = stack
        inside = list(stack.named_modules())[1:]
        self._names = [name for name, _ in inside]
        self.watched = Watched([module for _, module in inside], holders=[stack])
        self.view = _view(stack, family)

    def hooked(self) -> str | None:
        """Why calling a module inside does more than its class's forward; None where it does not."""
        if not self.watched.is_hooked():
            return None
        for number, kind, found in self.watched.hooks():
            if kind == "hook" and getattr(found, "__module__", None) != _CAPTURE:
                return f"a hook hangs on {self._names[number]}"
            if kind == "forward" and not _is_own(found, self.watched.modules[number]):
                return f"{self._names[number]} has a forward of its own"
        return None


def _view(stack: nn.Module, family: Family) -> StackView | str:
    try:
        return StackView(stack, family)
    except Unsupported as error:
        return str(error)


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward set on an object is the one of its class: transformers 5.0 puts it there when it has collected states."""
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
