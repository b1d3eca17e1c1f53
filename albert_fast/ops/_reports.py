"""Reports errors that kernels find on a GPU to Python, without making Python wait for the GPU.

For a bad id a kernel writes a code to device memory. `report` starts a copy of it to the host, after the kernel, and records
an event. The error is raised later: by the next embedding_projection on that device, so by the next forward of a model,
without waiting, if the code has arrived; or by `synchronize`, which waits. At most MAX_PENDING calls are pending; a host that
is further ahead of the GPU waits for the oldest. Host memory and events are used again.

While a CUDA graph is captured there is nothing to copy. Code that replays graphs captures inside `CapturedReports`, which
keeps the flags that the graph writes, and calls `replayed` after each replay. A graph that was captured without it reads
nothing outside the tables either, but reports no errors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels._capture import CAPTURE

NOTHING = torch.iinfo(torch.int64).max
MAX_PENDING = 64

# Makes the error of a call from the code that a kernel wrote; it may read tensors of the device.
Describe = Callable[[int], Exception]


class Event(Protocol):
    """The methods of torch.cuda.Event that are used here."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class Slot:
    """Receives a code: after the event `arrived`, `code` () int64 holds it in host memory."""

    arrived: Event
    code: Tensor


@dataclass(frozen=True)
class Pending:
    """A call whose code is being copied on a stream. Codes of one stream arrive in the order of the calls."""

    slot: Slot
    describe: Describe
    stream: int


class Queue:
    """The pending calls of each device, in order. Any number of threads may use it; each error is raised once."""

    def __init__(self, limit: int = MAX_PENDING) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._pending: dict[torch.device, list[Pending]] = {}
        self._free: dict[torch.device, list[Slot]] = {}

    def slot(self, device: torch.device) -> Slot | None:
        """A slot that an earlier call no longer needs, or None."""
        with self._lock:
            free = self._free.get(device)
            return free.pop() if free else None

    def add(self, device: torch.device, pending: Pending) -> None:
        with self._lock:
            waiting = self._pending.setdefault(device, [])
            waiting.append(pending)
            oldest = waiting[0] if len(waiting) > self._limit else None
        if oldest is not None:
            oldest.slot.arrived.synchronize()
            self.raise_arrived(device)

    def raise_arrived(self, device: torch.device, wait: bool = False) -> None:
        """Raise the error of the first failed call among those that have arrived; with `wait`, among all calls so far."""
        if not self._pending.get(device):
            return
        if wait:
            with self._lock:
                last = tuple(self._pending[device])
            for pending in last:
                pending.slot.arrived.synchronize()
        with self._lock:
            kept: list[Pending] = []
            late: set[int] = set()  # streams with a call that has not arrived: later ones have not either
            bad: tuple[Pending, int] | None = None
            for pending in self._pending[device]:
                if bad is not None or pending.stream in late or not pending.slot.arrived.query():
                    kept.append(pending)
                    late.add(pending.stream)
                    continue
                code = int(pending.slot.code)
                self._free.setdefault(device, []).append(pending.slot)
                if code != NOTHING:
                    bad = pending, code
            self._pending[device] = kept
        if bad is not None:
            raise bad[0].describe(bad[1])


class CapturedReports:
    """Collects the flags of the calls that are captured inside, and reports them after each replay.

        reports = CapturedReports()
        with reports, torch.cuda.graph(graph):
            model(...)
        graph.replay()
        reports.replayed()

    It keeps the tensors of the captured call, so that an error can name the id. Raise it before they are written again.
    """

    def __init__(self) -> None:
        self._captured: list[tuple[Tensor, Describe]] = []

    def __enter__(self) -> CapturedReports:
        _local.captured = self._captured
        return self

    def __exit__(self, *_: object) -> None:
        _local.captured = None

    def replayed(self, describe: Describe | None = None) -> None:
        """Copy the flags of the replay that was just started on the current stream, as `report` does.

        Args:
            describe: makes the error, instead of the captured call's: when a code arrives, the tensors of the call may
                have been written again.
        """
        for flag, captured in self._captured:
            with torch.cuda.device(flag.device):
                _QUEUE.add(flag.device, _on_its_way(flag, describe or captured))


_QUEUE = Queue()
_local = threading.local()


def report(flag: Tensor, describe: Describe) -> None:
    """Announce that the kernel just launched on the current stream writes a code, or NOTHING, to `flag` () int64.

    `describe(code)` makes the error; it is kept until the code has arrived.
    """
    if not torch.cuda.is_current_stream_capturing():
        _QUEUE.add(flag.device, _on_its_way(flag, describe))
    elif (captured := getattr(_local, "captured", None)) is not None:
        captured.append((flag, describe))


def _on_its_way(flag: Tensor, describe: Describe) -> Pending:
    slot = _QUEUE.slot(flag.device) or _new_slot()
    slot.code.copy_(flag, non_blocking=True)
    stream = torch.cuda.current_stream()
    slot.arrived.record(stream)  # type: ignore[attr-defined]
    return Pending(slot, describe, stream.cuda_stream)


def _new_slot() -> Slot:
    return Slot(torch.cuda.Event(), torch.empty((), dtype=torch.int64, pin_memory=True))


def raise_pending(device: torch.device, wait: bool = False) -> None:
    """Raise the first error that has arrived from a GPU; with `wait`, the first of all calls so far. Not during a capture."""
    # To query an event would end a capture.
    if not torch.cuda.is_current_stream_capturing():
        _QUEUE.raise_arrived(device, wait)


def synchronize(device: torch.device | str | None = None) -> None:
    """Wait for a GPU, and raise the first error of its calls that was not raised yet.

    A model on a GPU does not wait for its kernels, so an id outside its table is found after the call has returned. The error
    is raised by a later call on that device, or here. Calls in a CUDA graph that the caller captured report no errors: their
    kernels read nothing outside the tables either, and embed a bad id as the projection's bias.

    Args:
        device: a GPU, by default the current one. On a CPU errors are raised at once, so there is nothing to wait for.

    Raises:
        IndexError: an id outside its table; the message names table, value and position. If several calls failed, it is the
            error of the first; the next call of `synchronize` raises the next.
    """
    if device is None and not torch.cuda.is_available():
        return
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda":
        return
    if chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    with CAPTURE:
        torch.cuda.synchronize(chosen)
    raise_pending(chosen, wait=True)


@contextmanager
def placing(place: Callable[[int], tuple[int, int]]) -> Iterator[None]:
    """Inside, errors of this thread's calls name the (row, column) that `place(token)` returns for a packed token."""
    _local.place = place
    try:
        yield
    finally:
        _local.place = None


def current_place() -> Callable[[int], str]:
    """The function that says to the user where a packed token is, for the current call."""
    place = getattr(_local, "place", None)
    return str if place is None else lambda token: "{}, {}".format(*place(token))
