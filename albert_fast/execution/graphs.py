"""A model's forward as CUDA graphs: one launch instead of about a hundred, for small batches on a GPU.

A graph has fixed sizes, so it is captured for a bucket: a number of tokens, of sequences, and a longest sequence, each at least
the call's own. The rest of a bucket is empty: tokens behind the last sequence, and sequences without a token. Attention does
not write those rows; nothing reads them, because no other operator mixes rows.

A graph is captured when its bucket comes for the second time, or ahead by `model.warmup`. The graphs of a model share
inputs, results and one pool of memory, and are replayed one after another, whichever streams and threads the calls come from.
Weights may change in place; a model that was moved or converted captures again. A bucket belongs to one way of multiplying
float32, exactly or as TF32: a caller who asks torch for the other gets other buckets. All other settings of torch are those
of the capture.

A call launches four or five kernels: one that writes ids, types, positions and lengths where all graphs read them
(`ops.GraphInputs`), the graph, the copy of its report of bad ids, and copies of hidden states and of pooled ones where there
are any. A mask adds three, the last of which waits for the GPU: its rows are counted before a bucket is chosen. Putting states
back among padding takes two more.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.adapters import is_hooked
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs
from ..layers.packing import Packing
from ..layers.wanted import WantedTokens
from ..runtime.registration import is_traced
from .capture import CaptureError, CUDACapture, Encoder, Replay

# Graphs that a model keeps; the least recently used one is dropped first. A graph is its list of launches alone: it shares what
# it reads and writes with the others.
MAX_GRAPHS = 256
# Real tokens. Above this number launches hide behind arithmetic, and a bucket would waste some of it. Counted for ALBERT-base: 12
# layers of 7 launches and half a dozen more, 5 us of the host each, are 0.45 ms; a token is 170 MFLOP, at 400 TFLOP/s 0.43 us:
# 1,060 tokens in that time. The limit is four times as many, for slower hosts.
MAX_TOKENS = 4096
# Up to here a product hardly fills a GPU (8 x 6 tiles of 128 x 128 for 768 columns): more rows take little more time.
_FEW_TOKENS = 1024
# Tokens with padding. A larger batch hardly ever has so few real tokens, and counting them would wait for the GPU twice.
MAX_PLACES = 4 * MAX_TOKENS


def _size_class(n: int, parts: int) -> int:
    """n, rounded up to a power of two or to one of the `parts` even steps between two powers of two."""
    below = (1 << max(n - 1, 1).bit_length()) // 2  # the largest power of two that is less than n
    step = max(below // parts, 1)
    return -(-n // step) * step


@dataclass(frozen=True)
class Bucket:
    """The sizes that a graph is captured for, and what it computes: wanted_tokens is "all" or "first"."""

    tokens: int
    sequences: int
    max_seqlen: int
    wanted_tokens: str
    backend: str = "auto"
    tf32: bool = field(default_factory=ops.tf32_asked_for)  # how float32 multiplies, in cuBLAS and in our kernels

    @classmethod
    def of(cls, tokens: int, sequences: int, max_seqlen: int, wanted_tokens: str, backend: str = "auto") -> Bucket:
        """The bucket of a call."""
        # Attention's tiles change only with powers of two; a bound that is too high costs it programs without work.
        longest = _size_class(max(max_seqlen, 16), 1)
        # Where time grows with tokens, at most a sixteenth more is computed. An empty sequence costs next to nothing.
        rows = _size_class(max(tokens, 16), 2 if tokens <= _FEW_TOKENS else 16)
        return cls(rows, _size_class(sequences, 1), longest, wanted_tokens, backend)

    def too_large(self) -> str | None:
        """Why no graph has this size. Both limits are sizes of buckets: a call is beyond them where its bucket is."""
        if max(self.tokens, self.sequences) <= MAX_TOKENS:
            return None
        return f"more than {MAX_TOKENS} tokens, or sequences: launches hide behind arithmetic"

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.sequences} sequence(s) of at most {self.max_seqlen}"


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs if isinstance(tensor, Tensor)]


def _ids(inputs: Inputs) -> Tensor:
    assert inputs.input_ids is not None, "graphs read ids"
    return inputs.input_ids


def _sizes(inputs: Inputs, lengths: Tensor | None) -> tuple[int, int, int]:
    """Tokens, sequences and the longest of them. `lengths` (B,) of a mask's rows are waited for."""
    ids = _ids(inputs)
    if inputs.cu_seqlens is not None:
        return len(ids), len(inputs.cu_seqlens) - 1, min(inputs.max_seqlen, len(ids))
    if lengths is None:
        return ids.numel(), ids.shape[0], ids.shape[1]
    counted = lengths.tolist()
    return sum(counted), len(counted), max(counted, default=0)


class _Snapshot(NamedTuple):
    """What decides whether a model's graphs may be replayed, at one moment."""

    training: bool
    hooked: bool
    weights: list[tuple[int, torch.dtype]]  # address and dtype of every parameter and buffer


class _Modules:
    """A model's modules in one flat list, which is read many times faster than the tree. It leaves out the root: a model that
    was part of its own list would never be freed."""

    def __init__(self, model: Encoder) -> None:
        self._top = tuple(model._modules.values())
        modules = [module for top in self._top if top is not None for module in top.modules()]
        self._all = [(module, tuple(module._modules.values())) for module in modules]
        self._plain: bool | None = None

    def snapshot(self, model: Encoder) -> _Snapshot | None:
        """None where a module was replaced since the list was made."""
        if tuple(model._modules.values()) != self._top:
            return None
        training, hooked, weights = model.training, False, []
        for module, children in self._all:
            if tuple(module._modules.values()) != children:
                return None
            training = training or module.training
            hooked = hooked or is_hooked(module)
            for tensor in (*module._parameters.values(), *module._buffers.values()):  # rounded weights are buffers
                if tensor is not None:
                    weights.append((tensor.data_ptr(), tensor.dtype))
        return _Snapshot(training, hooked or nn.modules.module._has_any_global_hook(), weights)

    def plain(self, model: Encoder) -> bool:
        """Whether the layers, which have no hooks, are made of the modules that graphs know."""
        if self._plain is None:
            self._plain = all(layer.is_plain() for layer in model.encoder.distinct())
        return self._plain


@cache
def _say(reason: str) -> None:
    # The cache makes a process say each reason once.
    warnings.warn(f"albert_fast: no CUDA graphs, although warmup was called: {reason}", stacklevel=2)


class _Results:
    """The memory into which all graphs of a model write their states, (MAX_TOKENS, H) of each kind. One replay's states are
    copied out before the next replay begins, so that no graph keeps memory of its own."""

    def __init__(self) -> None:
        self._static: dict[str, Tensor] = {}

    def keep(self, encoded: Encoded) -> Encoded:
        pooled = None if encoded.pooled is None else self._kept("pooled", encoded.pooled)
        return replace(encoded, hidden=self._kept("hidden", encoded.hidden), pooled=pooled)

    def _kept(self, kind: str, states: Tensor) -> Tensor:
        if kind not in self._static:  # made by the run before a capture, outside of the graphs' pool
            self._static[kind] = states.new_empty(MAX_TOKENS, states.shape[1])
        return self._static[kind][: len(states)].copy_(states)


class GraphCache:
    """The graphs of one model. A copy of it, made with a copy of the model, has none."""

    def __init__(self, capture: Any = None, limit: int = MAX_GRAPHS) -> None:
        self._capture, self._limit = CUDACapture() if capture is None else capture, limit
        self._lock = threading.RLock()
        self._graphs: OrderedDict[Bucket, Replay] = OrderedDict()
        self._inputs: ops.GraphInputs | None = None
        self._results = _Results()
        self._met: set[Bucket] = set()
        self._refused: dict[Bucket, str] = {}
        self._weights: list[tuple[int, torch.dtype]] = []
        self._modules: _Modules | None = None
        # A model may be deleted while its last replay runs. At the end of the process this does not matter.
        weakref.finalize(self, self._capture.wait).atexit = False

    def __deepcopy__(self, _memo: Any) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()

    def __len__(self) -> int:
        return len(self._graphs)

    def _snapshot(self, model: Encoder) -> _Snapshot:
        modules = self._modules
        if modules is None or (snapshot := modules.snapshot(model)) is None:
            self._modules = modules = _Modules(model)
            snapshot = modules.snapshot(model)
        assert snapshot is not None  # of the modules that were just listed
        return snapshot

    def why_not(self, model: Encoder, places: int, device: torch.device) -> str | None:
        """Why a call of `places` tokens, padding counted, on `device` cannot be a graph; None where it can."""
        snapshot = self._snapshot(model)
        return self._beyond(model, snapshot, places, device) or self._avoidable(model, snapshot, device)

    def _beyond(self, model: Encoder, snapshot: _Snapshot, places: int, device: torch.device) -> str | None:
        """Why graphs are not meant for such a call."""
        if is_traced():
            return "a compiler traces the operators"
        if device.type != self._capture.device_type:
            return f"graphs are captured on {self._capture.device_type}, not on {device.type}"
        if device != model.embeddings.word_embeddings.weight.device:
            return "the model is elsewhere"
        if snapshot.training:
            return "the model, or a part of it, is in training mode"
        if not 0 < places <= MAX_PLACES:
            return f"{places} tokens with padding: graphs are for 1 to {MAX_PLACES}"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the caller captures a graph"
        return None

    def _avoidable(self, model: Encoder, snapshot: _Snapshot, device: torch.device) -> str | None:
        """Why a call that could be a graph is not one: the caller is told once."""
        if torch.is_grad_enabled():
            return "gradients are enabled; under torch.no_grad() calls replay graphs"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        if snapshot.hooked or self._modules is None or not self._modules.plain(model):
            return "a part has hooks or was replaced"
        reason: str | None = self._capture.why_not(model)
        return reason

    def forecast(self, model: Encoder, bucket: Bucket, places: int, device: torch.device) -> str:
        """What happens to a call of this bucket, under the modes that are on now, in a sentence."""
        if reason := self.why_not(model, places, device) or bucket.too_large() or self._refused.get(bucket):
            return f"no CUDA graph: {reason}"
        with self._lock:
            self._forget_other_weights(self._snapshot(model).weights)
            if bucket in self._graphs:
                return f"a replay of the CUDA graph for {bucket}"
            met = bucket in self._met
        return f"{'captured by this call' if met else 'captured by the call after this one'}: a CUDA graph for {bucket}"

    def run(self, model: Encoder, inputs: Inputs, wanted: WantedTokens) -> Encoded | None:
        """The forward as a replay of its bucket's graph; None where there is none yet, or can be none."""
        ids = _ids(inputs)
        device, mask = ids.device, inputs.attention_mask
        if device.type != self._capture.device_type:  # warmed up for a GPU, called on a CPU
            return None
        snapshot = self._snapshot(model)
        if self._beyond(model, snapshot, ids.numel(), device) or any(t.device != device for t in _tensors(inputs)):
            return None
        if reason := self._avoidable(model, snapshot, device):
            _say(reason)
            return None
        lengths = None if mask is None else mask.count_nonzero(1)
        tokens, sequences, longest = _sizes(inputs, lengths)
        bucket = Bucket.of(tokens, sequences, longest, wanted.which, model.execution_state.backend)
        if bucket.too_large():
            return None
        # Graphs' tensors are made the same for callers in every mode.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._forget_other_weights(snapshot.weights)
            if not tokens or not self._due(bucket):
                return None
            return self._replayed(model, inputs, lengths, (tokens, sequences, longest), bucket)

    def _due(self, bucket: Bucket) -> bool:
        """Whether the bucket has a graph or comes for the second time: a capture costs as much as many calls."""
        if bucket in self._refused:
            return False
        if bucket in self._graphs or bucket in self._met:
            return True
        self._met.add(bucket)
        return False

    def _replayed(
        self, model: Encoder, inputs: Inputs, lengths: Tensor | None, sizes: tuple[int, int, int], bucket: Bucket
    ) -> Encoded | None:
        """The forward by its bucket's graph, which is captured if need be; None where that fails."""
        tokens, sequences, longest = sizes
        self._capture.begin(_ids(inputs).device)
        try:
            graph = self._graphs.get(bucket) or self._record(model, bucket, _ids(inputs).device)
            self._graphs.move_to_end(bucket)
            packing = self._write(inputs, lengths, (tokens, longest), bucket)
            graph.replay(self._describe(model, packing, inputs))
            return self._copied(graph.result, packing, tokens, sequences)
        except CaptureError as error:
            self._refused[bucket] = f"the capture failed: {error}"
            _say(self._refused[bucket])
            return None
        finally:
            self._capture.end(_ids(inputs).device)

    def _write(self, inputs: Inputs, lengths: Tensor | None, sizes: tuple[int, int], bucket: Bucket) -> Packing:
        """Write the inputs where graphs read them; returns their packing."""
        assert self._inputs is not None  # made when the first graph was recorded
        (tokens, longest), bounds, ids = sizes, (bucket.tokens, bucket.sequences), _ids(inputs)
        types, positions = inputs.token_type_ids, inputs.position_ids
        if inputs.cu_seqlens is not None:
            self._inputs.write_packed(ids, types, positions, inputs.cu_seqlens, longest, bounds)
            return Packing(None, inputs.cu_seqlens, inputs.max_seqlen, None)
        # Without padding the mask need not be read.
        mask = None if tokens == ids.numel() else inputs.attention_mask
        padded = ids, types, positions, mask, None if mask is None else lengths
        indices, cu_seqlens = self._inputs.write_padded(*padded, tokens, bounds)
        return Packing(indices, cu_seqlens, longest, (ids.shape[0], ids.shape[1]))

    def _copied(self, result: Encoded, packing: Packing, tokens: int, sequences: int) -> Encoded:
        """Copies of the call's part of the bucket's result: the next replay writes there again."""
        pooled = None if result.pooled is None else result.pooled[:sequences].clone()
        if pooled is not None and result.wanted.which == "first":
            # Only the pooled states of first tokens are read.
            hidden = result.hidden.new_empty(0, result.hidden.shape[1])
        else:
            hidden = result.hidden[: tokens if result.wanted.which == "all" else sequences].clone()
        return Encoded(packing, result.wanted, hidden, pooled)

    def _describe(self, model: Encoder, packing: Packing, inputs: Inputs) -> ops.Describe:
        sizes = model.embeddings.sizes()

        def describe(code: int) -> Exception:
            given = inputs.input_ids, inputs.token_type_ids, inputs.position_ids
            ids = tuple(None if t is None else packing.gather(t) for t in given)
            with ops.placing(packing.locate):
                return ops.index_error(ids, sizes)(code)

        return describe

    def clear(self) -> None:
        """Free all graphs and their memory."""
        with self._lock:
            self._let_go()
            self._met.clear()
            self._refused.clear()

    def _forget_other_weights(self, weights: list[tuple[int, torch.dtype]]) -> None:
        if weights != self._weights:
            if self._graphs or self._inputs is not None:
                self._let_go()
            self._refused.clear()
            self._weights = weights

    def _let_go(self) -> None:
        self._capture.wait()
        self._graphs.clear()
        self._inputs, self._results = None, _Results()
        self._capture.forget()

    def _record(self, model: Encoder, bucket: Bucket, device: torch.device) -> Replay:
        if self._inputs is None:
            self._inputs = ops.GraphInputs(MAX_TOKENS, MAX_PLACES, device)
        # The capture runs on ids that are in every table, in sequences of one length.
        self._inputs.blank(bucket.tokens, bucket.sequences, bucket.tokens // bucket.sequences)
        ids, types, positions, cu_seqlens = self._inputs.views(bucket.tokens, bucket.sequences)
        packing, results = Packing(None, cu_seqlens, bucket.max_seqlen, None), self._results
        inputs, wanted = Inputs(ids, None, types, positions), WantedTokens(bucket.wanted_tokens)

        def run() -> Encoded:
            return results.keep(model.compute(packing, inputs, wanted))

        self._graphs[bucket] = self._capture(run, device)
        if len(self._graphs) > self._limit:
            self._capture.wait()
            gone, _ = self._graphs.popitem(last=False)
            self._met.discard(gone)  # it must come twice again before it is captured again
        return self._graphs[bucket]
