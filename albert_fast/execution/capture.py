"""One capture of a CUDA graph and its replays: streams, the pool of memory, the order of calls, reports of bad ids."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .. import ops
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs
from ..layers.packing import Packing
from ..layers.stack import LayerStack
from ..layers.wanted import WantedTokens
from ..runtime import dispatch

# The operators of a forward, after the embeddings, whose references would wait for the GPU, to look at lengths and ids.
_OPERATORS = ("attention", "linear_gelu", "add_layer_norm")


class Encoder(Protocol):
    """What captures and graphs need of a model."""

    training: bool
    embeddings: Any
    execution_state: Any
    _modules: dict[str, Any]

    @property
    def encoder(self) -> LayerStack:
        """The layers."""

    def compute(self, packing: Packing, inputs: Inputs, wanted: WantedTokens) -> Encoded:
        """The forward, operator by operator."""


class CaptureError(RuntimeError):
    """A graph could not be captured; the forward itself runs."""


class Replay(Protocol):
    """A captured forward: `replay` computes `result` again from the present contents of the tensors it was captured with."""

    result: Encoded

    def replay(self, describe: ops.Describe) -> None:
        """Compute again. `describe` makes the error for a bad id among the present contents."""


class CUDACapture:
    """Captures on a GPU, into one pool of memory."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Event | None = None  # after the last replay and the copies of its result

    def why_not(self, model: Encoder) -> str | None:
        """Why the model's operators cannot be captured."""
        dtype = model.embeddings.word_embeddings.weight.dtype
        operators = (model.embeddings.operator, *_OPERATORS)
        for op in ("quantized_encoder", *operators) if model.encoder.quantized else operators:
            if dispatch.resolve(op, self.device_type, dtype, model.execution_state.backend) == "reference":
                return f"{op} runs on backend 'reference', which waits for the GPU"
        return None

    def begin(self, device: torch.device) -> None:
        """Order this call after the one before it, which may be on another stream; raise the errors that it found."""
        ops.raise_pending(device)
        if self._last is not None:
            torch.cuda.current_stream(device).wait_event(self._last)

    def end(self, device: torch.device) -> None:
        if self._last is None:
            self._last = torch.cuda.Event()
        self._last.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait for the last replay, so that graphs and their tensors can be freed."""
        # Waiting inside a capture (the garbage collector may free a model there) would end the capture.
        if self._last is not None and not torch.cuda.is_current_stream_capturing():
            self._last.synchronize()

    def forget(self) -> None:
        """Drop the pool, after all graphs were freed."""
        self._pool = self._stream = self._last = None

    def __call__(self, run: Callable[[], Encoded], device: torch.device) -> Replay:
        # Set the current stream again: a capture that fails leaves its own stream the current one.
        with ops.CAPTURE, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # The first run compiles kernels and lets libraries make their handles before anything is recorded.
            run()
            if self._pool is None or self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), _own_stream(device)
            try:
                return _CUDAReplay(run, self._pool, self._stream)
            except RuntimeError as error:
                # torch leaves pool and stream, like its random generator, in the state of a capture.
                self._pool = self._stream = None
                raise CaptureError(str(error).partition("\n")[0]) from error


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A new stream for the captures into one pool, on which no other work runs.

    torch gives each stream a cuBLAS workspace when a product first needs one, and a graph holds its address. If the first
    product runs inside a capture, the workspace is in the graphs' pool: it lives as long as the graphs, even if someone clears
    torch's workspaces, and we need not clear those of others. `torch.cuda.Stream` does not work: it hands out 32 streams in
    turn, each with the workspace of its last user. The stream is never destroyed: a new stream could get its address, under
    which torch keeps the workspace of a freed pool.
    """
    stream = ctypes.c_void_p()
    nonblocking = 1  # CU_STREAM_NON_BLOCKING: other threads may launch on the default stream during a capture
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
        # Other threads go on allocating during the capture.
        capture = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with self._reports, capture:
            self.result = run()

    def replay(self, describe: ops.Describe) -> None:
        self._graph.replay()
        self._reports.replayed(describe)
