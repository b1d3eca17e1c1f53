"""One capture of a CUDA graph and its replays: streams, the pool of memory, the order of calls, reports of bad ids."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .. import ops
from ..runtime import dispatch

if TYPE_CHECKING:
    from ..models.albert import ALBERTModel, Encoded

# What a forward runs of which the reference would wait for the GPU, to look at lengths and ids.
_OPERATORS = ("embedding_projection", "attention", "linear_gelu", "add_layer_norm")


class CaptureError(RuntimeError):
    """A graph could not be captured; the forward itself runs."""


class Replay(Protocol):
    """A captured forward: `result` is rewritten by `replay`, from what then stands in the tensors it was captured with."""

    result: Encoded

    def replay(self, describe: ops.Describe) -> None:
        """`describe` makes the error for a bad id among those that the tensors hold now."""


class CUDACapture:
    """Captures on a GPU, into one pool of memory."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Event | None = None  # behind the last replay and what was copied out of it

    def why_not(self, model: ALBERTModel) -> str | None:
        """Why the model's operators cannot be captured."""
        dtype = model.embeddings.word_embeddings.weight.dtype
        for op in ("quantized_encoder", *_OPERATORS) if model.encoder.quantized else _OPERATORS:
            if dispatch.resolve(op, self.device_type, dtype, model.backend) == "reference":
                return f"{op} runs on backend 'reference', which waits for the GPU"
        return None

    def begin(self, device: torch.device) -> None:
        """Order this call behind the one before it, which may have been on another stream; raise what that found wrong."""
        ops.raise_pending(device)
        if self._last is not None:
            torch.cuda.current_stream(device).wait_event(self._last)

    def end(self, device: torch.device) -> None:
        if self._last is None:
            self._last = torch.cuda.Event()
        self._last.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """For the last replay: graphs, and what they read, are let go of when nothing runs them."""
        # A model that is found dead during a capture would end it.
        if self._last is not None and not torch.cuda.is_current_stream_capturing():
            self._last.synchronize()

    def forget(self) -> None:
        """All graphs are gone, and the pool with them."""
        self._pool = self._stream = self._last = None

    def __call__(self, run: Callable[[], Encoded], device: torch.device) -> Replay:
        # The stream is set once more because a capture that fails leaves its own the current one.
        with ops.CAPTURE, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # Kernels are compiled, and libraries make their handles, before anything is recorded.
            run()
            if self._pool is None or self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), _own_stream(device)
            try:
                return _CUDAReplay(run, self._pool, self._stream)
            except RuntimeError as error:
                # torch leaves them, like its generator of random numbers, as in a capture.
                self._pool = self._stream = None
                raise CaptureError(str(error).partition("\n")[0]) from error


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream on which nothing ran and nobody else's work ever will, for the captures into one pool.

    torch gives each stream a workspace for cuBLAS when a product first asks for one, and a graph has its address. Asked for in
    a capture it lies in the graphs' pool: it lives as long as they do, whoever clears torch's workspaces meanwhile, and
    ours need not clear those of others, which graphs of their own may hold. `torch.cuda.Stream` would not do: it deals out 32
    streams in turn, each with the workspace of whoever had it before. Never destroyed: a new stream may get an old one's
    address, under which torch keeps the workspace of a pool that is gone.
    """
    stream = ctypes.c_void_p()
    nonblocking = 1  # CU_STREAM_NON_BLOCKING: others may launch on the default stream during a capture
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CaptureError(str(error)) from error
    if code := driver.cuStreamCreate(ctypes.byref(stream), nonblocking):
        raise CaptureError(f"cuStreamCreate returned {code}")
    return torch.cuda.ExternalStream(stream.value, device)


class _CUDAReplay:
    def __init__(self, run: Callable[[], Encoded], pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph, self._reports = torch.cuda.CUDAGraph(), ops.CapturedReports()
        # Other threads go on allocating meanwhile.
        capture = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with self._reports, capture:
            self.result = run()

    def replay(self, describe: ops.Describe) -> None:
        self._graph.replay()
        self._reports.replayed(describe)
