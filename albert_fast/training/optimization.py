"""The optimizers with their parameter groups, the learning-rate schedules, and a running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and embeddings, not on biases and LayerNorm (parameters of one dimension)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.98)
) -> torch.optim.AdamW:
    """AdamW with the groups of `parameter_groups`."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-6, fused=True)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2019, algorithm 2) as ALBERT's release has it: without bias correction.

    It is here because pytorch-optimizer's cannot step weights that FSDP2 shards, and bounds their norm by 10.

    Args:
        params: groups with a `weight_decay`, which is part of the update that the trust ratio scales, and with `adapts`; False
            leaves the ratio at 1. Query, key and value have a ratio each, as on Hugging Face's model.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapts": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes one step; returns what `closure`, which computes the loss and the gradients, gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
        update.add_(parameter, alpha=group["weight_decay"])
        if group["adapts"]:
            weight, change = parameter.norm(), update.norm()
            update.mul_(torch.where((weight > 0) & (change > 0), weight / change, 1.0))
        parameter.add_(update, alpha=-group["lr"])


def make_lamb(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> Lamb:
    """LAMB with the groups of `parameter_groups`; as in ALBERT's release, biases and LayerNorm have no trust ratio."""
    decayed, others = parameter_groups(model, weight_decay)
    return Lamb([decayed, others | {"adapts": False}], learning_rate, betas)


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float) -> LambdaLR:
    """The rate rises linearly over the first `warmup_ratio` of the steps, then falls linearly to zero after the last."""
    return _schedule(optimizer, steps, warmup_ratio, lambda left: left)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float) -> LambdaLR:
    """The rate rises linearly over the first `warmup_ratio` of the steps, then falls to zero along half a cosine."""
    return _schedule(optimizer, steps, warmup_ratio, lambda left: (1 - math.cos(math.pi * left)) / 2)


def _schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float, falls: Callable[[float], float]
) -> LambdaLR:
    """`falls` gives the rate's share after the warm-up, from the share of these steps that is left."""
    if steps < 1 or not 0 <= warmup_ratio < 1:
        raise ValueError(f"needs at least one step and a warm-up ratio in [0, 1), got {steps} and {warmup_ratio}")
    warmup = max(1, round(steps * warmup_ratio))

    def factor(step: int) -> float:
        left = max(0.0, (steps - step) / max(1, steps - warmup))
        return min((step + 1) / warmup, falls(min(1.0, left)))

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


__all__ = [
    "Lamb",
    "WeightAverage",
    "cosine_schedule",
    "linear_schedule",
    "make_lamb",
    "make_optimizer",
    "parameter_groups",
    "set_rates",
]
