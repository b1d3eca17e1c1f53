"""A model's forward as CUDA graphs: one launch instead of about a hundred, for small batches on a GPU.

A graph is bound to sizes, so it is captured for a bucket: so many tokens, so many sequences, none longer than so much, each
a size or more. What a call leaves over is empty: tokens behind the last sequence, sequences without a token. Attention leaves
such rows as memory came, NaN or not, and nobody reads them: no other operator lets one row see another.

Graphs are captured when a bucket is met for the second time, or ahead by `model.warmup`, share inputs, results and one pool
of memory, and are replayed one after another, whichever streams and threads the calls come from. Weights may change in
place; a model that was moved or converted captures anew. A bucket is of one way to multiply float32, exactly or as TF32:
who asks torch for the other meets other buckets. Further settings of torch are those of the capture.

A call starts one kernel that writes ids, types, positions and lengths where all graphs read them (`ops.GraphInputs`), the
graph, the copy of its report of bad ids, and a copy of hidden states and of pooled ones where there are any: four or five
launches. A mask adds three, the last of which waits for the GPU: its rows are counted before a bucket is chosen. States are
put back among padding in two more.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.adapters import is_hooked
from ..layers.packing import Packing
from ..runtime.registration import is_traced
from .capture import CaptureError, CUDACapture, Replay

if TYPE_CHECKING:
    from ..models.albert import ALBERTModel, Encoded

# Graphs that a model keeps; the one that was not used for longest goes first. Each is its list of launches alone: what it
# reads and writes it shares with the others.
MAX_GRAPHS = 256
# Real ones. Above, launches hide behind arithmetic, and a bucket would waste some of that. Counted for ALBERT-base: 12 layers
# of 7 launches and half a dozen more, 5 us of the host each, are 0.45 ms; a token is 170 MFLOP, at 400 TFLOP/s 0.43 us:
# 1,060 tokens in that time. Four times as many, for hosts that are slower.
MAX_TOKENS = 4096
# Up to here a product hardly fills a GPU (8 x 6 tiles of 128 x 128 for 768 columns): more rows take little more time.
_FEW_TOKENS = 1024
# With padding. The real tokens of a larger batch, hardly ever so few, are not counted: the GPU would be waited for twice.
MAX_PLACES = 4 * MAX_TOKENS


def _size_class(n: int, parts: int) -> int:
    """n, rounded up to a power of two or one of the sizes that cut the way from there to the next into `parts`."""
    below = (1 << max(n - 1, 1).bit_length()) // 2  # the largest power of two that is less than n
    step = max(below // parts, 1)
    return -(-n // step) * step


@dataclass(frozen=True)
class Bucket:
    """What a graph is captured for: at most so many tokens in so many sequences of at most so much, and what is asked of it."""

    tokens: int
    sequences: int
    max_seqlen: int
    output_tokens: str
    backend: str = "auto"
    tf32: bool = field(default_factory=ops.tf32_asked_for)  # how float32 multiplies, in cuBLAS and in our kernels

    @classmethod
    def of(cls, tokens: int, sequences: int, max_seqlen: int, output_tokens: str, backend: str = "auto") -> Bucket:
        # Attention's tiles change with powers of two alone; a bound that is too high costs it programs without work.
        longest = _size_class(max(max_seqlen, 16), 1)
        # Where time follows tokens, at most a sixteenth more is computed. An empty sequence costs next to nothing.
        rows = _size_class(max(tokens, 16), 2 if tokens <= _FEW_TOKENS else 16)
        return cls(rows, _size_class(sequences, 1), longest, output_tokens, backend)

    def too_large(self) -> str | None:
        """Why it is none for a graph. Both limits are sizes of buckets, so that a call is beyond them where its bucket is."""
        if max(self.tokens, self.sequences) <= MAX_TOKENS:
            return None
        return f"more than {MAX_TOKENS} tokens, or sequences: launches hide behind arithmetic"

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.sequences} sequence(s) of at most {self.max_seqlen}"


@dataclass(frozen=True)
class Call:
    """What a forward is asked: ids, types, positions and mask (B, S), or packed (T,) with cu_seqlens (B + 1,) int32."""

    ids: Tensor
    types: Tensor | None
    positions: Tensor | None
    output_tokens: str
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0  # of packed input

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.ids, self.types, self.positions, self.mask, self.cu_seqlens) if t is not None]

    def sizes(self, lengths: Tensor | None) -> tuple[int, int, int]:
        """Tokens, sequences and the longest of them; `lengths` of a mask's rows are waited for."""
        if self.cu_seqlens is not None:
            return len(self.ids), len(self.cu_seqlens) - 1, min(self.max_seqlen, len(self.ids))
        if lengths is None:
            return self.ids.numel(), self.ids.shape[0], self.ids.shape[1]
        counted = lengths.tolist()
        return sum(counted), len(counted), max(counted, default=0)


class _Look(NamedTuple):
    """What a model's parts are like at the moment."""

    training: bool
    hooked: bool
    weights: list[tuple[int, torch.dtype]]  # where they are


class _Parts:
    """A model's parts in one flat list, which a look goes through many times faster than a walk does. Without the root,
    which would be held in a circle."""

    def __init__(self, model: ALBERTModel) -> None:
        self._top = tuple(model._modules.values())
        modules = [module for top in self._top if top is not None for module in top.modules()]
        self._all = [(module, tuple(module._modules.values())) for module in modules]
        self._plain: bool | None = None

    def look(self, model: ALBERTModel) -> _Look | None:
        """None where a part was replaced since."""
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
        return _Look(training, hooked or nn.modules.module._has_any_global_hook(), weights)

    def plain(self, model: ALBERTModel) -> bool:
        """Whether the layers, which have no hooks, are made of what they are known for."""
        if self._plain is None:
            self._plain = all(layer.is_plain() for layer in model.encoder.distinct())
        return self._plain


@cache
def _say(reason: str) -> None:
    # Cached, so that each reason is said once a process.
    warnings.warn(f"albert_fast: no CUDA graphs, although warmup was called: {reason}", stacklevel=2)


class _Results:
    """Where all graphs of a model leave their states, (MAX_TOKENS, H) of each kind: one replay's are copied out before the
    next begins, so that no graph need keep its own."""

    def __init__(self) -> None:
        self._static: dict[str, Tensor] = {}

    def keep(self, encoded: Encoded) -> Encoded:
        pooled = None if encoded.pooled is None else self._kept("pooled", encoded.pooled)
        return replace(encoded, hidden=self._kept("hidden", encoded.hidden), pooled=pooled)

    def _kept(self, kind: str, states: Tensor) -> Tensor:
        if kind not in self._static:  # made by the run ahead of a capture, and so outside the graphs' pool
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
        self._parts: _Parts | None = None
        # A model may be deleted while its last replay runs; at the end of the process nobody is left to care.
        weakref.finalize(self, self._capture.wait).atexit = False

    def __deepcopy__(self, _memo: Any) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()

    def __len__(self) -> int:
        return len(self._graphs)

    def _look(self, model: ALBERTModel) -> _Look:
        parts = self._parts
        if parts is None or (look := parts.look(model)) is None:
            self._parts = parts = _Parts(model)
            look = parts.look(model)
        assert look is not None  # of the parts that were just found
        return look

    def why_not(self, model: ALBERTModel, places: int, device: torch.device) -> str | None:
        """Why a call with so many tokens, padding counted, on such a device, cannot be a graph; None where it can."""
        look = self._look(model)
        return self._beyond(model, look, places, device) or self._avoidable(model, look, device)

    def _beyond(self, model: ALBERTModel, look: _Look, places: int, device: torch.device) -> str | None:
        """What graphs are not for."""
        if is_traced():
            return "a compiler traces the operators"
        if device.type != self._capture.device_type:
            return f"graphs are captured on {self._capture.device_type}, not on {device.type}"
        if device != model.embeddings.word_embeddings.weight.device:
            return "the model is elsewhere"
        if look.training:
            return "the model, or a part of it, is in training mode"
        if not 0 < places <= MAX_PLACES:
            return f"{places} tokens with padding: graphs are for 1 to {MAX_PLACES}"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the caller captures a graph"
        return None

    def _avoidable(self, model: ALBERTModel, look: _Look, device: torch.device) -> str | None:
        """What whoever asked for graphs will want to know."""
        if torch.is_grad_enabled():
            return "a gradient may be asked for: torch.no_grad() says that it is not"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        if look.hooked or self._parts is None or not self._parts.plain(model):
            return "a part has hooks or was replaced"
        reason: str | None = self._capture.why_not(model)
        return reason

    def forecast(self, model: ALBERTModel, bucket: Bucket, places: int, device: torch.device) -> str:
        """What becomes of a call of such a bucket, made as `forecast` is, in a sentence."""
        if reason := self.why_not(model, places, device) or bucket.too_large() or self._refused.get(bucket):
            return f"no CUDA graph: {reason}"
        with self._lock:
            self._forget_other_weights(self._look(model).weights)
            if bucket in self._graphs:
                return f"a replay of the CUDA graph for {bucket}"
            met = bucket in self._met
        return f"{'captured by this call' if met else 'captured by the call after this one'}: a CUDA graph for {bucket}"

    def run(self, model: ALBERTModel, call: Call) -> Encoded | None:
        """The forward by replay of its bucket's graph; None where there is none yet, or can be none."""
        device = call.ids.device
        if device.type != self._capture.device_type:  # warmed up for a GPU, and called on a CPU
            return None
        look = self._look(model)
        if self._beyond(model, look, call.ids.numel(), device) or any(t.device != device for t in call.tensors()):
            return None
        if reason := self._avoidable(model, look, device):
            _say(reason)
            return None
        lengths = None if call.mask is None else call.mask.count_nonzero(1)
        tokens, sequences, longest = call.sizes(lengths)
        bucket = Bucket.of(tokens, sequences, longest, call.output_tokens, model.backend)
        if bucket.too_large():
            return None
        # Static tensors are the same for callers in every mode.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._forget_other_weights(look.weights)
            if not tokens or not self._due(bucket):
                return None
            return self._replayed(model, call, lengths, (tokens, sequences, longest), bucket)

    def _due(self, bucket: Bucket) -> bool:
        """Whether the bucket has a graph, or is met again: to capture it costs as much as many calls."""
        if bucket in self._refused:
            return False
        if bucket in self._graphs or bucket in self._met:
            return True
        self._met.add(bucket)
        return False

    def _replayed(
        self, model: ALBERTModel, call: Call, lengths: Tensor | None, sizes: tuple[int, int, int], bucket: Bucket
    ) -> Encoded | None:
        """The call's forward by its bucket's graph, captured where there is none yet; None where that fails."""
        tokens, sequences, longest = sizes
        self._capture.begin(call.ids.device)
        try:
            graph = self._graphs.get(bucket) or self._record(model, bucket, call.ids.device)
            self._graphs.move_to_end(bucket)
            packing = self._write(call, lengths, (tokens, longest), bucket)
            graph.replay(self._describe(model, packing, call))
            return self._copied(graph.result, packing, tokens, sequences)
        except CaptureError as error:
            self._refused[bucket] = f"the capture failed: {error}"
            _say(self._refused[bucket])
            return None
        finally:
            self._capture.end(call.ids.device)

    def _write(self, call: Call, lengths: Tensor | None, sizes: tuple[int, int], bucket: Bucket) -> Packing:
        """Put the call where graphs read it; how it is packed."""
        assert self._inputs is not None  # made when the first graph was recorded
        (tokens, longest), bounds = sizes, (bucket.tokens, bucket.sequences)
        if call.cu_seqlens is not None:
            self._inputs.write_packed(call.ids, call.types, call.positions, call.cu_seqlens, longest, bounds)
            return Packing(None, call.cu_seqlens, call.max_seqlen, None)
        # Nothing is padding: the mask need not be read.
        mask = None if tokens == call.ids.numel() else call.mask
        padded = call.ids, call.types, call.positions, mask, None if mask is None else lengths
        indices, cu_seqlens = self._inputs.write_padded(*padded, tokens, bounds)
        return Packing(indices, cu_seqlens, longest, (call.ids.shape[0], call.ids.shape[1]))

    def _copied(self, result: Encoded, packing: Packing, tokens: int, sequences: int) -> Encoded:
        """Copies of the bucket's result, without what is left over: the next replay writes there again."""
        pooled = None if result.pooled is None else result.pooled[:sequences].clone()
        if pooled is not None and result.output_tokens == "first":
            # Of first tokens the pooled state alone is read.
            hidden = result.hidden.new_empty(0, result.hidden.shape[1])
        else:
            hidden = result.hidden[: tokens if result.output_tokens == "all" else sequences].clone()
        return type(result)(packing, result.output_tokens, hidden, pooled, None, None)

    def _describe(self, model: ALBERTModel, packing: Packing, call: Call) -> ops.Describe:
        embeddings = model.embeddings
        tables = (embeddings.word_embeddings, embeddings.token_type_embeddings, embeddings.position_embeddings)
        sizes = tuple(table.num_embeddings for table in tables)

        def describe(code: int) -> Exception:
            ids = tuple(None if t is None else packing.gather(t) for t in (call.ids, call.types, call.positions))
            with ops.placing(packing.place):
                return ops.index_error(ids, sizes)(code)

        return describe

    def clear(self) -> None:
        """Let go of all graphs and of their memory."""
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

    def _record(self, model: ALBERTModel, bucket: Bucket, device: torch.device) -> Replay:
        if self._inputs is None:
            self._inputs = ops.GraphInputs(MAX_TOKENS, MAX_PLACES, device)
        # While it is recorded: ids that are in every table, in sequences of one length.
        self._inputs.blank(bucket.tokens, bucket.sequences, bucket.tokens // bucket.sequences)
        ids, types, positions, cu_seqlens = self._inputs.views(bucket.tokens, bucket.sequences)
        packing, results = Packing(None, cu_seqlens, bucket.max_seqlen, None), self._results

        def run() -> Encoded:
            return results.keep(model.compute(packing, ids, types, positions, None, False, False, bucket.output_tokens))

        self._graphs[bucket] = self._capture(run, device)
        if len(self._graphs) > self._limit:
            self._capture.wait()
            gone, _ = self._graphs.popitem(last=False)
            self._met.discard(gone)  # who meets it once more does not capture at once
        return self._graphs[bucket]
