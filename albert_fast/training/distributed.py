"""The processes of a run under torchrun: who they are, sums over them, and the model spread over them.

The work is torch's: DistributedDataParallel, or fully_shard, which keeps a share of the weights and of the optimizer's state in
each process. A run without torchrun is one process, and nothing here communicates.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..runtime.devices import choose_device

# The first process tokenises the corpus while the others wait.
LONGEST_WAIT = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank, size: its number, from 0, and how many there are.
        waiting: the group whose calls may wait for long; None without torchrun.
    """

    rank: int = 0
    size: int = 1
    waiting: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def summed(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in each of them; anything that pickle takes."""
        found: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(found, value, group=self.waiting)
        return found


@contextmanager
def joined_processes(device: str | torch.device | None) -> Iterator[tuple[Processes, torch.device]]:
    """Joins the processes that torchrun started, on gloo or nccl, unless they are joined; gives the device of this one.

    They part when the process ends, since torch cannot join the same processes twice.

    Args:
        device: None: a GPU of its own for each process if there are any.
    """
    chosen = choose_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Processes(), chosen
        return
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(_part)
    waiting = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), waiting), chosen
    finally:
        dist.destroy_process_group(waiting)


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def spread(module: nn.Module, processes: Processes, device: torch.device, *, sharded: bool) -> nn.Module:
    """The module, on `device`, for all processes: sharded by FSDP2, or whole in each by DistributedDataParallel.

    With `sharded` all parameters are gathered at once: ALBERT's layers are one layer, so it is in use all the time. What is saved
    is memory for the optimizer's state and, between steps, for the weights and gradients.
    """
    module.to(device)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=init_device_mesh(device.type, (processes.size,)))
        return module
    if processes.size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def _states() -> tuple[Any, Any]:
    """torch's functions for states, and options that ask for whole ones; importing them takes a second."""
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of a module that `spread` returned and of its optimizer, whole, under the names of the plain module.

    All processes must call it; the first one gets the states, the others empty ones.
    """
    functions, whole = _states()
    model, steps = functions.get_state_dict(module, optimizer, options=whole)
    return model, dict(steps)


def load_whole_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, model: dict[str, Any], steps: dict[str, Any]
) -> None:
    """Loads what `whole_state` gave. All processes must call it, each with the whole states."""
    functions, whole = _states()
    functions.set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=steps, options=whole)


__all__ = ["Processes", "joined_processes", "load_whole_state", "spread", "whole_state"]
