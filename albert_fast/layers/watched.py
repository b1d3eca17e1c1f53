"""Notices changes to a tree of modules: which are there, of which class, and whether hooks hang on them.

A stack of twelve layers has 200 modules. To walk through them as a tree takes longer than to run two tokens, so they are kept in
flat lists, which are compared in C: every change to the tree or its hooks is still noticed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

# Read anew at every call: users may put another dictionary in the place of the one that was there.
_HOOKS = tuple(
    operator.itemgetter(name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)


class Watched:
    """Modules as they were when this object was made. Asking whether they still are costs microseconds.

    Args:
        modules: they must have no hooks and no forwards of their own. holders: modules around them, which may have both.
    """

    def __init__(self, modules: Iterable[nn.Module], holders: Iterable[nn.Module] = ()) -> None:
        self.modules = list(modules)
        self._attributes = [module.__dict__ for module in self.modules]
        self._all = [*holders, *self.modules]
        self._types = list(map(type, self._all))
        self._children = [module._modules for module in self._all]
        self._tree, self._counts = values(self._children), list(map(len, self._children))

    def is_current(self) -> bool:
        """Whether the same modules of the same classes are there."""
        return (
            list(map(type, self._all)) == self._types
            and list(map(len, self._children)) == self._counts
            and same(values(self._children), self._tree)
        )

    def is_hooked(self) -> bool:
        """Whether a module has hooks, or a forward of its own: `adapters.is_hooked` of all of them."""
        replaced = map(operator.contains, self._attributes, itertools.repeat("forward"))
        return any(any(map(hooks, self._attributes)) for hooks in _HOOKS) or any(replaced)

    def hooks(self) -> list[tuple[int, str, Any]]:
        """(number of the module, "hook" or "forward", the hook or the forward) of each that `is_hooked` finds."""
        found = []
        for number, attributes in enumerate(self._attributes):
            found += [(number, "hook", hook) for hooks in _HOOKS for hook in hooks(attributes).values()]
            if "forward" in attributes:
                found.append((number, "forward", attributes["forward"]))
        return found


def values(dictionaries: list[dict[str, Any]]) -> list[Any]:
    """The values of all dictionaries, one after another."""
    return list(itertools.chain.from_iterable(map(dict.values, dictionaries)))


def same(found: Sequence[Any], known: Sequence[Any]) -> bool:
    """Whether both hold the same objects."""
    return len(found) == len(known) and all(map(operator.is_, found, known))
