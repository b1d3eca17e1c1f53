"""Rounds all layers of a model in the way that errs least on a caller's batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.layer import Layer
from ..layers.packing import Packing, pack
from ..layers.quantized import QuantizedLinear
from ..layers.run import Run
from ..layers.stack import LayerStack
from ..runtime import dispatch
from ..runtime.modes import mode
from ..runtime.progress import progress_of_long_work
from .rounding import NEAREST, Fit, rounded_linear

# Batches as a model takes them: (input_ids, attention_mask), (B, S) each, a tokenizer's mapping of both, or input_ids alone.
Calibration = Iterable[tuple[Tensor, Tensor | None] | Mapping[str, Tensor] | Tensor]

# Fewer tokens say too little about the channels.
ENOUGH_TOKENS = 32
# Roundings are compared on about this many tokens; none of them was fitted to one in eight of these.
TRIAL_TOKENS = 1024
# Where rows differ this much in size, a fit depends on how they count: both ways are tried, at twice the time.
UNEVEN = 4.0
# A fit is kept if it leaves at most this share of the squared error: a smaller gain on few tokens may be chance.
GAIN = 0.8
Rounded = list[list[QuantizedLinear]]  # by distinct layer and product


class Encoder(Protocol):
    """What calibration needs of a model."""

    config: Any

    @property
    def encoder(self) -> LayerStack:
        """The layers."""

    def embed_ids(self, packing: Packing, ids: Tensor) -> Tensor:
        """The first layer's input (T, H) for ids (B, S)."""

    def check_length(self, columns: int) -> None:
        """ValueError for a sequence that is too long."""


def quantize(model: Encoder, precision: str, calibration: Calibration | None = None, backend: str = "auto") -> None:
    """Round the weights of all layers in place: to the nearest number, or fitted to the inputs of each product.

    int8 is fitted to random ids, and every precision to `calibration` if given. A fit is kept only if it brings the last
    layer's results clearly nearer to float32 on tokens that it has not seen.

    Raises:
        ValueError: layers that are rounded already, a calibration without a token. RuntimeError: layers that hold more
        than Linears. TypeError: a calibration that is not a list of batches.
    """
    encoder = model.encoder
    if encoder.quantized is not None:
        raise ValueError(f"the layers hold {encoder.quantized} weights already")
    distinct = encoder.distinct()
    if not all(layer.is_plain() for layer in distinct):
        raise RuntimeError(
            f"{precision} takes the place of plain Linears: merge adapters, and remove parametrisations and hooks, first"
        )
    given = None if calibration is None else Sample(model, calibration)
    if given is not None and given.tokens < ENOUGH_TOKENS:
        warnings.warn(
            f"albert_fast: a calibration of {given.tokens} tokens is too short to fit to, {ENOUGH_TOKENS} or more are "
            "needed: weights are rounded as without one",
            stacklevel=2,
        )
        given = None
    random = random_batches(model.config.vocab_size, model.config.longest)
    samples = [(Sample(model, random), False)] if precision == "int8" else []
    samples += [] if given is None else [(given, True)]
    nearest: Rounded = [_rounded(layer, precision, NEAREST) for layer in distinct]
    fitted = [(sample, sample.rounded(encoder, precision, representative)) for sample, representative in samples]
    _place(encoder, nearest)
    best = nearest
    for sample, candidates in fitted:
        trial = Trial(encoder, precision, backend, sample.sequences)
        errors = [trial.error(one) for one in candidates]
        if min(errors) < GAIN * trial.error(best):
            best = candidates[errors.index(min(errors))]
    _place(encoder, best)


def _rounded(
    layer: Layer, precision: str, fit: Fit, inputs: Sequence[Tensor | None] = (None,) * 4
) -> list[QuantizedLinear]:
    """A layer's four products in integers; `inputs` (T, K) is what each was given: see `rounded_linear`."""
    linears = zip(ops.PRODUCTS, layer.products(), inputs, strict=True)
    return [rounded_linear(name, linear, precision, fit, x) for name, linear, x in linears]


def _place(stack: LayerStack, rounded: Rounded) -> None:
    for layer, linears in zip(stack.distinct(), rounded, strict=True):
        layer.place_quantized(linears)


@dataclass(frozen=True)
class Sequences:
    """Input of the first layer (T, H), and the float32 results `exact` (n, H) of the tokens that no weight was fitted to, in the
    rows `held_out` (n,)."""

    hidden: Tensor
    packing: Packing
    held_out: Tensor
    exact: Tensor


class Trial:
    """Compares roundings: runs the layers with each of them, on kernels, or on the reference where there are none."""

    def __init__(self, encoder: LayerStack, precision: str, backend: str, sequences: list[Sequences]) -> None:
        """encoder: its layers are rounded already, so that a copy is small."""
        self._sequences = sequences
        device = next(encoder.parameters()).device
        self._dtype = dispatch.quantized_dtype(precision, device.type)
        self._encoder = copy.deepcopy(encoder).to(self._dtype).eval()
        self._backend = backend if dispatch.why_not_quantized(precision, device, "auto") else "auto"

    @torch.no_grad()
    def error(self, rounded: Rounded) -> float:
        """The squared difference between the last layer's results and float32's, summed over the tokens held out."""
        _place(self._encoder, rounded)
        total = 0.0
        for some in self._sequences:
            found = self._encoder(some.hidden.to(self._dtype), some.packing, None, Run(self._backend))
            total += float((found[some.held_out] - some.exact).square().sum())
        return total


class Sample:
    """Runs batches through the layers in float32, and keeps the inputs of each product and sequences to try roundings on."""

    def __init__(self, model: Encoder, batches: Calibration) -> None:
        self._model, encoder = model, model.encoder
        device = next(encoder.parameters()).device
        self.tokens = 0
        self._seen = [[Rows() for _ in ops.PRODUCTS] for _ in encoder.distinct()]
        self.sequences: list[Sequences] = []
        listed = list(calibration_batches(batches))
        total = sum(ids.numel() if mask is None else int(mask.count_nonzero()) for ids, mask in listed)
        if total == 0:
            raise ValueError("calibration: the batches hold no real token; pass calibration=None to round without one")
        step, count = max(1, total // TRIAL_TOKENS), 0
        for ids, mask in listed:
            model.check_length(ids.shape[1])
            ids, mask = ids.to(device), torch.ones_like(ids) if mask is None else mask.to(device)
            real = mask.bool()
            held_out = _is_held_out(torch.arange(1, int(real.sum()) + 1, device=device) + self.tokens)
            chosen = torch.zeros(len(ids), dtype=torch.bool, device=device)
            chosen[-count % step :: step] = True
            self._add(ids, mask, held_out, chosen[:, None].expand_as(real)[real], chosen)
            self.tokens, count = self.tokens + len(held_out), count + len(ids)

    @torch.no_grad()
    def _add(self, ids: Tensor, mask: Tensor, held_out: Tensor, tried: Tensor, chosen: Tensor) -> None:
        """Run a batch (B, S): keep the inputs of all products for the real tokens that are not `held_out` (T,), and the sequences
        that are `chosen` (B,), whose tokens are `tried` (T,), to try roundings on."""
        layers = zip(self._model.encoder.distinct(), self._seen, strict=True)
        rows = {
            id(module): seen for layer, own in layers for module, seen in zip(layer.product_modules(), own, strict=True)
        }
        fitted_to = ~held_out
        embedded, hidden = self._run(ids, mask, lambda module, x: rows[id(module)].add(x[fitted_to]))
        if tried.any():
            some, outside = ids[chosen], held_out[tried]
            packing = pack((some.shape[0], some.shape[1]), mask[chosen], ids.device)
            self.sequences.append(Sequences(embedded[tried], packing, outside, hidden[tried][outside]))

    def _run(self, ids: Tensor, mask: Tensor, listen: Callable[[nn.Module, Tensor], None]) -> tuple[Tensor, Tensor]:
        """The first layer's input (T, H), and the last layer's result, computed without dropout."""
        packing = pack((ids.shape[0], ids.shape[1]), mask, ids.device)
        embedded = self._model.embed_ids(packing, ids)
        encoder = self._model.encoder
        with mode(encoder, training=False):
            return embedded, encoder(embedded, packing, None, Run(listen=listen))

    def _is_uneven(self) -> bool:
        """Whether a layer's input rows differ much in size."""
        sizes = [rows.norm(dim=1) for seen in self._seen if (rows := seen[0].gathered()) is not None]
        return any(bool(some.max() > UNEVEN * some.min()) for some in sizes)

    def rounded(self, encoder: LayerStack, precision: str, fit_weights: bool) -> list[Rounded]:
        """The layers' weights fitted to the inputs, once for each way of counting rows."""
        fits = [Fit(inputs=True, weights=fit_weights, relative=False)]
        if self._is_uneven():
            fits.append(replace(fits[0], relative=True))
        candidates: list[Rounded] = [[] for _ in fits]
        layers = list(zip(encoder.distinct(), self._seen, strict=True))
        with progress_of_long_work(f"fitting {precision} layers", len(fits) * len(layers)) as done:
            for fit, fitted in zip(fits, candidates, strict=True):
                for layer, seen in layers:
                    fitted.append(_rounded(layer, precision, fit, [rows.gathered() for rows in seen]))
                    done()
        return candidates


def _is_held_out(numbers: Tensor) -> Tensor:
    """Whether no weight is fitted to a token, by its number: one in eight, out of step with every sequence length."""
    return (numbers.double() * ((5**0.5 - 1) / 2)) % 1 < 1 / 8


def random_batches(words: int, positions: int) -> list[tuple[Tensor, Tensor | None]]:
    """Random ids (B, S) below `words`, where there is no real text; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    longest = min(128, positions)
    return [
        (torch.randint(words, (8 * longest // n, n), generator=generator), None)
        for n in sorted({max(1, longest // 8), max(1, longest // 2)})
    ]


def calibration_batches(calibration: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(input_ids, attention_mask) of each batch of `calibration`, in any of its forms.

    Raises:
        TypeError: anything but a list of batches. ValueError: ids that are not (B, S), a mask of another shape.
    """
    expected = (
        "calibration: expected a list of (input_ids, attention_mask), of what a tokenizer returns, or of input_ids"
    )
    pair = isinstance(calibration, tuple) and len(calibration) == 2 and all(isinstance(t, Tensor) for t in calibration)
    if pair or isinstance(calibration, (Tensor, str, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(f"{expected}; got {'a bare pair of tensors' if pair else type(calibration).__name__}")
    for number, batch in enumerate(calibration):
        if isinstance(batch, Mapping) and "input_ids" in batch:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            ids, mask = batch
        else:
            ids, mask = batch, None
        if not isinstance(ids, Tensor) or not isinstance(mask, (Tensor, NoneType)):
            raise TypeError(f"{expected}; batch {number} is {type(batch).__name__}")
        if ids.dim() != 2 or ids.is_floating_point() or (mask is not None and mask.shape != ids.shape):
            shapes = f"{tuple(ids.shape)} in {ids.dtype}" + ("" if mask is None else f" and {tuple(mask.shape)}")
            raise ValueError(
                f"calibration: batch {number}: expected integers (B, S) and a mask of that shape, got {shapes}"
            )
        yield ids, mask


class Rows:
    """Keeps about `most` rows (T, K), evenly chosen from all that are added."""

    def __init__(self, most: int = 4096) -> None:
        self._most, self._step, self._seen = most, 1, 0
        self._parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self._parts.append(rows[-self._seen % self._step :: self._step].clone())
        self._seen += len(rows)
        while sum(map(len, self._parts)) > 2 * self._most:
            self._parts, self._step = [torch.cat(self._parts)[::2]], 2 * self._step

    def gathered(self) -> Tensor | None:
        """None where nothing was added."""
        return torch.cat(self._parts) if self._seen else None
