"""What ALBERTModel and the heads share: backend and precision, and what is made ahead of a call: packed weights, graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..execution.graphs import GraphCache
from ..layers.stack import RECOMPUTE
from ..quantization.calibration import quantize
from ..quantization.rounding import PRECISIONS as QUANTIZED
from ..quantization.rounding import QuantizedLinear, wrong_in_rounded
from ..runtime import derived, dispatch
from .load_arguments import PRECISIONS
from .pretrained import Calibration, PretrainedMixin

if TYPE_CHECKING:
    from .albert import ALBERTModel


class FastModel(PretrainedMixin):
    """What ALBERTModel and the heads share: the choice of backend and precision."""

    backend: str

    @classmethod
    def check_backend(cls, backend: str, precision: str) -> None:
        if backend not in ("auto", *dispatch.BACKENDS):
            raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(dispatch.BACKENDS)}")
        if precision not in (*PRECISIONS, *QUANTIZED):
            raise ValueError(f"unknown precision {precision!r}; known: {', '.join((*PRECISIONS, *QUANTIZED))}")

    def use_backend(self, backend: str, precision: str, calibration: Calibration | None = None) -> None:
        """Run on `backend` in `precision`; BackendUnavailableError, with the reason, where this device cannot."""
        device, held = next(self.parameters()).device, self.quantized
        if held is not None and precision != held:
            raise ValueError(f"the layers hold {held} weights: load the checkpoint again for precision={precision!r}")
        if precision in QUANTIZED:
            dispatch.check_quantized(precision, device, backend)
            dtype = dispatch.quantized_dtype(precision, device.type)
        else:
            dtype = PRECISIONS[precision]
        dispatch.check_backend(backend, device.type, dtype)
        if precision in QUANTIZED:
            self._use_quantized(precision, backend, calibration)
        self.to(dtype)
        self.backend = backend

    def _use_quantized(self, precision: str, backend: str, calibration: Calibration | None) -> None:
        device = next(self.parameters()).device.type
        fast, reason = dispatch.quantized_kernels(precision, device, backend)
        if not fast:
            warnings.warn(f"albert_fast: precision={precision!r} runs {reason}", stacklevel=4)
        if self.quantized is None:
            self.float()
            quantize(self.base, precision, calibration, backend)
        self.requires_grad_(False)

    def warmup(self, shapes: Iterable[tuple[int, int]] = ()) -> None:
        """Do ahead what first calls do: pack weights, compile kernels and, on a GPU, capture CUDA graphs.

        From then on calls on a GPU without a gradient are replays of a graph for about their number of tokens, sequences
        and their longest (`graphs.Bucket`), captured now for `shapes`, all of it tokens, and for other sizes when they are
        met for the second time; each for float32 that multiplies as torch was asked then. Results are as before.
        `cuda_graphs` = False ends it, `explain` says what becomes of a call. While a graph is captured no other
        thread may wait for the whole device, but by `albert_fast.synchronize`: a capture that fails is warned of, and its
        size runs operator by operator.

        Args:
            shapes: (B, S) of batches to come.
        """
        self.cuda_graphs = True
        base = self.base
        device, training = base.embeddings.word_embeddings.weight.device, base.training
        asked_for = getattr(self, "output_tokens", "all")
        base.eval()
        try:
            with torch.no_grad():
                for batch, columns in shapes:
                    ids = torch.zeros((batch, columns), dtype=torch.int64, device=device)
                    # A graph is captured the second time; a mask's kernels are others.
                    for mask in (None, None, torch.ones_like(ids)):
                        base(ids, mask, None, None, None, False, False, output_tokens=asked_for)
        finally:
            base.train(training)

    @property
    def cuda_graphs(self) -> bool:
        (
            """Whether calls on a GPU may be replays of CUDA graphs. `warmup` turns it on; False frees the graphs' memory,
        but for the workspaces that torch keeps for cuBLAS: one each time, and for each thread that captured."""
            ""
        )
        return self.base._graphs is not None

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        base = self.base
        if not wanted and base._graphs is not None:
            base._graphs.clear()
            base._graphs = None
        elif wanted and base._graphs is None:
            base._graphs = GraphCache()

    def repack(self) -> None:
        """Read all weights anew, after writes that torch does not count: through `.data` or numpy into a part of a weight,
        or under inference_mode. All other changes are noticed."""
        derived.forget(self.parameters())

    @property
    def recompute(self) -> str:
        """What a backward computes again instead of keeping it: "nothing", "activations" of the FFN, or whole "layers".

        Less memory for more time, with the same gradients; may be set at any time. torch.compile decides for itself.

        Raises:
            ValueError: set to anything else.
        """
        return self.base.encoder.recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        if what not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {what!r}")
        self.base.encoder.recompute = what

    @property
    def base(self) -> ALBERTModel:
        """The encoder of a model with a head, or the model itself."""
        return self.albert  # type: ignore[return-value]

    @property
    def quantized(self) -> str | None:
        return self.base.encoder.quantized

    def wrong_with(self, key: str, tensor: Tensor) -> str | None:
        return None if self.quantized is None else wrong_in_rounded(self.quantized, key, tensor)

    def expect_quantized(self, precision: str) -> None:
        config = self.config
        sizes = {"H": config.hidden_size, "3H": 3 * config.hidden_size, "I": config.intermediate_size}
        for layer in self.base.encoder.distinct():
            layer.place(
                [QuantizedLinear(name, (sizes[n], sizes[k]), precision) for name, (n, k) in ops.PRODUCTS.items()]
            )
