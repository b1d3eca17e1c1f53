"""What an accelerated stack of layers holds: how it runs, and views of its layers, made again where its modules change."""

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
    """How an accelerated stack runs, and views of its layers, which are made when they are needed.

    padding: "zeros" or "keep", what stands in the result at padding. reduced: the layers in fewer bits, if inference takes
    those.
    """

    def __init__(self, family: Family, padding: str, reduced: ReducedLayers | None = None) -> None:
        self.family, self.padding, self.reduced = family, padding, reduced
        self._seen: _Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a copy has modules of its own, and looks at them itself

    def view(self, stack: nn.Module, padded: bool = False) -> StackView | str:
        """The layers of `stack`, or why ours do not compute them."""
        seen = self._seen
        if seen is None or seen.stack is not stack or not seen.watched.is_current():
            seen = self._seen = _Seen(stack)
        return seen.hooked() or seen.view(self.family, padded)


class _Seen:
    """The modules of a stack at one time, and the views of them.

    They are one object, so that a thread never mixes old modules with new views.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.stack = stack
        inside = list(stack.named_modules())[1:]
        self._names = [name for name, _ in inside]
        self.watched = Watched([module for _, module in inside], holders=[stack])
        self._views: dict[bool, StackView | str] = {}

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

    def view(self, family: Family, padded: bool) -> StackView | str:
        if padded not in self._views:
            try:
                self._views[padded] = StackView(self.stack, family, padded)
            except Unsupported as error:
                self._views[padded] = str(error)
        return self._views[padded]


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward set on an object is the one of its class: transformers 5.0 puts it there when it has collected states."""
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
