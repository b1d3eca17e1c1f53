"""Rounded weights and activations: the number formats, the layouts of a matrix in memory, and each backend's arithmetic.

Every product of `quantized_encoder` is sum_k a_k w_nk; each row of activations a = x * rescale + shift is rounded to a step of
its own. A matrix lies in panels for the C++ kernel (csrc/cpu/integer_gemm.h), or in rows padded with zeros for the Triton
kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import dispatch
from ._schema import PANEL, SLICE

# Rows for the Triton kernels are padded to a multiple of this.
DEPTH = 128


def _to_float8(x: Tensor) -> Tensor:
    """x rounded to float8 e4m3 (4 bits of precision, up to 448), in its own dtype."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


@dataclass(frozen=True)
class Format:
    """A number format of weights and activations.

    dtype: of an element in memory.
    activation_levels, weight_levels: the largest activation and weight.
    zero_point: whether a row of activations has a zero point.
    hidden: the dtypes of hidden states that it goes with.
    nearest: rounds to numbers that the format has.
    """

    dtype: torch.dtype
    activation_levels: int
    weight_levels: int
    zero_point: bool
    hidden: tuple[torch.dtype, ...]
    nearest: Callable[[Tensor], Tensor] = torch.round

    @property
    def group(self) -> int:
        """Elements in 32 bits."""
        return 4 // self.dtype.itemsize


FORMATS = {
    "int8": Format(torch.int8, 255, 127, True, (torch.float32, torch.bfloat16)),
    "int16": Format(torch.int16, 8191, 32767, False, (torch.float32,)),
    "fp8": Format(torch.float8_e4m3fn, 448, 448, False, (torch.bfloat16,), _to_float8),
}
# The largest integer of attention's values; sums of 64 products with a probability of 14 bits fit 32 bits.
VALUE_LEVELS = 4095
# Elements of a row whose products the C++ kernel adds up in 32 bits, for weights in int16.
RUN = 256

dispatch.expect(
    levels=(FORMATS["int8"].activation_levels, FORMATS["int16"].activation_levels, VALUE_LEVELS),
    run=RUN,
)


@dataclass(frozen=True)
class Arithmetic:
    """How a backend computes everything but the products.

    between: the dtype of activations in memory between kernels; inside kernels they are float32.
    slice: columns of the FFN's middle that are rounded together; None: whole rows.
    integer_attention: whether attention multiplies integers of 12 to 14 bits, or numbers of the dtype `between`.
    """

    between: torch.dtype
    slice: int | None
    integer_attention: bool


# The dtype of the hidden states selects the arithmetic: float32 the C++ kernel's, bfloat16 the Triton kernels'.
ARITHMETICS = {
    torch.float32: Arithmetic(torch.float32, SLICE, True),
    torch.bfloat16: Arithmetic(torch.bfloat16, None, False),
}


def slices(product: str, k: int, width: int | None) -> list[slice]:
    """The columns of a product's activations that are rounded together."""
    width = width if width and product == "ffn_output" else max(1, k)
    return [slice(i, min(i + width, k)) for i in range(0, k, width)]


def _blocks(product: str, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The (rows, columns) of the parts of a matrix that are packed one after another."""
    n, k = shape
    if product == "qkv":  # query, key and value each begin at a whole panel
        return [(slice(i * n // 3, (i + 1) * n // 3), slice(0, k)) for i in range(3)]
    return [(slice(0, n), columns) for columns in slices(product, k, SLICE)]


def pack(product: str, matrix: Tensor) -> Tensor:
    """The integers (N, K) of a product's matrix in panels, as the C++ kernel reads them: one dimension, padded with zeros."""
    group = 4 // matrix.element_size()
    parts = []
    for rows, columns in _blocks(product, (matrix.shape[0], matrix.shape[1])):
        part = matrix[rows, columns]
        part = F.pad(part, (0, -part.shape[1] % group, 0, -part.shape[0] % PANEL))
        parts.append(part.view(part.shape[0] // PANEL, PANEL, -1, group).transpose(1, 2).reshape(-1))
    packed = matrix.new_empty(sum(map(len, parts)))
    if dispatch.why_not("quantized_encoder", packed.device.type, "cpp") is None:
        dispatch.extension().use_large_pages_cpu(packed.data_ptr(), packed.nbytes)
    return torch.cat(parts, out=packed)


def unpack(product: str, packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix (N, K), read back from panels or rows."""
    if packed.dim() == 2:
        return packed[:, : shape[1]].contiguous()
    group = 4 // packed.element_size()
    matrix = packed.new_empty(shape)
    for rows, columns in _blocks(product, shape):
        n, k = rows.stop - rows.start, columns.stop - columns.start
        panels, steps = -(-n // PANEL), -(-k // group)
        part, packed = packed[: panels * PANEL * steps * group], packed[panels * PANEL * steps * group :]
        matrix[rows, columns] = (
            part.view(panels, steps, PANEL, group).transpose(1, 2).reshape(panels * PANEL, -1)[:n, :k]
        )
    return matrix


def pack_channels(product: str, values: Tensor) -> Tensor:
    """A value for each channel (N,), float32, padded as the C++ kernel reads it."""
    parts = values.float().chunk(3 if product == "qkv" else 1)
    return torch.cat([F.pad(part, (0, -len(part) % PANEL)) for part in parts])


def unpack_channels(product: str, packed: Tensor, n: int) -> Tensor:
    """The values (N,), read back from `pack_channels`, or from values without padding."""
    count = 3 if product == "qkv" else 1
    return torch.cat([part[: n // count] for part in packed.chunk(count)])


def channel_sums(product: str, matrix: Tensor) -> Tensor:
    """Each channel's sum of integers, for every packed part by itself: what a zero point is multiplied with."""
    blocks = _blocks(product, (matrix.shape[0], matrix.shape[1]))
    parts = [matrix[rows, columns].sum(1, dtype=torch.int64).float() for rows, columns in blocks]
    return torch.cat([F.pad(part, (0, -len(part) % PANEL)) for part in parts])


def lay_out(product: str, matrix: Tensor, scale: Tensor, panels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (N, K) and its channels' steps (N,) as a backend reads them: integers, scales and sums, in panels or rows."""
    if panels:
        return pack(product, matrix), pack_channels(product, scale), channel_sums(product, matrix)
    # As bytes: torch cannot pad float8.
    padded = F.pad(matrix.view(torch.int8), (0, -matrix.shape[1] % DEPTH)).view(matrix.dtype).contiguous()
    # The sums of int8 are exact in float32: 127 x 16384 is below 2^24. float8 has no zero point; its sums are not read.
    return padded, scale.float(), matrix.float().sum(1)


def expected_layout(name: str, shape: tuple[int, int], precision: str, panels: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of what `lay_out` returns for a matrix (N, K), by the names of the operator's lists."""
    if not panels:
        return {"integers": (shape[0], -(-shape[1] // DEPTH) * DEPTH), "scales": shape[:1], "sums": shape[:1]}
    group = FORMATS[precision].group
    blocks = [
        (-(-(rows.stop - rows.start) // PANEL) * PANEL, columns.stop - columns.start)
        for rows, columns in _blocks(name, shape)
    ]
    channels = sum(n for n, _ in blocks) if name == "qkv" else blocks[0][0]
    integers = sum(n * -(-k // group) * group for n, k in blocks)
    return {"integers": (integers,), "scales": (channels,), "sums": (sum(n for n, _ in blocks),)}


def round_rows(
    x: Tensor, levels: int, signed: bool, nearest: Callable[[Tensor], Tensor] = torch.round
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of x (T, K), as floats, and the scale and zero point (T, 1) of each row: x ~ scale * (integers - zero)."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    # Halved first: the extent of a finite row may exceed the largest number of its dtype.
    extent, steps = (torch.maximum(high, -low), levels) if signed else (high / 2 - low / 2, levels / 2)
    # Both are tensors: torch divides a number by a tensor through a reciprocal, which may be a denormal here.
    inverse = torch.full_like(extent, steps) / extent
    inverse = torch.where((extent > 0) & (inverse < torch.finfo(torch.float32).max), inverse, 0.0)
    zero = torch.zeros_like(low) if signed else torch.round(-low * inverse)
    integers = nearest(x * inverse + zero)
    integers = integers if signed else integers.clamp(0, levels)
    damage = (x * 0.0).sum(1, keepdim=True)  # NaN where the row has a NaN or an infinity
    return integers, torch.where(inverse > 0, extent / steps, 0.0) + damage, zero


def product_ref(x: Tensor, integers: Tensor, scale: Tensor, precision: str, parts: list[slice]) -> Tensor:
    """x (T, K) times a matrix (N, K) and its channels' steps (N,); each part of the columns is rounded by itself."""
    form, total = FORMATS[precision], None
    for part in parts:
        a, step, zero = round_rows(x[:, part], form.activation_levels, not form.zero_point, form.nearest)
        # Integers in float64: their sums are exact.
        sums = (a.double() - zero.double()).nan_to_num() @ integers[:, part].double().t()
        product = (sums * scale.double()).to(x.dtype) * step
        total = product if total is None else total + product
    assert total is not None
    return total
