"""A model's forward as CUDA graphs: one launch instead of about a hundred, for small batches on a GPU.

A graph is bound to sizes, so it is captured for a bucket: so many tokens, so many sequences, none longer than so much, each
a size or more. What a call leaves over is empty: tokens behind the last sequence, sequences without a token. Attention leaves
such rows as memory came, NaN or not, and nobody reads them: no other operator lets one row see another.

Graphs are captured when a bucket is met for the second time, or ahead by `model.warmup`, share one pool of memory, and are
replayed one after another, whichever streams and threads the calls come from. Weights may change in place; a model that was
moved or converted captures anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import ops
from .packing import Packing

if TYPE_CHECKING:
    from .modeling import ALBERTModel, Encoded

# Graphs that a model keeps; the one that was not used for longest goes first.
MAX_GRAPHS = 64
# Above, a forward's arithmetic takes longer than its launches, and buckets would waste it.
MAX_TOKENS = 16384


def _size_class(n: int, least: int) -> int:
    """The smallest of least, 1.5 least, 2 least, 3 least, 4 least, 6 least ... that is at least n: at most a third is left."""
    size = least
    while size < n:
        size *= 2
    return size * 3 // 4 if size > least and n <= size * 3 // 4 else size


@dataclass(frozen=True)
class Bucket:
    """What a graph is captured for: at most so many tokens in so many sequences of at most so much, and what is asked of it."""

    tokens: int
    sequences: int
    max_seqlen: int
    output_tokens: str
    backend: str = "auto"

    @classmethod
    def of(cls, tokens: int, sequences: int, max_seqlen: int, output_tokens: str, backend: str = "auto") -> Bucket:
        # Attention's tiles change with powers of two alone; a bound that is too high costs it programs without work.
        longest = 1 << (max(max_seqlen, 16) - 1).bit_length()
        return cls(_size_class(tokens, 16), _size_class(sequences, 1), longest, output_tokens, backend)


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

    def begin(self, device: torch.device) -> None:
        """Order this call behind the one before it, which may have been on another stream; raise what that found wrong."""
        ops.raise_pending(device)
        if self._last is not None:
            torch.cuda.current_stream(device).wait_event(self._last)

    def end(self, device: torch.device) -> None:
        self._last = torch.cuda.Event()
        self._last.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """For the last replay: graphs are let go of when nothing runs them."""
        if self._last is not None:
            self._last.synchronize()

    def forget(self) -> None:
        """All graphs are gone, and the pool with them."""
        self._pool = self._stream = None

    def __call__(self, run: Callable[[], Encoded], device: torch.device) -> Replay:
        with ops.CAPTURE, torch.cuda.device(device):
            if self._pool is None or self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            # Kernels are compiled, and libraries make their handles, before anything is recorded.
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            # A graph that uses cuBLAS's workspace of this stream must own it, and nobody else may.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                return _CUDAReplay(run, self._pool, self._stream)
            finally:
                torch._C._cuda_clearCublasWorkspaces()


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


@dataclass
class _Captured:
    ids: Tensor  # (tokens,) int64 of the bucket, like types and positions
    types: Tensor
    positions: Tensor
    cu_seqlens: Tensor  # (sequences + 1,) int32
    graph: Replay


class GraphCache:
    """The graphs of one model. A copy of it, made with a copy of the model, has none."""

    def __init__(self, capture: Any = None, limit: int = MAX_GRAPHS) -> None:
        self._capture, self._limit = CUDACapture() if capture is None else capture, limit
        self._lock = threading.RLock()
        self._graphs: OrderedDict[Bucket, _Captured] = OrderedDict()
        self._met: set[Bucket] = set()
        self._weights: tuple[int, ...] = ()

    def __deepcopy__(self, _memo: Any) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()

    def __len__(self) -> int:
        return len(self._graphs)

    def why_not(self, model: ALBERTModel, tokens: int, device: torch.device) -> str | None:
        """Why a call with so many tokens, on such a device, cannot be a graph; None where it can."""
        if device.type != self._capture.device_type:
            return f"graphs are captured on {self._capture.device_type}, not on {device.type}"
        if device != model.embeddings.word_embeddings.weight.device:
            return "the model is elsewhere"
        if torch.compiler.is_compiling():
            return "a compiler traces the operators"
        if torch.is_grad_enabled() or any(module.training for module in model.modules()):
            return "a gradient may be asked for: torch.no_grad() and eval() say that it is not"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        if not 0 < tokens <= MAX_TOKENS:
            return f"{tokens} tokens: graphs are for 1 to {MAX_TOKENS}"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the caller captures a graph"
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (model.embeddings, model.encoder))
        if hooked or not all(layer.is_plain() for layer in model.encoder.distinct()):
            return "a part has hooks or was replaced"
        return None

    def run(self, model: ALBERTModel, packing: Packing, ids: Tensor, types: Tensor | None, positions: Tensor,
            output_tokens: str) -> Encoded | None:  # fmt: skip
        """The forward of packed ids, types and positions (T,), by replay of its bucket's graph; None where that is met for
        the first time: to capture it costs as much as many calls."""
        device, tokens, sequences = ids.device, len(ids), packing.num_sequences
        bucket = Bucket.of(tokens, sequences, packing.max_seqlen, output_tokens, model.backend)
        # Static tensors are the same for callers in every mode.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._forget_other_weights(model)
            if bucket not in self._graphs and bucket not in self._met:
                self._met.add(bucket)
                return None
            self._capture.begin(device)
            try:
                captured = self._graphs.get(bucket) or self._record(model, bucket, device)
                self._graphs.move_to_end(bucket)
                for static, given in ((captured.ids, ids), (captured.types, types), (captured.positions, positions)):
                    static[:tokens] = 0 if given is None else given
                    static[tokens:] = 0
                captured.cu_seqlens[: sequences + 1] = packing.cu_seqlens
                captured.cu_seqlens[sequences + 1 :] = tokens
                captured.graph.replay(self._describe(model, packing, ids, types, positions))
                static_result = captured.graph.result
                rows, pooled = tokens if output_tokens == "all" else sequences, static_result.pooled
                # Copies: the next replay writes there again.
                return replace(
                    static_result,
                    packing=packing,
                    hidden=static_result.hidden[:rows].clone(),
                    pooled=None if pooled is None else pooled[:sequences].clone(),
                )
            finally:
                self._capture.end(device)

    def _describe(
        self, model: ALBERTModel, packing: Packing, ids: Tensor, types: Tensor | None, positions: Tensor
    ) -> ops.Describe:
        embeddings = model.embeddings
        tables = (embeddings.word_embeddings, embeddings.token_type_embeddings, embeddings.position_embeddings)
        with ops.placing(packing.place):
            return ops.index_error((ids, types, positions), tuple(table.num_embeddings for table in tables))

    def _forget_other_weights(self, model: ALBERTModel) -> None:
        # Rounded weights are buffers.
        weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
        if weights != self._weights:
            if self._graphs:
                self._capture.wait()
                self._graphs.clear()
                self._capture.forget()
            self._weights = weights

    def _record(self, model: ALBERTModel, bucket: Bucket, device: torch.device) -> _Captured:
        ids, types, positions = (torch.zeros(bucket.tokens, dtype=torch.int64, device=device) for _ in range(3))
        # While it is recorded: ids that are in every table, in sequences of one length, for a tuner to have work.
        length = min(bucket.tokens // bucket.sequences, bucket.max_seqlen)
        cu_seqlens = length * torch.arange(bucket.sequences + 1, dtype=torch.int32, device=device)
        packing = Packing(None, cu_seqlens, bucket.max_seqlen, None)

        def run() -> Encoded:
            return model.compute(packing, ids, types, positions, None, False, False, bucket.output_tokens)

        self._graphs[bucket] = _Captured(ids, types, positions, cu_seqlens, self._capture(run, device))
        if len(self._graphs) > self._limit:
            self._capture.wait()
            self._graphs.popitem(last=False)
        return self._graphs[bucket]
