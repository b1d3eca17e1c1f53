"""How a model runs: backend, precision, CUDA graphs, packed copies of weights, and what a backward recomputes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..execution.graphs import GraphCache
from ..layers.quantized import QuantizedLinear, wrong_in_rounded
from ..layers.run import RECOMPUTE
from ..ops._schema import PRODUCTS, matrix_sizes
from ..quantization.calibration import Calibration, quantize
from ..quantization.rounding import ROUNDED
from ..runtime import derived, dispatch
from ..runtime.modes import mode
from ..runtime.user_warnings import warn_user
from .load_arguments import FLOAT_DTYPES


def encoder_of(model: Any) -> Any:
    """The encoder of a model of this library, with a head or without.

    Raises:
        TypeError: another model.
    """
    encoder = getattr(model, "base_model", None)
    if not isinstance(getattr(encoder, "execution_state", None), ExecutionState):
        raise TypeError(f"expected an encoder of albert_fast, with a head or without, got {type(model).__name__}")
    return encoder


@dataclass
class ExecutionState:
    """The choices of one encoder; a copy of the model copies them."""

    backend: str = "auto"
    recompute: str = "nothing"
    graphs: GraphCache | None = None


class EagerExecution:
    """`model.execution` of a model in plain PyTorch: it runs eagerly, in a float type."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def check(cls, backend: str, precision: str) -> None:
        """ValueError, with the reason, for a backend or precision that such a model does not have."""
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend {backend!r}: this model is plain PyTorch; it takes 'auto' or 'reference'")
        if precision not in FLOAT_DTYPES:
            raise ValueError(
                f"precision {precision!r}: this model is plain PyTorch; it takes one of {', '.join(FLOAT_DTYPES)}"
            )

    def set_backend(self, backend: str) -> None:
        """Run on `backend`, in the precision that the weights have.

        Raises:
            ValueError: a backend that this model does not have. BackendUnavailableError: it cannot run here; says why.
        """
        self.check(backend, "fp32")

    def drop_float(self) -> None:
        """Nothing: plain PyTorch keeps no second copy of its weights."""

    def warmup(self, shapes: Iterable[tuple[int, int]] = ()) -> None:
        """Does nothing: plain PyTorch needs no preparation."""

    def use(self, backend: str, precision: str, calibration: Calibration | None = None) -> None:
        """Convert the model to `precision`, one of "fp32", "bf16" and "fp16"."""
        self._model.to(FLOAT_DTYPES[precision])

    @property
    def quantized(self) -> str | None:
        """The precision that the layers' weights were rounded to, such as "int8"; None where they are floats."""
        return None

    def expect_quantized(self, precision: str) -> None:
        """Make room for the rounded weights of a checkpoint.

        Raises:
            ValueError: a model that does not run them.
        """
        raise ValueError(f"{type(self._model).__name__} is plain PyTorch and does not run {precision} weights")

    def wrong_with(self, key: str, tensor: Tensor) -> str | None:
        """What is wrong with a checkpoint's tensor of the right name, shape and dtype; None where nothing is."""
        return None


class Execution(EagerExecution):
    """`model.execution` of a model on kernels. A model with a head shares its encoder's choices."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._encoder = model.base_model
        self._state: ExecutionState = self._encoder.execution_state

    @property
    def backend(self) -> str:
        """One backend's name for every operator that has it, or "auto"."""
        return self._state.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._state.backend = name

    @property
    def quantized(self) -> str | None:
        precision: str | None = self._encoder.encoder.quantized
        return precision

    @classmethod
    def check(cls, backend: str, precision: str) -> None:
        if backend not in ("auto", *dispatch.BACKENDS):
            raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(dispatch.BACKENDS)}")
        if precision not in (*FLOAT_DTYPES, *ROUNDED):
            raise ValueError(f"unknown precision {precision!r}; known: {', '.join((*FLOAT_DTYPES, *ROUNDED))}")

    def set_backend(self, backend: str) -> None:
        super().set_backend(backend)
        dispatch.check_backend(backend, self._device.type, self._model.dtype)
        self._state.backend = backend

    def use(self, backend: str, precision: str, calibration: Calibration | None = None) -> None:
        """Run on `backend` in `precision`, on the device where the model is.

        Raises:
            BackendUnavailableError: this device cannot; says why. ValueError: the layers hold weights of another precision.
        """
        device, held = self._device, self.quantized
        if held is not None and precision != held:
            raise ValueError(f"the layers hold {held} weights: load the checkpoint again for precision={precision!r}")
        if precision in ROUNDED:
            dispatch.check_quantized(precision, device, backend)
            dtype = dispatch.quantized_dtype(precision, device.type)
        else:
            dtype = FLOAT_DTYPES[precision]
            if backend == "auto":
                dispatch.check_dtype(precision, device.type, dtype)
        dispatch.check_backend(backend, device.type, dtype)
        if precision in ROUNDED:
            self._round(precision, backend, calibration)
        self._model.to(dtype)
        self._state.backend = backend

    def drop_float(self) -> None:
        """Keep the layers' matrices only in the form that C++ kernels read: half the memory of a float32 model on a CPU.

        Such a model runs without a gradient, saves its weights bit for bit, and cannot be trained, moved or traced. Where
        kernels keep no second copy (other precisions, a GPU, the reference), nothing changes.

        Raises:
            RuntimeError: layers that hold more than Linears.
        """
        stack, state = self._encoder.encoder, self._state
        weight = self._encoder.embeddings.word_embeddings.weight
        device, dtype = weight.device.type, weight.dtype
        if self.quantized is not None or stack.is_packed or device != "cpu" or dtype != torch.float32:
            return
        if dispatch.resolve("encoder", device, dtype, state.backend) != "cpp":
            return
        if not stack.is_plain():
            raise RuntimeError("keep_float=False is for plain Linears: merge adapters, and remove hooks, first")
        for layer in stack.distinct():
            derived.forget(layer.parameters())
            layer.place_packed()
        self._model.requires_grad_(False)

    def _round(self, precision: str, backend: str, calibration: Calibration | None) -> None:
        fast, reason = dispatch.quantized_kernels(precision, self._device.type, backend)
        if not fast:
            warn_user(f"albert_fast: precision={precision!r} runs {reason}")
        if self.quantized is None:
            self._model.float()
            quantize(self._encoder, precision, calibration, backend)
        self._model.requires_grad_(False)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._model.parameters())).device

    def expect_quantized(self, precision: str) -> None:
        config = self._encoder.config
        sizes = {name: matrix_sizes(name, config.hidden_size, config.intermediate_size) for name in PRODUCTS}
        for layer in self._encoder.encoder.distinct():
            layer.place_quantized([QuantizedLinear(name, shape, precision) for name, shape in sizes.items()])

    def wrong_with(self, key: str, tensor: Tensor) -> str | None:
        return None if self.quantized is None else wrong_in_rounded(self.quantized, key, tensor)

    def warmup(self, shapes: Iterable[tuple[int, int]] = ()) -> None:
        """Do the work of first calls ahead: pack weights, compile kernels and, on a GPU, capture CUDA graphs.

        From then on a call on a GPU without a gradient replays a graph for about its number of tokens, of sequences and its
        longest sequence (`execution.graphs.Bucket`). Graphs are captured now for `shapes`, with every token real, and for
        other sizes when they come for the second time, each for the way in which torch was asked to multiply float32 then.
        Results stay the same. `cuda_graphs` = False ends it; `explain` says what happens to a call. While a graph is
        captured, no other thread may wait for the whole device except by `albert_fast.synchronize`. A capture that fails is
        warned of, and that size runs operator by operator.

        Args:
            shapes: (B, S) of batches to come.
        """
        self.cuda_graphs = True
        encoder = self._encoder
        device = encoder.embeddings.word_embeddings.weight.device
        wanted = getattr(self._model, "wanted_tokens", "all")
        with mode(encoder, training=False), torch.no_grad():
            for batch, columns in shapes:
                ids = torch.zeros((batch, columns), dtype=torch.int64, device=device)
                # A graph is captured the second time; a mask has kernels of its own.
                for mask in (None, None, torch.ones_like(ids)):
                    encoder(ids, mask, output_hidden_states=False, output_attentions=False, wanted_tokens=wanted)

    @property
    def cuda_graphs(self) -> bool:
        """Whether calls on a GPU may replay CUDA graphs. `warmup` turns it on. False frees the graphs' memory, except the
        workspaces that torch keeps for cuBLAS: one each time, and one for each thread that captured."""
        return self._state.graphs is not None

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        state = self._state
        if not wanted and state.graphs is not None:
            state.graphs.clear()
            state.graphs = None
        elif wanted and state.graphs is None:
            state.graphs = GraphCache()

    def repack(self) -> None:
        """Read all weights again, after writes that torch does not count: through `.data` or numpy into a part of a weight,
        or under inference_mode. All other changes are noticed."""
        derived.forget(self._model.parameters())

    @property
    def recompute(self) -> str:
        """What a backward computes again instead of keeping it: "nothing", "activations" of the feed-forward network, or whole
        "layers".

        Less memory for more time, with the same gradients; may be set at any time. torch.compile decides for itself.

        Raises:
            ValueError: set to anything else.
        """
        return self._state.recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        if what not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {what!r}")
        self._state.recompute = what
