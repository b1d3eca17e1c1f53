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


def make_lamb(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """LAMB (You et al. 2019, algorithm 2) as ALBERT's release has it: without bias correction, and with Adam's step, without a
    trust ratio, for biases and LayerNorm. Query, key and value have a ratio each, as on Hugging Face's model.

    Raises:
        ImportError: pytorch-optimizer is not installed.
    """
    try:
        from pytorch_optimizer import Lamb
    except ImportError as error:
        raise ImportError("LAMB needs pytorch-optimizer: pip install 'albert-fast[pretrain]'") from error
    decayed, others = parameter_groups(model, weight_decay)
    # weight_decouple=True would add the decay beside the trust ratio; the paper has it inside. adam_debias=True divides no step by
    # 1 - beta1 ** step. `adam`: the ratio is 1.
    groups = [decayed, others | {"adam": True}]
    optimizer: torch.optim.Optimizer = Lamb(
        groups, lr=learning_rate, betas=betas, eps=1e-6, weight_decouple=False, adam_debias=True
    )
    optimizer.clamp = math.inf  # type: ignore[attr-defined]  # the library's bound of 10 on a weight's norm; the release has none
    return optimizer


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
    "WeightAverage",
    "cosine_schedule",
    "linear_schedule",
    "make_lamb",
    "make_optimizer",
    "parameter_groups",
    "set_rates",
]
