"""Puts a module in training or eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts a module and those inside it in training or eval mode while the block runs; then each gets its own old mode back."""
    before = [(inner, inner.training) for inner in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for inner, old in before:
            inner.training = old


__all__ = ["mode"]
