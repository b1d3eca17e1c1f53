"""Calibration: what the layers are given on a caller's batches, and the rounding of their weights that errs least on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..layers.packing import Packing, pack
from ..models.pretrained import Calibration
from ..runtime import dispatch
from .rounding import NEAREST, Fit, QuantizedLinear

if TYPE_CHECKING:
    from ..layers.stack import Encoder
    from ..models.albert import ALBERTModel
    from ..models.config import ALBERTConfig

# A calibration of fewer tokens says too little about the channels.
ENOUGH_TOKENS = 32
# About how many tokens roundings are compared on; of these one in eight was fitted to by none of them.
TRIAL_TOKENS = 1024
# Between rows of such a ratio of sizes it matters which of them a fit counts: it is tried both ways, at twice the time.
UNEVEN = 4.0
# A fit is kept if it leaves at most this share of the squared error: less gain may be chance, on few tokens.
GAIN = 0.8
Rounded = list[list[QuantizedLinear]]  # by distinct layer and product


def quantize(model: ALBERTModel, precision: str, calibration: Calibration | None = None, backend: str = "auto") -> None:
    """Round the weights of all layers in place, to the nearest or as fits the inputs that they are given.

    int8 is fitted to random ids, and every precision to `calibration` where there is one. A fit is kept only if, on tokens
    that it has not seen, the last layer's results are clearly nearer to float32 than without it.

    Raises:
        ValueError: layers that are rounded already, a calibration without a token. RuntimeError: layers that hold more
        than Linears. TypeError: a calibration that is no list of batches.
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
    samples = [(Sample(model, random_batches(model.config)), False)] if precision == "int8" else []
    samples += [] if given is None else [(given, True)]
    nearest: Rounded = [layer.rounded(precision, NEAREST) for layer in distinct]
    fitted = [(sample, sample.rounded(encoder, precision, representative)) for sample, representative in samples]
    _place(encoder, nearest)
    best = nearest
    for sample, candidates in fitted:
        trial = Trial(encoder, precision, backend, sample.sequences)
        errors = [trial.error(one) for one in candidates]
        if min(errors) < GAIN * trial.error(best):
            best = candidates[errors.index(min(errors))]
    _place(encoder, best)


def _place(encoder: Encoder, rounded: Rounded) -> None:
    for layer, linears in zip(encoder.distinct(), rounded, strict=True):
        layer.place(linears)


@dataclass(frozen=True)
class Sequences:
    """Sequences as the first layer is given them (T, H), and what float32 makes of those tokens that no weight was fitted
    to: their rows `held_out` (n,), and the results `exact` (n, H)."""

    hidden: Tensor
    packing: Packing
    held_out: Tensor
    exact: Tensor


class Trial:
    """Runs the layers with one rounding after another, on the kernels, or on their reference where there are none."""

    def __init__(self, encoder: Encoder, precision: str, backend: str, sequences: list[Sequences]) -> None:
        """encoder: its layers are rounded already, so that a copy is small."""
        self._sequences = sequences
        device = encoder.embedding_hidden_mapping_in.weight.device
        self._dtype = dispatch.quantized_dtype(precision, device.type)
        self._encoder = copy.deepcopy(encoder).to(self._dtype).eval()
        self._backend = backend if dispatch.why_not_quantized(precision, device, "auto") else "auto"

    @torch.no_grad()
    def error(self, rounded: Rounded) -> float:
        """The sum of squares by which the last layer's results leave those of float32, on the tokens held out."""
        _place(self._encoder, rounded)
        total = 0.0
        for some in self._sequences:
            found = self._encoder(some.hidden.to(self._dtype), some.packing, None, self._backend)
            total += float((found[some.held_out] - some.exact).square().sum())
        return total


class Sample:
    """What batches are to the layers in float32: the inputs of each product, and sequences to try roundings on."""

    def __init__(self, model: ALBERTModel, batches: Calibration) -> None:
        device, encoder = model.embeddings.word_embeddings.weight.device, model.encoder
        self.tokens = 0
        self._seen = [[Rows() for _ in ops.PRODUCTS] for _ in encoder.distinct()]
        self.sequences: list[Sequences] = []
        listed = list(calibration_batches(batches))
        total = sum(ids.numel() if mask is None else int(mask.count_nonzero()) for ids, mask in listed)
        if total == 0:
            raise ValueError("calibration: there is no token in it; leave it out to have none")
        step, count = max(1, total // TRIAL_TOKENS), 0
        for ids, mask in listed:
            model._check_length(ids.shape[1])
            ids, mask = ids.to(device), torch.ones_like(ids) if mask is None else mask.to(device)
            real = mask.bool()
            held_out = _is_held_out(real.flatten().cumsum(0) + self.tokens).view(ids.shape)
            self._collect(model, ids, mask, ~held_out[real])
            chosen = slice(-count % step, None, step)
            if real[chosen].any():
                self._try_on(model, ids[chosen], mask[chosen], held_out[chosen][real[chosen]])
            self.tokens, count = self.tokens + int(real.sum()), count + len(ids)

    @torch.no_grad()
    def _collect(self, model: ALBERTModel, ids: Tensor, mask: Tensor, wanted: Tensor) -> None:
        """Adds the inputs of the products, of those tokens (T,) that are `wanted`."""
        hidden, packing = _embedded(model, ids, mask)
        distinct = model.encoder.distinct()
        for number in model.encoder.order():
            inputs, hidden = distinct[number].inputs(hidden, packing)
            for rows, given in zip(self._seen[number], inputs, strict=True):
                rows.add(given[wanted])

    @torch.no_grad()
    def _try_on(self, model: ALBERTModel, ids: Tensor, mask: Tensor, held_out: Tensor) -> None:
        """Adds sequences to those that roundings are tried on."""
        embedded, packing = _embedded(model, ids, mask)
        hidden, distinct = embedded, model.encoder.distinct()
        for number in model.encoder.order():
            _, hidden = distinct[number].inputs(hidden, packing)
        self.sequences.append(Sequences(embedded, packing, held_out, hidden[held_out]))

    def _is_uneven(self) -> bool:
        """Whether hidden states that a layer is given, of one token and another, differ much in size."""
        sizes = [rows.norm(dim=1) for seen in self._seen if (rows := seen[0].gathered()) is not None]
        return any(bool(some.max() > UNEVEN * some.min()) for some in sizes)

    def rounded(self, encoder: Encoder, precision: str, fit_weights: bool) -> list[Rounded]:
        """The layers' weights, fitted to the inputs in each way that there is."""
        fits = [Fit(inputs=True, weights=fit_weights, relative=False)]
        if self._is_uneven():
            fits.append(replace(fits[0], relative=True))
        layers = list(zip(encoder.distinct(), self._seen, strict=True))
        return [[layer.rounded(precision, fit, [rows.gathered() for rows in seen]) for layer, seen in layers]
                for fit in fits]  # fmt: skip


def _embedded(model: ALBERTModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Packing]:
    """What the first layer is given (T, H)."""
    packing = pack((ids.shape[0], ids.shape[1]), mask, ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape)
    return model.embed(packing, ids, None, positions, None), packing


def _is_held_out(numbers: Tensor) -> Tensor:
    """Which tokens, by their numbers, no weight is fitted to: one in eight, in step with no length of sequence."""
    return (numbers.double() * ((5**0.5 - 1) / 2)) % 1 < 1 / 8


def random_batches(config: ALBERTConfig) -> list[tuple[Tensor, Tensor | None]]:
    """Random ids (B, S) of the vocabulary, for want of real text; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    longest = min(128, config.max_position_embeddings)
    return [(torch.randint(config.vocab_size, (8 * longest // n, n), generator=generator), None)
            for n in sorted({max(1, longest // 8), max(1, longest // 2)})]  # fmt: skip


def calibration_batches(calibration: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(input_ids, attention_mask) of each batch of `calibration`, in whichever of its forms.

    Raises:
        TypeError: what is no list of batches. ValueError: ids that are not (B, S), a mask of another shape.
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
    """About `most` rows (T, K), evenly chosen from all that are added."""

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
