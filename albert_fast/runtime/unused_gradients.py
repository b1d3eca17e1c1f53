"""Warns once per process when a model in eval mode computes gradients that no backward uses: they cost most of the time."""

from __future__ import annotations

from torch import Tensor

from .user_warnings import warn_user

_ENOUGH = 3


class _Watch:
    """How many graphs in a row were dropped without a backward, and whether the user was told."""

    unused = 0
    told = False


class _Graph:
    """A hook on one forward's graph, which lives as long as the graph does."""

    def __init__(self) -> None:
        self.used = False

    def __call__(self, gradients: tuple[Tensor, ...]) -> None:
        self.used = True
        _Watch.unused = 0

    def __del__(self) -> None:
        if not self.used:
            _Watch.unused += 1


def watch_graph(out: Tensor) -> None:
    """Count the graph of `out`, the result of a model in eval mode, as unused if no backward runs through it.

    Warns once a process, after several graphs in a row were dropped unused.
    """
    if _Watch.told or out.grad_fn is None:
        return
    if _Watch.unused >= _ENOUGH:
        _Watch.told = True
        warn_user(
            "albert_fast: the model is in eval mode and gradients are enabled, but no backward has used them. Without them "
            "all layers run in one call, about three times as fast: call the model inside `with torch.inference_mode():` or "
            "`with torch.no_grad():`."
        )
        return
    out.grad_fn.register_prehook(_Graph())
