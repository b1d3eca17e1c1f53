"""The optimizer with its parameter groups, the learning-rate schedule, and a running average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings, not on biases and LayerNorm (parameters of one dimension)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float) -> LambdaLR:
    """The rate rises linearly over the first `warmup_ratio` of the steps, then falls linearly to zero after the last."""
    if steps < 1 or not 0 <= warmup_ratio < 1:
        raise ValueError(f"needs at least one step and a warm-up ratio in [0, 1), got {steps} and {warmup_ratio}")
    warmup = max(1, round(steps * warmup_ratio))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def set_rates(schedule: LambdaLR) -> None:
    """Sets the optimizer's rates to those of the schedule's current step; a loaded state may hold other rates."""
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)


class WeightAverage:
    """Exponential moving average of a model's parameters.

    Args:
        decay: weight of the old average at update n; lower at first, min(decay, (1 + n) / (10 + n)), so that the random
            start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {decay}")
        self.decay, self.updates = decay, 0
        self.average = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in model.parameters()], weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Gives the model the averaged weights while the block runs, and its own weights afterwards."""
        own = [p.detach().clone() for p in model.parameters()]
        _assign(model, self.average)
        try:
            yield
        finally:
            _assign(model, own)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        average = state["average"]
        assert isinstance(average, list)
        assert isinstance(state["updates"], int)
        self.updates = state["updates"]
        self.average = [tensor.to(own.device) for tensor, own in zip(average, self.average, strict=True)]


@torch.no_grad()
def _assign(model: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)  # in place, so that autograd's version counter tells caches that the weights changed


__all__ = ["WeightAverage", "linear_schedule", "make_optimizer", "set_rates"]
