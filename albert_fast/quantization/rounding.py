"""Weights of fewer bits for the kernels that multiply such: how they are rounded, and the module that holds them.

A product W x + b is computed as (W / r) ((x - c) r) + (b + W c), which is exact for any factor r and shift c of each channel
of x. With c the mean of calibration inputs, channels that are large and hardly vary vanish before x is rounded, and weights'
rounding errors have no mean effect; r moves what range is left from activations into weights; the integers of W / r are
chosen one column after another, each later column making up for the errors before it (GPTQ, Frantar et al. 2022,
arXiv 2210.17323). The layer is shared, so all of its applications calibrate one set of integers. Numbers of float8 carry
exponents of their own: for these r is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._integers import FORMATS, Format, lay_out, product_ref, slices, unpack, unpack_channels
from ..ops.schema import SLICE

PRECISIONS = ("int16", "int8", "fp8")
# Elements of a row whose products int16 adds up in 32 bits: kRun steps of csrc/cpu/integer_gemm.h.
RUN = 256


@dataclass(frozen=True)
class Fit:
    """What of a rounding is fitted to the inputs of a product.

    inputs: shift and factor of each channel. weights: the integers, by GPTQ; fitted to random ids they err more than the
    nearest. relative: each row of inputs counts by its error relative to its output, not by its error: where rows differ
    much in size (the first layer is given the embeddings, the others what a LayerNorm made), small ones matter too.
    """

    inputs: bool
    weights: bool
    relative: bool


NEAREST = Fit(inputs=False, weights=False, relative=False)


class QuantizedLinear(nn.Module):
    """Stands where a Linear (K -> N) of a layer stood: integers (or float8 numbers) in the layout of the kernels of its
    device, one copy, and float32 around them.

    state_dict has `weight` (N, K) in the dtype of `precision`, `weight_scale` (N,), `rescale` and `shift` (K,), and `bias`
    (N,), the same on every device: W x + b = weight_scale * (weight (x * rescale + shift)) + bias. Conversions to another
    float type leave it as it is.
    """

    integers: Tensor
    scales: Tensor
    sums: Tensor
    rescale: Tensor
    shift: Tensor

    def __init__(self, product: str, shape: tuple[int, int], precision: str) -> None:
        super().__init__()
        self.product, self.shape, self.precision = product, shape, precision
        n, k = shape
        self.bias = nn.Parameter(torch.zeros(n, dtype=torch.float32), requires_grad=False)
        self.register_buffer("rescale", torch.ones(k, dtype=torch.float32))
        self.register_buffer("shift", torch.zeros(k, dtype=torch.float32))
        for name in ("integers", "scales", "sums"):  # until `_set` has what they are made of
            self.register_buffer(name, torch.empty(0, dtype=torch.float32), persistent=False)

    def _set(self, integers: Tensor, scale: Tensor) -> None:
        integers, scale = integers.to(self.bias.device), scale.to(self.bias.device)
        self.integers, self.scales, self.sums = lay_out(self.product, integers, scale, self._wants_panels())

    def _wants_panels(self) -> bool:
        """Whether the kernels of where this is read panels: those in C++; the others read rows."""
        return self.precision == "int16" or (self.precision == "int8" and self.bias.device.type == "cpu")

    def _natural(self) -> tuple[Tensor, Tensor]:
        """weight (N, K) and weight_scale (N,)."""
        return (
            unpack(self.product, self.integers, self.shape),
            unpack_channels(self.product, self.scales, self.shape[0]),
        )

    @classmethod
    def rounded(
        cls, product: str, linear: nn.Linear, precision: str, fit: Fit = NEAREST, inputs: Tensor | None = None
    ) -> QuantizedLinear:
        """`linear` in integers or float8; `inputs` (T, K), what it was given in float32, are what is fitted to."""
        form, parts = FORMATS[precision], slices(product, linear.weight.shape[1], SLICE)
        weight, bias = linear.weight.detach().float(), linear.bias.detach().float()
        module = cls(product, (weight.shape[0], weight.shape[1]), precision).to(weight.device)
        shift, rescale = weight.new_zeros(weight.shape[1]), weight.new_ones(weight.shape[1])
        if inputs is not None and fit.inputs:
            shift, row_weights = inputs.mean(0), inputs.new_ones(len(inputs), 1)
            if fit.relative:
                row_weights = 1 / _floored(F.linear(inputs, weight).norm(dim=1, keepdim=True))
                shift = best_shift(weight, inputs, row_weights, precision, parts)
            # Roundings of a row scale with the row, so this scales nothing but what its error counts.
            inputs = (inputs - shift) * row_weights
            if precision != "fp8":
                rescale = balanced(weight, inputs)
            if precision == "int8":
                # Slices are the C++ kernel's: whole rows, as on a GPU, would give other factors to the same checkpoint.
                with torch.inference_mode(False):  # the caller's mode has no gradients, not even for copies made in it
                    rescale = rescaling(weight.clone(), inputs.clone(), parts, rescale.clone())
            inputs = inputs * rescale
        rescaled = weight / rescale
        scale = steps(rescaled, precision)
        if inputs is not None and fit.weights and precision != "int16":
            integers = gptq(rescaled, inputs.t() @ inputs, scale, form)
        else:
            integers = form.nearest(rescaled / scale[:, None])
        module._set(integers.to(form.dtype), scale)
        module.rescale.copy_(rescale)
        module.shift.copy_(-shift * rescale)
        module.bias.data.copy_(bias + weight @ shift)
        return module

    def tensors(self) -> list[Tensor]:
        """integers, scales, sums, rescale and shift, as `ops.quantized_encoder` reads them."""
        buffers: Any = self._buffers  # straight from here: attributes of a module are looked up last
        return [buffers[name] for name in ("integers", "scales", "sums", "rescale", "shift")]

    def extra_repr(self) -> str:
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, precision={self.precision!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        if len(self.integers) and (self.integers.dim() == 1) != self._wants_panels():
            self._set(*self._natural())
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        n, k = self.shape
        if len(self.integers):
            weight, scale = self._natural()
        else:  # a checkpoint is being loaded, and asks what it must hold
            weight = torch.empty((n, k), dtype=FORMATS[self.precision].dtype, device="meta")
            scale = torch.empty(n, dtype=torch.float32, device="meta")
        destination[prefix + "weight"], destination[prefix + "weight_scale"] = weight, scale

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        own = {"weight": self.shape, "weight_scale": self.shape[:1]}
        weight, scale = (state_dict.get(prefix + name) for name in own)
        missing += [prefix + name for name in own if prefix + name not in state_dict]
        if weight is not None and scale is not None and not (weight.is_meta or scale.is_meta):
            shaped = zip(own.items(), (weight, scale), strict=True)
            problems = [
                f"size mismatch for {prefix}{name}: {tuple(found.shape)}, expected {shape}"
                for (name, shape), found in shaped
                if found.shape != shape
            ]
            expected = FORMATS[self.precision].dtype
            if weight.dtype != expected or not scale.is_floating_point():
                dtypes = f"{weight.dtype} with scales in {scale.dtype}"
                problems.append(f"{prefix}weight: {dtypes}, expected {expected} with scales in floats")
            if not problems and self.precision == "int16" and not fits_sums(weight):
                problems.append(f"{prefix}weight: its sums do not fit the 32 bits in which they are added up")
            if problems:  # nor the rest, which belongs to other integers
                errors += problems
                return
            self._set(weight, scale)
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in own}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a quantised layer runs as a whole: see ops.quantized_encoder")


class QuantizedAttention(nn.Module):
    """Stands where a layer's attention stood: query, key and value as one product `qkv` (H -> 3H), `dense` and `LayerNorm`.

    state_dict has the rows of query, key and value apart, under the names of a float attention, and what the three share
    under `qkv`: `query.weight` (H, H), `query.weight_scale` (H,), `query.bias` (H,), ..., `qkv.rescale`, `qkv.shift` (H,).
    """

    ROWS = ("query", "key", "value")
    APART = ("weight", "bias", "weight_scale")

    def __init__(self, attention: Any, qkv: QuantizedLinear, dense: QuantizedLinear) -> None:
        super().__init__()
        self.num_heads, self.scale, self.LayerNorm = attention.num_heads, attention.scale, attention.LayerNorm
        self.qkv, self.dense = qkv, dense
        self.train(attention.training)

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **options)
        for kind in self.APART:
            rows = state.pop(f"{prefix}qkv.{kind}").chunk(3)
            # Copies: writers of files take tensors that share memory for one tensor, and drop all but the first.
            state.update({f"{prefix}{name}.{kind}": part.clone() for name, part in zip(self.ROWS, rows, strict=True)})
        return state

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str],
        errors: list[str],
    ) -> None:  # fmt: skip
        current = self.state_dict(prefix=prefix)
        for kind in self.APART:
            names = [f"{prefix}{name}.{kind}" for name in self.ROWS]
            missing += [name for name in names if name not in state]
            parts, rows = [state.pop(name, current[name]) for name in names], [current[name] for name in names]
            for name, part, row in zip(names, parts, rows, strict=True):
                if part.shape != row.shape:
                    errors.append(f"size mismatch for {name}: {tuple(part.shape)}, expected {tuple(row.shape)}")
            fits = all(part.shape == row.shape for part, row in zip(parts, rows, strict=True))
            state[f"{prefix}qkv.{kind}"] = torch.cat(parts if fits else rows)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


def steps(weight: Tensor, precision: str) -> Tensor:
    """W (N, K) -> (N,): the step between two numbers of `precision` in each output channel."""
    scale = int16_scale(weight) if precision == "int16" else weight.abs().amax(1) / FORMATS[precision].weight_levels
    return torch.where(scale > 0, scale, 1.0)  # a channel of zeros


def best_shift(weight: Tensor, inputs: Tensor, row_weights: Tensor, precision: str, parts: list[slice]) -> Tensor:
    """W (N, K), inputs (T, K) and what each counts (T, 1) -> c (K,): their mean, the mean of those that count, or none."""
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


def _run_sums(weight: Tensor) -> Tensor:
    """(N, K) -> (N, runs): sums of magnitudes over runs of RUN columns."""
    magnitude = F.pad(weight.double().abs(), (0, -weight.shape[1] % RUN))
    return magnitude.unflatten(1, (-1, RUN)).sum(2)


def int16_scale(weight: Tensor) -> Tensor:
    """(N, K) -> (N,): the finest steps at which no run of products with activations can leave 32 bits."""
    form = FORMATS["int16"]
    limit = (2**31 - 1) / form.activation_levels - RUN / 2  # rounding adds half a step a column at most
    return torch.maximum(weight.abs().amax(1).double() / form.weight_levels, _run_sums(weight).amax(1) / limit).float()


def fits_sums(integers: Tensor) -> bool:
    """Whether int16 weights (N, K) keep what `int16_scale` promises."""
    return float(_run_sums(integers).amax()) * FORMATS["int16"].activation_levels < 2**31


def wrong_in_rounded(precision: str, key: str, tensor: Tensor) -> str | None:
    """What is wrong with a tensor of a rounded layer's state_dict, which has the right shape and dtype; None: nothing."""
    name = key.rpartition(".")[2]
    if name in ("weight_scale", "rescale", "shift") and not tensor.isfinite().all():
        return "has elements that are NaN or infinite"
    if name == "weight_scale" and (tensor < 0).any():
        return "has negative elements, a step between two numbers is positive"
    if tensor.dtype == torch.int16 and precision == "int16" and not fits_sums(tensor):
        return "has sums that do not fit the 32 bits in which they are added up"
    return None


def balanced(weight: Tensor, inputs: Tensor) -> Tensor:
    """W (N, K), centred inputs (T, K) -> r (K,), by which both are of one size in every channel."""
    return (_floored(weight.abs().amax(0)) / _floored(inputs.square().mean(0).sqrt())).sqrt()


def rescaling(
    weight: Tensor, inputs: Tensor, slices: list[slice], start: Tensor, steps: int = 60, rate: float = 0.05
) -> Tensor:
    """W (N, K), centred inputs (T, K) -> r (K,) where the noise of both roundings is least, by Adam on log r from `start`.

    Rounding errors count as uniform within a step. That of the activations is a row's range / 255 in every channel and is
    amplified by the channel's weights; that of the weights is an output channel's largest weight / 127 and is amplified by
    the activations.
    """
    inputs = inputs[:: max(1, len(inputs) // 512)]
    energy, magnitude = inputs.square().mean(0), weight.abs()
    column_energy = magnitude.square().sum(0)
    weight_levels, activation_levels = FORMATS["int8"].weight_levels, FORMATS["int8"].activation_levels
    log_r = start.log().requires_grad_()
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(steps):
        # Where the extremes stand is found without a gradient; only the extremes themselves are differentiated.
        r = log_r.detach().exp()
        largest = (magnitude / r).argmax(1)
        ends = [(part, y.argmax(1), y.argmin(1)) for part in slices for y in [inputs[:, part] * r[part]]]
        with torch.enable_grad():
            r = log_r.exp()
            weight_steps = magnitude.gather(1, largest[:, None])[:, 0] / r[largest] / weight_levels
            noise = weight_steps.square().sum() * (energy * r.square()).sum()
            for part, high, low in ends:
                y, factor = inputs[:, part], r[part]
                span = (y.gather(1, high[:, None])[:, 0] * factor[high]).clamp(min=0) - (
                    y.gather(1, low[:, None])[:, 0] * factor[low]
                ).clamp(max=0)
                error = (span / activation_levels).square().mean()
                noise = noise + error * (column_energy[part] / factor.square()).sum()
            (gradient,) = torch.autograd.grad(noise.log(), log_r)
        # Adam (Kingma & Ba 2015) on one vector: the first of torch.optim's in a process imports the compiler, seconds.
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.001)
        update = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        log_r.data.sub_(update, alpha=rate * (1 - step / steps))
    r = log_r.detach().exp()
    return r if bool(r.isfinite().all()) else start


def _floored(x: Tensor) -> Tensor:
    """x, no element less than a 1e-5th of the largest: a dead channel must not ask for an infinite factor."""
    return x.clamp(min=1e-5 * float(x.max()) + 1e-30)


def gptq(
    weight: Tensor, hessian: Tensor, scale: Tensor, form: Format = FORMATS["int8"], damp: float = 0.01, block: int = 128
) -> Tensor:
    """W (N, K), X^T X (K, K), steps (N,) -> numbers of `form` (N, K), as floats: those near W / step for which W X errs least.

    Columns are rounded in the order of their energy; what a column's error does to the product is made up for by those that
    are still floats, through the Cholesky factor of the inverse Hessian (algorithm 1 of the paper). Blocks only gather
    updates into larger products.
    """
    levels, order = form.weight_levels, hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian.double()[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean() + 1e-30)
    # The upper R with R^T R = H^-1: H = U U^T with U upper, from the factor of H with its order reversed; R = U^-1.
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed or not lower.isfinite().all():
        return form.nearest((weight / scale[:, None]).clamp(-levels, levels))
    factor = torch.linalg.solve_triangular(
        lower.flip(0, 1), torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True
    ).float()
    left = (weight / scale[:, None]).t()[order]  # (K, N): a column of W is a row here, and contiguous
    integers = torch.empty_like(left)
    for begin in range(0, len(left), block):
        end = min(begin + block, len(left))
        errors = left.new_empty(end - begin, left.shape[1])
        for i in range(begin, end):
            integers[i] = form.nearest(left[i].clamp(-levels, levels))
            errors[i - begin] = (left[i] - integers[i]) / factor[i, i]
            left[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin], alpha=-1)
        left[end:] -= factor[begin:end, end:].t() @ errors
    return torch.empty_like(integers).index_copy_(0, order, integers).t()
