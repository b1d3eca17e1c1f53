"""Runs the encoders of transformers' models on fused kernels, in place.

`albert_fast.accelerate` is both this folder and the function: the folder can be called too, because importing a file of it
puts the folder in the function's place.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableFolder(ModuleType):
    """The folder as a module that can be called as the function `accelerate`."""

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        from .api import accelerate

        return accelerate(model, *args, **kwargs)


sys.modules[__name__].__class__ = _CallableFolder
