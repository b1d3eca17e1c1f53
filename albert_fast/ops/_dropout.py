"""Replayable dropout: whether an element is kept follows from (seed, row, column) alone, on every backend.

So no mask is stored between forward and backward, every backend drops the same elements, and parity can be tested with
dropout on. The mixing function is the 32-bit finaliser with the constants 0x7FEB352D and 0x846CA68B (Wellons,
"Prospecting for hash functions", 2018; bias 0.17).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels._capture import capturing
from ..runtime import dispatch

_MASK = 0xFFFFFFFF
# Rows of the attention matrix: head * HEAD_STRIDE + packed index of the query token. In a batch of more than 65,537 tokens
# two heads share some masks, which is harmless to training and the same on every backend.
HEAD_STRIDE = 0x10001

dispatch.expect(head_stride=HEAD_STRIDE)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keep_scale(seed: int, rows: Tensor, cols: Tensor, p: float) -> Tensor:
    """float32 factors, broadcast over int64 `rows` and `cols`: 0 where dropped (probability `p`), 1 / (1 - p) where kept."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    x = _mix((low ^ (rows * 0x9E3779B1)) & _MASK)
    x = _mix(x ^ ((high ^ (cols * 0x85EBCA77)) & _MASK))
    return (x >= int(p * 2**32)).to(torch.float32) / (1.0 - p)


def keep_scale_2d(seed: int, shape: tuple[int, int] | torch.Size, p: float, device: torch.device) -> Tensor:
    """`keep_scale` for every element of a (rows, width) tensor."""
    rows = torch.arange(shape[0], device=device)[:, None]
    return keep_scale(seed, rows, torch.arange(shape[1], device=device)[None, :], p)


def draw_seed() -> Tensor:
    """A fresh 63-bit seed from torch's default generator, so `torch.manual_seed` makes dropout repeatable.

    It is a tensor, so that torch.compile traces through it, and on the CPU, so that reading it does not wait for a GPU.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")  # whatever torch.set_default_device says


def seed_value(seed: Tensor | None, p: float) -> int:
    """The number in `seed`; 0 without dropout. Every operator with dropout reads its seed here, traced or not.

    Raises:
        ValueError: dropout_p is out of range, or dropout is on and there is no seed. RuntimeError: the current stream
            captures a CUDA graph; it would keep the number, and use one mask for all replays.
    """
    if p == 0.0:
        return 0
    if not 0.0 < p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {p}")
    if seed is None:
        raise ValueError(f"dropout_p is {p}: pass the seed that replays it (albert_fast.ops.draw_seed())")
    if capturing():
        raise RuntimeError(
            "dropout inside a CUDA graph would repeat one mask at every replay: capture with model.eval() or with dropout "
            "probabilities of 0, or train without a graph"
        )
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        found = f"{tuple(seed.shape)} in {seed.dtype}" if isinstance(seed, Tensor) else type(seed).__name__
        raise ValueError(f"seed must be one int64 in a tensor (albert_fast.ops.draw_seed()), got {found}")
    try:
        return int(seed)
    except RuntimeError as error:
        raise ValueError(f"seed has no number that can be read: {error}") from error
