"""Where the time of the C++ encoders goes: seconds by thread and stage, for the caller that asks for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..runtime import dispatch

# What the kernels' time is counted under, in the order of their columns.
STAGES = (
    "query, key, value",
    "attention",
    "attention output",
    "add, LayerNorm",
    "FFN up, activation",
    "FFN down",
    "rounding to integers",
    "copies",
    "waiting",
)
# For each thread inside `stage_seconds`: the tensor that it yielded.
_profile = threading.local()

dispatch.expect(stages=STAGES)


def profile_address(threads: int) -> int:
    """The address at which a kernel on `threads` threads adds its seconds by stage; 0 outside `stage_seconds`."""
    seconds: Tensor | None = getattr(_profile, "seconds", None)
    if seconds is None:
        return 0
    if len(seconds) < threads:  # torch.set_num_threads was called inside
        before = len(seconds)
        seconds.resize_(threads, len(STAGES))[before:] = 0.0
    return seconds.data_ptr()


@contextmanager
def stage_seconds() -> Iterator[Tensor]:
    """Inside, the C++ encoders add their seconds to the tensor that this yields: (threads, len(STAGES)) float64.

    Only calls from the thread that entered are counted. The tensor has a row for each thread that torch has on entry; it
    grows if torch.set_num_threads allows a kernel more.
    """
    before = getattr(_profile, "seconds", None)
    _profile.seconds = torch.zeros(torch.get_num_threads(), len(STAGES), dtype=torch.float64)
    try:
        yield _profile.seconds
    finally:
        _profile.seconds = before
