"""Modules of a layer with rounded weights (integers or float8), laid out for `ops.quantized_encoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._integers import FORMATS, RUN, lay_out, unpack, unpack_channels


class QuantizedLinear(nn.Module):
    """Replaces a Linear (K -> N) of a layer: one copy of its integers (or float8 numbers), in the layout of its device's
    kernels, with float32 scales, bias, factors and shifts.

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
        for name in ("integers", "scales", "sums"):  # empty until `set_weight`
            self.register_buffer(name, torch.empty(0, dtype=torch.float32), persistent=False)

    def set_weight(self, integers: Tensor, scale: Tensor) -> None:
        integers, scale = integers.to(self.bias.device), scale.to(self.bias.device)
        self.integers, self.scales, self.sums = lay_out(self.product, integers, scale, self._wants_panels())

    def _wants_panels(self) -> bool:
        """Whether this device's kernels read panels, as those in C++ do; the others read rows."""
        return self.precision == "int16" or (self.precision == "int8" and self.bias.device.type == "cpu")

    def _natural(self) -> tuple[Tensor, Tensor]:
        """weight (N, K) and weight_scale (N,)."""
        return (
            unpack(self.product, self.integers, self.shape),
            unpack_channels(self.product, self.scales, self.shape[0]),
        )

    def tensors(self) -> list[Tensor]:
        """integers, scales, sums, rescale and shift, as `ops.quantized_encoder` reads them."""
        buffers: Any = self._buffers  # faster than attributes, which a module looks up last
        return [buffers[name] for name in ("integers", "scales", "sums", "rescale", "shift")]

    def extra_repr(self) -> str:
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, precision={self.precision!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        if len(self.integers) and (self.integers.dim() == 1) != self._wants_panels():
            self.set_weight(*self._natural())
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        n, k = self.shape
        if len(self.integers):
            weight, scale = self._natural()
        else:  # a checkpoint is being loaded and asks for the expected tensors
            weight = torch.empty((n, k), dtype=FORMATS[self.precision].dtype, device="meta")
            scale = torch.empty(n, dtype=torch.float32, device="meta")
        destination[prefix + "weight"], destination[prefix + "weight_scale"] = weight, scale

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
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
            if problems:  # the other tensors belong to those integers
                errors += problems
                return
            self.set_weight(weight, scale)
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in own}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a quantised layer runs as a whole: see ops.quantized_encoder")


class QuantizedAttention(nn.Module):
    """Replaces a layer's attention: query, key and value are one product `qkv` (H -> 3H); `dense` and `LayerNorm` follow.

    state_dict holds query, key and value separately, under the names of a float attention, and the tensors that the three
    share under `qkv`: `query.weight` (H, H), `query.weight_scale` (H,), `query.bias` (H,), ..., `qkv.rescale`, `qkv.shift` (H,).
    """

    ROWS = ("query", "key", "value")
    APART = ("weight", "bias", "weight_scale")

    def __init__(self, attention: Any, qkv: QuantizedLinear, dense: QuantizedLinear) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.LayerNorm = getattr(attention, "LayerNorm", None)  # None where the layer holds it
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
        self,
        state: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
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


def run_sums(weight: Tensor) -> Tensor:
    """(N, K) -> (N, runs): sums of magnitudes over runs of RUN columns."""
    magnitude = F.pad(weight.double().abs(), (0, -weight.shape[1] % RUN))
    return magnitude.unflatten(1, (-1, RUN)).sum(2)


def fits_sums(integers: Tensor) -> bool:
    """Whether the sums of int16 weights (N, K) fit 32 bits, as those with the steps of `int16_scale` do."""
    return float(run_sums(integers).amax()) * FORMATS["int16"].activation_levels < 2**31


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
