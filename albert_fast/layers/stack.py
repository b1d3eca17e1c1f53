"""A stack of layers: all in one call of an operator where that computes the same, else layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..runtime import dispatch
from ..runtime.registration import is_traced
from ..runtime.unused_gradients import watch_graph
from .adapters import is_hooked
from .attention import FusedQKV
from .layer import Layer, fused_ahead
from .packed import PackedLinear, packed_in
from .packing import Packing
from .prepared import Prepared, quantized_layers
from .quantized import QuantizedLinear
from .run import Run
from .spec import LayerSpec
from .wanted import WantedRows, take

_MAY_NEED_GRADIENT = "gradients are enabled; under torch.no_grad() all layers run in one call"
_NOT_FASTER = (
    "the persistent kernel was not measured to be faster here; ALBERT_FAST_TUNE=1 measures it, backend='triton' uses it "
    "without measuring"
)


class LayerStack(nn.Module):
    """Layers that run one after another; a layer may run at several steps.

    Layers come in groups (one group is one layer, but for ALBERT's inner groups). A subclass names the modules as its family
    of models does and lists them in `groups`.

    Args:
        spec: of every layer.
        group_indices: the group that runs at each step.
        group_size: layers in a group.
    """

    def __init__(self, spec: LayerSpec, group_indices: Sequence[int], group_size: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.group_indices = tuple(group_indices)
        self._prepared = Prepared()
        self.layer_indices = [g * group_size + inner for g in self.group_indices for inner in range(group_size)]

    def groups(self) -> Sequence[LayerGroup]:
        """The distinct groups of layers."""
        raise NotImplementedError

    def distinct(self) -> list[Layer]:
        """The layers that have weights of their own, group after group; `layer_indices` counts them."""
        return [layer for group in self.groups() for layer in group.layers()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for packed in packed_in(self):  # before any part has moved
            packed.check_stays(fn)
        return super()._apply(fn, recurse)

    def forward(self, hidden: Tensor, packing: Packing, wanted: WantedRows | None = None, run: Run = Run()) -> Tensor:  # noqa: B008
        """(T, H) -> (T, H), or (Tq, H) for the rows that are wanted."""
        if self.quantized is not None:
            return self._quantized(hidden, packing, wanted, run)
        if self.is_packed:
            return self._packed(hidden, packing, wanted, run)
        if run.collects or run.listen is not None or packing.has_own_keys:
            return self._by_operators(hidden, packing, wanted, run)

        def on(backend: str) -> Tensor:
            if backend == "operators":
                return self._by_operators(hidden, packing, wanted, run)
            return self._one_call(hidden, packing, wanted, backend)

        reason = self.why_not_one_call(hidden, run.backend, on)
        out = on(run.backend if reason is None else "operators")
        if reason == _MAY_NEED_GRADIENT and out.device.type == "cpu":
            watch_graph(out)
        return out

    def _by_operators(self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run) -> Tensor:
        """Layer by layer: with a gradient, with dropout, or to collect what lies between the layers."""
        if run.states is not None:
            run.states.append(hidden)
        # A compiled graph's partitioner decides what to recompute; torch cannot trace checkpoints of changing lengths.
        if not torch.is_grad_enabled() or is_traced():
            run = run._replace(recompute="nothing")
        last_wanted = None if run.collects else wanted
        groups = self.groups()
        # Once a forward for each distinct layer, however often it runs.
        fused = [None if is_hooked(group) else list(map(fused_ahead, group.layers())) for group in groups]
        last = len(self.group_indices) - 1
        for step, number in enumerate(self.group_indices):
            group = groups[number]
            call = group if is_hooked(group) else group.forward  # calling a module costs as much as a launch
            hidden = call(hidden, packing, last_wanted if step == last else None, run, fused[number])
        return hidden if wanted is None or last_wanted is not None else take(hidden, wanted.rows)

    def _one_call(self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, backend: str) -> Tensor:
        """All layers as the operator `encoder`; `why_not_one_call` has just found them plain."""
        wanted_rows, cu_wanted = (None, None) if wanted is None else (wanted.rows, wanted.cu_seqlens)
        distinct = self.distinct()
        return ops.encoder(
            hidden,
            self._prepared.weights(),
            self.layer_indices,
            packing.cu_seqlens,
            wanted_rows,
            cu_wanted,
            *distinct[0].numbers(),
            backend=backend,
        )

    def _quantized(self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run) -> Tensor:
        """All layers as the operator `quantized_encoder`; one call a layer where the states between them are collected."""
        self._check_quantized(hidden, run)
        if run.states is None:
            return self._quantized_call(hidden, packing, wanted, self.layer_indices, run.backend)
        run.states.append(hidden)
        for number in self.layer_indices:
            hidden = self._quantized_call(hidden, packing, None, [number], run.backend)
            run.states.append(hidden)
        return hidden if wanted is None else take(hidden, wanted.rows)

    def _quantized_call(
        self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, layer_indices: list[int], backend: str
    ) -> Tensor:
        distinct = self.distinct()
        wanted_rows, cu_wanted, max_wanted = (None, None, None) if wanted is None else wanted
        numbers = distinct[0].numbers()
        call = ops.EncoderCall(hidden, layer_indices, packing.cu_seqlens, wanted_rows, cu_wanted, *numbers)
        longest = packing.max_seqlen
        most = longest if max_wanted is None else max_wanted
        options = ops.QuantizedOptions(packing.sequence_order, longest, most, distinct[0].up.precision, backend)
        # `_check_quantized` has just found the layers plain.
        layers = quantized_layers(distinct) if is_traced() else self._prepared.quantized()
        return ops.run_quantized_encoder(layers, call, options)

    def _packed(self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, run: Run) -> Tensor:
        """All layers as the operator `encoder` on packed matrices; one call a layer where the states between are collected."""
        self._check_packed(hidden, run)
        if run.states is None:
            return self._packed_call(hidden, packing, wanted, self.layer_indices)
        run.states.append(hidden)
        for number in self.layer_indices:
            hidden = self._packed_call(hidden, packing, None, [number])
            run.states.append(hidden)
        return hidden if wanted is None else take(hidden, wanted.rows)

    def _packed_call(
        self, hidden: Tensor, packing: Packing, wanted: WantedRows | None, layer_indices: list[int]
    ) -> Tensor:
        distinct = self.distinct()
        wanted_rows, cu_wanted = (None, None) if wanted is None else (wanted.rows, wanted.cu_seqlens)
        numbers = distinct[0].numbers()
        call = ops.EncoderCall(hidden, layer_indices, packing.cu_seqlens, wanted_rows, cu_wanted, *numbers)
        vectors, packed = [layer.packed_vectors() for layer in distinct], [layer.up.packed for layer in distinct]
        return ops.packed_encoder(vectors, packed, self.spec.intermediate_size, call)

    # Which of these ways a call takes

    @property
    def quantized(self) -> str | None:
        """The precision that the layers' weights were rounded to, "int8" say; None where they are floats."""
        first: Any = self.groups()[0].layers()[0].up
        return first.precision if isinstance(first, QuantizedLinear) else None

    @property
    def is_packed(self) -> bool:
        """Whether only the packed matrices of the layers are kept: see `Layer.place_packed`."""
        return isinstance(self.groups()[0].layers()[0].up, PackedLinear)

    def is_plain(self) -> bool:
        """Whether the layers compute exactly what the encoder operators do: see `Layer.is_plain`; no group has hooks."""
        distinct = self.distinct()
        if is_traced():  # a compiler cannot follow the flat lists
            return not any(map(is_hooked, self.groups())) and all(layer.is_plain() for layer in distinct)
        return self.prepared(distinct).plain

    def prepared(self, distinct: Sequence[Layer]) -> Prepared:
        """What is known of the `distinct` layers, found out again where one of them or a group changed."""
        prepared = self._prepared
        if not prepared.is_current(distinct):
            prepared = self._prepared = Prepared(distinct, self.groups())
        return prepared

    def why_not_one_call(self, hidden: Tensor, backend: str, run: Callable[[str], Tensor] | None = None) -> str | None:
        """Why the `encoder` operator does not run all layers on states (T, H) such as `hidden`; None where it does.

        On a CPU it is C++, for "auto" and "cpp". On a GPU it is one persistent Triton kernel for few tokens: for "triton", and
        for "auto" where ALBERT_FAST_TUNE=1 measured it faster than the operators for about that many tokens. `run` computes
        the layers on the backend "triton" or "operators", to measure them.
        """
        device, op = hidden.device.type, "encoder"
        if is_traced():
            return "a compiler traces the operators"
        chosen = dispatch.runnable_on(op, device)[0] if backend == "auto" else backend
        if chosen == "reference" or chosen not in dispatch.runnable_on(op, device):
            return f"no kernel runs on {device}" if backend == "auto" else f"backend={backend!r} was asked for"
        if reason := dispatch.why_not(op, device, chosen, hidden.dtype):
            return reason
        if torch.is_autocast_enabled(device):
            return "autocast is on"
        if self.training:
            return "the model is in training mode"
        if torch.is_grad_enabled() and (
            hidden.requires_grad or any(weight.requires_grad for weight in self._weights())
        ):
            return _MAY_NEED_GRADIENT
        # The cheap questions come first: most calls on a GPU end here.
        if chosen == "triton" and (reason := self._beyond_one_kernel(len(hidden), backend)):
            return reason
        if not self.is_plain():
            return "a layer has hooks or replaced parts"
        if chosen == "triton" and backend == "auto":
            spec = self.spec
            sizes = (spec.hidden_size, spec.intermediate_size, spec.num_heads, len(self.layer_indices))
            return None if ops.kernel_is_faster(hidden.dtype, len(hidden), sizes, run) else _NOT_FASTER
        return None

    def _weights(self) -> Iterator[Tensor]:
        for layer in self.distinct():
            yield from layer.parameters()

    def _beyond_one_kernel(self, tokens: int, backend: str) -> str | None:
        """Why the persistent Triton kernel is not for this call."""
        if tokens > ops.MAX_KERNEL_TOKENS:
            return f"{tokens} tokens: one kernel for all layers is for up to {ops.MAX_KERNEL_TOKENS}"
        if self.spec.head_dim > ops.MAX_KERNEL_HEAD_DIM:
            return f"heads of {self.spec.head_dim}: the Triton kernels take up to {ops.MAX_KERNEL_HEAD_DIM}"
        return _NOT_FASTER if backend == "auto" and not ops.kernels_are_compared() else None

    def _check_packed(self, hidden: Tensor, run: Run) -> None:
        """Raise for what layers cannot do of which only packed matrices are kept."""
        again = "load the model without keep_float=False"
        if is_traced():
            raise RuntimeError(f"packed layers cannot be traced: {again}")
        if run.attentions is not None or run.listen is not None:
            raise ValueError(f"packed layers run as a whole, and collect no attentions: {again}")
        if run.backend not in ("auto", "cpp"):
            raise ValueError(f"packed layers run on backend 'cpp', not on {run.backend!r}: {again}")
        if self.training:
            raise RuntimeError(f"packed layers cannot be trained: {again}, or call eval()")
        if hidden.dtype != torch.float32 or hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            raise TypeError(
                f"packed layers run in float32 on the CPU, not in {hidden.dtype} or under autocast: {again}"
            )
        if not self.is_plain():
            raise RuntimeError(
                "packed layers run as a whole: hooks on their parts and replaced parts would not be seen"
            )
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise RuntimeError(f"packed layers have no gradient: {again}, or run the model under torch.no_grad()")
        for layer in self.distinct():
            layer.up.check_panel()

    def _check_quantized(self, hidden: Tensor, run: Run) -> None:
        """Raise for what rounded layers cannot do."""
        if run.attentions is not None:
            raise ValueError("output_attentions: integer layers run as a whole; load the model in fp32 for these")
        if self.training:
            raise RuntimeError("integer weights cannot be trained: load the model in fp32, or call eval()")
        distinct = self.distinct()
        precision = distinct[0].products()[0].precision
        expected = dispatch.quantized_dtype(precision, hidden.device.type)
        # The reference has the arithmetic of either device.
        if hidden.dtype != expected and not (run.backend == "reference" and hidden.dtype == torch.bfloat16):
            raise TypeError(
                f"{precision} layers run in {expected} here, the model was converted to {hidden.dtype}: load it again"
            )
        if not self.is_plain():
            raise RuntimeError(
                "integer layers run as a whole: hooks on their parts and replaced parts would not be seen"
            )
        vectors = (vector for layer in distinct for vector in layer.vectors())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *vectors)):
            raise RuntimeError(
                "integer layers have no gradient: load the model in fp32, or run it under torch.no_grad()"
            )


class LayerGroup(nn.Module):
    """Layers that run one after another under one index. A subclass names the modules and lists them in `layers`."""

    def layers(self) -> Sequence[Layer]:
        """The layers of the group, in the order in which they run."""
        raise NotImplementedError

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        wanted: WantedRows | None,
        run: Run,
        fused: Sequence[FusedQKV | None] | None = None,
    ) -> Tensor:
        """(T, H) -> (T, H), or (Tq, H) for the rows that are wanted. `fused` has `fused_ahead` of each layer, if known."""
        layers = self.layers()
        for inner, layer in enumerate(layers):
            last = inner == len(layers) - 1
            arguments = hidden, packing, wanted if last else None, run, None if fused is None else fused[inner]
            # A layer that ran twice would append its probabilities twice.
            again = run.recompute == "layers" and run.attentions is None
            hidden = checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
            if run.states is not None:
                run.states.append(hidden)
        return hidden
