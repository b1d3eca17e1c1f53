"""What an accelerated stack of layers holds: how it runs, and views of its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from .families import Family
from .reduced import ReducedLayers
from .structure import Structure
from .view import StackView, Unsupported

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
        if seen is None or seen.structure.stack is not stack or not seen.structure.is_current():
            seen = self._seen = _Seen(stack)
        return seen.structure.hooked() or seen.view(self.family, padded)


class _Seen:
    """The modules of a stack at one time, and the views of them.

    They are one object, so that a thread never mixes an old structure with new views.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.structure = Structure(stack)
        self._views: dict[bool, StackView | str] = {}

    def view(self, family: Family, padded: bool) -> StackView | str:
        if padded not in self._views:
            try:
                self._views[padded] = StackView(self.structure.stack, family, padded)
            except Unsupported as error:
                self._views[padded] = str(error)
        return self._views[padded]
