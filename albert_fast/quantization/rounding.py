"""Rounds a layer's weights to int8, int16 or float8 for the integer kernels.

A product W x + b is computed as (W / r) ((x - c) r) + (b + W c), which is exact for any factor r and shift c of each channel
of x. With c the mean of calibration inputs, channels that are large and hardly vary vanish before x is rounded, and the
weights' rounding errors have no mean effect. r moves the remaining range from activations into weights. The integers of W / r
are chosen one column after another, and each later column makes up for the errors before it (GPTQ, Frantar et al. 2022,
arXiv 2210.17323). A layer that several steps share is calibrated on the inputs of all of them. Float8 numbers have exponents
of their own: for them r is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.quantized import QuantizedLinear, run_sums
from ..ops._integers import FORMATS, RUN, Format, product_ref, slices
from ..ops._schema import SLICE

ROUNDED = ("int16", "int8", "fp8")
# gptq: the part of the Hessian's mean diagonal that is added to it, and the columns whose updates are gathered into a product.
_DAMP, _BLOCK = 0.01, 128
# rescaling: Adam's steps, and the rate of the first one.
_ADAM_STEPS, _ADAM_RATE = 60, 0.05


@dataclass(frozen=True)
class Fit:
    """Which parts of a rounding are fitted to the inputs of its product.

    inputs: the shift and factor of each channel. weights: the integers, by GPTQ; fitted to random ids they err more than the
    nearest integers. relative: a row of inputs counts by its error relative to its output instead of its error. Where rows
    differ much in size (the first layer reads embeddings, the others the result of a LayerNorm), small rows then count too.
    """

    inputs: bool
    weights: bool
    relative: bool


NEAREST = Fit(inputs=False, weights=False, relative=False)


def rounded_linear(
    product: str, linear: nn.Linear, precision: str, fit: Fit = NEAREST, inputs: Tensor | None = None
) -> QuantizedLinear:
    """`linear` in integers or float8, fitted to `inputs` (T, K), which it was given in float32."""
    form, parts = FORMATS[precision], slices(product, linear.weight.shape[1], SLICE)
    weight, bias = linear.weight.detach().float(), linear.bias.detach().float()
    module = QuantizedLinear(product, (weight.shape[0], weight.shape[1]), precision).to(weight.device)
    shift, rescale = weight.new_zeros(weight.shape[1]), weight.new_ones(weight.shape[1])
    if inputs is not None and fit.inputs:
        shift, row_weights = inputs.mean(0), inputs.new_ones(len(inputs), 1)
        if fit.relative:
            row_weights = 1 / _floored(F.linear(inputs, weight).norm(dim=1, keepdim=True))
            shift = best_shift(weight, inputs, row_weights, precision, parts)
        # The rounding of a row scales with the row: this changes only how much the row's error counts.
        inputs = (inputs - shift) * row_weights
        if precision != "fp8":
            rescale = balanced(weight, inputs)
        if precision == "int8":
            # The C++ kernel's slices on every device: with a GPU's whole rows a checkpoint would get other factors.
            rescale = rescaling(weight, inputs, parts, rescale)
        inputs = inputs * rescale
    rescaled = weight / rescale
    scale = steps(rescaled, precision)
    if inputs is not None and fit.weights and precision != "int16":
        integers = gptq(rescaled, inputs.t() @ inputs, scale, form)
    else:
        integers = form.nearest(rescaled / scale[:, None])
    module.set_weight(integers.to(form.dtype), scale)
    module.rescale.copy_(rescale)
    module.shift.copy_(-shift * rescale)
    module.bias.data.copy_(bias + weight @ shift)
    return module


def steps(weight: Tensor, precision: str) -> Tensor:
    """W (N, K) -> (N,): the step between two numbers of `precision` in each output channel."""
    scale = int16_scale(weight) if precision == "int16" else weight.abs().amax(1) / FORMATS[precision].weight_levels
    return torch.where(scale > 0, scale, 1.0)  # a channel of zeros


def best_shift(weight: Tensor, inputs: Tensor, row_weights: Tensor, precision: str, parts: list[slice]) -> Tensor:
    """W (N, K), inputs (T, K) and their weights (T, 1) -> c (K,), the best of: their mean, their weighted mean, zeros."""
    inputs, row_weights = (x[:: max(1, len(inputs) // 512)] for x in (inputs, row_weights))
    exact, form = F.linear(inputs, weight), FORMATS[precision]

    def error(shift: Tensor) -> float:
        centred = inputs - shift
        rescale = torch.ones_like(shift) if precision == "fp8" else balanced(weight, centred * row_weights)
        scale = steps(weight / rescale, precision)
        integers = form.nearest(weight / rescale / scale[:, None])
        found = product_ref(centred * rescale, integers, scale, precision, parts) + weight @ shift
        return float(((found - exact) * row_weights).square().sum())

    squares = row_weights.square()
    shifts = [inputs.mean(0), (inputs * squares).sum(0) / squares.sum(), torch.zeros_like(inputs[0])]
    return min(shifts, key=error)


def int16_scale(weight: Tensor) -> Tensor:
    """(N, K) -> (N,): the finest steps at which no run of products with activations can leave 32 bits."""
    form = FORMATS["int16"]
    limit = (2**31 - 1) / form.activation_levels - RUN / 2  # rounding adds half a step a column at most
    return torch.maximum(weight.abs().amax(1).double() / form.weight_levels, run_sums(weight).amax(1) / limit).float()


def balanced(weight: Tensor, inputs: Tensor) -> Tensor:
    """W (N, K), centred inputs (T, K) -> r (K,), the factor that makes both equally large in every channel."""
    return (_floored(weight.abs().amax(0)) / _floored(inputs.square().mean(0).sqrt())).sqrt()


def rescaling(weight: Tensor, inputs: Tensor, slices: list[slice], start: Tensor) -> Tensor:
    """W (N, K), centred inputs (T, K) -> r (K,) where the noise of both roundings is least, by Adam on log r from `start`.

    Rounding errors count as uniform within a step. That of the activations is a row's range / 255 in every channel and is
    amplified by the channel's weights; that of the weights is an output channel's largest weight / 127 and is amplified by
    the activations.
    """
    inputs = inputs[:: max(1, len(inputs) // 512)]
    energy, magnitude = inputs.square().mean(0), weight.abs()
    column_energy = magnitude.square().sum(0)
    weight_levels, activation_levels = FORMATS["int8"].weight_levels, FORMATS["int8"].activation_levels
    log_r, mean, square = start.log(), torch.zeros_like(start), torch.zeros_like(start)
    heaviest = _Extreme(torch.amax, torch.argmax)
    ends = [(part, _Extreme(torch.amax, torch.argmax), _Extreme(torch.amin, torch.argmin)) for part in slices]
    weights, products = torch.empty_like(weight), torch.empty_like(inputs)  # memory that every step writes again
    for step in range(_ADAM_STEPS):
        # The noise and its gradient in log r. The positions of the extremes count as constant.
        r = log_r.exp()
        largest, at = heaviest.of(torch.div(magnitude, r, out=weights))
        weight_steps, spread = (largest / weight_levels).square(), energy * r.square()
        noise = weight_steps.sum() * spread.sum()
        gradient = 2 * weight_steps.sum() * spread
        gradient.index_add_(0, at, weight_steps, alpha=-2 * float(spread.sum()))
        torch.mul(inputs, r, out=products)
        for part, high, low in ends:
            top, top_at = high.of(products[:, part])
            bottom, bottom_at = low.of(products[:, part])
            top, bottom = top.clamp(min=0) / activation_levels, bottom.clamp(max=0) / activation_levels
            error, amplified = (top - bottom).square().mean(), column_energy[part] / r[part].square()
            noise = noise + error * amplified.sum()
            of_part = gradient[part].sub_(2 * error * amplified)
            share = 2 * float(amplified.sum()) / len(inputs)
            of_part.index_add_(0, top_at, (top - bottom) * top, alpha=share)
            of_part.index_add_(0, bottom_at, (top - bottom) * bottom, alpha=-share)
        gradient /= noise
        # Adam (Kingma & Ba 2015) on one vector: the first of torch.optim's in a process imports the compiler, seconds.
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.001)
        update = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        log_r.sub_(update, alpha=_ADAM_RATE * (1 - step / _ADAM_STEPS))
    r = log_r.exp()
    return r if bool(r.isfinite().all()) else start


class _Extreme:
    """Finds the largest or the smallest element of each row, in call after call on rows that change a little.

    torch finds an element many times faster than its position, and most positions stay.
    """

    def __init__(self, element: Callable[..., Tensor], position: Callable[..., Tensor]) -> None:
        self._element, self._position = element, position
        self._last: Tensor | None = None

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, K) -> the elements (T,) and their positions (T,)."""
        found = self._element(x, 1)
        if self._last is None:
            self._last = self._position(x, 1)
        else:
            moved = (x.gather(1, self._last[:, None])[:, 0] != found).nonzero()[:, 0]
            self._last = self._last.index_copy(0, moved, self._position(x[moved], 1))
        return found, self._last


def _floored(x: Tensor) -> Tensor:
    """x, no element less than a 1e-5th of the largest: a dead channel must not ask for an infinite factor."""
    return x.clamp(min=1e-5 * float(x.max()) + 1e-30)


def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, form: Format = FORMATS["int8"]) -> Tensor:
    """W (N, K), X^T X (K, K), steps (N,) -> numbers of `form` (N, K), as floats: those near W / step for which W X errs least.

    Columns are rounded in the order of their energy. Columns that are still floats make up for a rounded column's error in the
    product: each is rounded where the errors before it leave the least, which the Cholesky factor of the Hessian tells (Babai's
    nearest plane, the same numbers as algorithm 1 of the paper without its inverse). Blocks only gather updates into larger
    products.
    """
    levels, order = form.weight_levels, hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian[order][:, order].double()
    h.diagonal().add_(_DAMP * h.diagonal().mean() + 1e-30)
    # H = U U^T with U upper, from the factor of H with its order reversed: the error is the size of U^T times the columns' errors.
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed or not lower.isfinite().all():
        return form.nearest((weight / scale[:, None]).clamp(-levels, levels))
    upper = lower.flip(0, 1)
    factor = (upper / upper.diagonal()).float()  # of U^T, each row divided by its diagonal
    exact = (weight / scale[:, None]).t()[order]  # (K, N): a column of W is a row here, and contiguous
    wanted, integers = exact.clone(), torch.empty_like(exact)
    for begin in range(0, len(exact), _BLOCK):
        end = min(begin + _BLOCK, len(exact))
        errors = exact.new_empty(end - begin, exact.shape[1])
        for i in range(begin, end):
            integers[i] = form.nearest(wanted[i].clamp(-levels, levels))
            errors[i - begin] = exact[i] - integers[i]
            wanted[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin])
        wanted[end:] += factor[begin:end, end:].t() @ errors
    return torch.empty_like(integers).index_copy_(0, order, integers).t()
