"""Chooses the device that a task or a training run computes on."""

from __future__ import annotations

import torch

from .dispatch import check_device


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for; by default a GPU if there is one, else the CPU.

    Raises:
        BackendUnavailableError: a GPU was asked for, and this torch finds none.
        RuntimeError: not the name of a device.
    """
    check_device(device)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
