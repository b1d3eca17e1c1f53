"""What kernels found wrong on a GPU, told to Python without making it wait.

A kernel answers a bad id with a code in device memory. `report` has it copied to the host behind the kernel and notes an
event; whoever comes by later raises what has arrived: every embedding_projection on that device before it starts, so every
forward of a model, without waiting, and `synchronize`, which waits. At most MAX_PENDING calls are kept in mind; a host
that runs ahead of a GPU by more waits for the oldest. Words of host memory and events are used again, call after call.

While a CUDA graph is captured there is nothing to copy yet. Whoever replays it captures inside `CapturedReports`, which
keeps the flags that the graph writes, and asks it after each replay; in a graph captured without it bad ids are never
looked up either, and never reported.
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

# What makes the error from the code that a kernel left, knowing the call; it may read tensors of the device.
Describe = Callable[[int], Exception]


class Event(Protocol):
    """A torch.cuda.Event, as far as it is needed here."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class Slot:
    """Where an answer arrives: when `arrived` has happened, `code` () int64 holds it, in host memory."""

    arrived: Event
    code: Tensor


@dataclass(frozen=True)
class Pending:
    """A call whose answer is on its way, on a stream: behind a call of that stream that has not arrived, it has not either."""

    slot: Slot
    describe: Describe
    stream: int


class Queue:
    """The pending calls of each device, in order; for any number of threads, each error is raised once."""

    def __init__(self, limit: int = MAX_PENDING) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._pending: dict[torch.device, list[Pending]] = {}
        self._free: dict[torch.device, list[Slot]] = {}

    def slot(self, device: torch.device) -> Slot | None:
        """One that an earlier call has done with, or None."""
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
        """Raise the error of the first call that went wrong among those that have arrived; `wait` for all of them."""
        if not self._pending.get(device):
            return
        if wait:
            with self._lock:
                last = tuple(self._pending[device])
            for pending in last:
                pending.slot.arrived.synchronize()
        with self._lock:
            kept: list[Pending] = []
            late: set[int] = set()  # streams, of which the rest need not be asked
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
    """The reports of what is captured inside, to be asked for after each replay.

        reports = CapturedReports()
        with reports, torch.cuda.graph(graph):
            model(...)
        graph.replay()
        reports.replayed()

    The tensors of the captured call are kept, so that an error can name the id: read it before they are written again.
    """

    def __init__(self) -> None:
        self._captured: list[tuple[Tensor, Describe]] = []

    def __enter__(self) -> CapturedReports:
        _local.captured = self._captured
        return self

    def __exit__(self, *_: object) -> None:
        _local.captured = None

    def replayed(self, describe: Describe | None = None) -> None:
        """Have the flags of the replay that was just started on the current stream copied, as `report` does.

        `describe` makes the error instead of what the captured call would: by the time that a code arrives its tensors may
        have been written again.
        """
        for flag, captured in self._captured:
            with torch.cuda.device(flag.device):
                _QUEUE.add(flag.device, _on_its_way(flag, describe or captured))


_QUEUE = Queue()
_local = threading.local()


def report(flag: Tensor, describe: Describe) -> None:
    """Note that the kernel just launched on the current stream leaves a code in `flag` (), int64, or NOTHING.

    `describe(code)` makes the error; what it refers to is kept until the code has arrived.
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
    """Raise the first error that has arrived from a GPU; with `wait`, of all calls so far. Nothing while capturing."""
    # An event may not be asked during a capture: that would end it.
    if not torch.cuda.is_current_stream_capturing():
        _QUEUE.raise_arrived(device, wait)


def synchronize(device: torch.device | str | None = None) -> None:
    """Wait for a GPU, and raise what calls on it found wrong that nobody was told of yet.

    A model on a GPU does not wait for its kernels, so an id outside its table is found after the call has returned. It is
    raised by a later call on that device, or here. Calls that were captured into a CUDA graph of the caller's own tell
    nobody: their kernels stay within the tables all the same, and embed a bad id as the projection's bias.

    Args:
        device: a GPU, default the current one. On a CPU, where errors are raised at once, there is nothing to wait for.

    Raises:
        IndexError: an id outside its table; names table, value and place. Where several calls went wrong, that of the
            first; the next call of `synchronize` raises the next.
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
    """Inside, errors of this thread's calls name `place(token)`, (row, column), instead of the packed token."""
    _local.place = place
    try:
        yield
    finally:
        _local.place = None


def current_place() -> Callable[[int], str]:
    """How the call that is being made says where a packed token stands."""
    place = getattr(_local, "place", None)
    return str if place is None else lambda token: "{}, {}".format(*place(token))
