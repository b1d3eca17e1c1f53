"""quantized_encoder: `encoder` on integer weights and rounded activations; float32 between the products.

Every product is sum_k a_k w_nk with a row of activations a = x * rescale + shift rounded to a step of its own: 8 bits without
a sign beside a zero point, or 14 with one. Matrices lie in panels, the layout of csrc/cpu/integer_gemm.h: `pack` and `unpack`.
"""

from __future__ import annotations

import array
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..registration import check_devices, forbid_derivative, needs_dispatcher, register
from .add_layer_norm import add_layer_norm_ref
from .bias_gelu import ACTS, bias_gelu_ref
from .encoder import check_tokens, profile_address

# A layer's products, in the order of the lists of integers, and the shapes (N, K) of their matrices in H and I.
PRODUCTS = {"qkv": ("3H", "H"), "dense": ("H", "H"), "ffn": ("I", "H"), "ffn_output": ("H", "I")}
# The vectors of a layer, in the order in which `vectors` has them.
VECTORS = ("qkv_bias", "dense_bias", "norm_weight", "norm_bias", "ffn_bias", "ffn_output_bias", "full_norm_weight",
           "full_norm_bias")  # fmt: skip
# Channels of a panel; columns of the FFN's middle that are rounded together.
PANEL, SLICE = 32, 768


@dataclass(frozen=True)
class IntegerFormat:
    """bits of an element in memory; the largest integers of an activation and of a weight; group: elements in 32 bits."""

    dtype: torch.dtype
    activation_levels: int
    weight_levels: int

    @property
    def bits(self) -> int:
        return self.dtype.itemsize * 8

    @property
    def group(self) -> int:
        return 4 // self.dtype.itemsize


FORMATS = {8: IntegerFormat(torch.int8, 255, 127), 16: IntegerFormat(torch.int16, 8191, 32767)}


def _blocks(product: str, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The parts of a matrix (rows, columns) that are packed one after another."""
    n, k = shape
    if product == "qkv":  # each from a whole panel on
        return [(slice(i * n // 3, (i + 1) * n // 3), slice(0, k)) for i in range(3)]
    if product == "ffn_output":
        return [(slice(0, n), slice(i, min(i + SLICE, k))) for i in range(0, k, SLICE)]
    return [(slice(0, n), slice(0, k))]


def pack(product: str, matrix: Tensor) -> Tensor:
    """The integers (N, K) of a product's matrix as the kernel reads them, one dimension, padded with zeros."""
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
    """The matrix (N, K) of integers that `pack` was given."""
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
    """A value for each channel (N,), float32, padded as the kernel reads it."""
    parts = values.float().chunk(3 if product == "qkv" else 1)
    return torch.cat([F.pad(part, (0, -len(part) % PANEL)) for part in parts])


def unpack_channels(product: str, packed: Tensor, n: int) -> Tensor:
    count = 3 if product == "qkv" else 1
    return torch.cat([part[: n // count] for part in packed.chunk(count)])


def channel_sums(product: str, matrix: Tensor) -> Tensor:
    """What the zero point of the activations is multiplied with: sums over each packed part's columns."""
    parts = [matrix[rows, columns].sum(1, dtype=torch.int64).float() for rows, columns in
             _blocks(product, (matrix.shape[0], matrix.shape[1]))]  # fmt: skip
    return torch.cat([F.pad(part, (0, -len(part) % PANEL)) for part in parts])


def round_rows(x: Tensor, levels: int, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of x (T, K), as floats, and the scale and zero point (T, 1) of each row: x ~ scale * (integers - zero)."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    extent = torch.maximum(high, -low) if signed else high - low
    inverse = levels / extent
    inverse = torch.where((extent > 0) & (inverse < torch.finfo(torch.float32).max), inverse, 0.0)
    zero = torch.zeros_like(low) if signed else torch.round(-low * inverse)
    integers = torch.round(x * inverse + zero)
    integers = integers if signed else integers.clamp(0, levels)
    damage = (x * 0.0).sum(1, keepdim=True)  # NaN where the row has a NaN or an infinity
    return integers, torch.where(inverse > 0, extent / levels, 0.0) + damage, zero


def _product_ref(x: Tensor, integers: Tensor, scale: Tensor, bits: int, blocks: list[tuple[slice, slice]]) -> Tensor:
    """x (T, K) times a matrix (N, K); each block of columns is rounded by itself."""
    form, total = FORMATS[bits], None
    for columns in dict.fromkeys((c.start, c.stop) for _, c in blocks):
        part = slice(*columns)
        a, step, zero = round_rows(x[:, part], form.activation_levels, signed=bits != 8)
        # Integers in float64: their sums are exact.
        sums = (a.double() - zero.double()).nan_to_num() @ integers[:, part].double().t()
        product = (sums * scale.double()).to(x.dtype) * step
        total = product if total is None else total + product
    assert total is not None
    return total


def integer_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, num_heads: int, softmax_scale: float
) -> Tensor:
    """Attention as the kernel has it: keys rounded row by row, queries too, values column by column, probabilities of the
    largest, to as many bits as keep sums of 64 products within 32 (csrc/cpu/integer_attention.h); softmax between."""
    out, d = torch.zeros_like(q), q.shape[1] // num_heads
    levels = {"q": min(8191, (2**31 - 1) // (8191 * min(d, 64))), "k": 8191, "v": 4095, "p": 8191}

    def rounded(x: Tensor, name: str) -> tuple[Tensor, Tensor]:  # (heads, n, m) -> integers, and steps (heads, n, 1)
        integers, step, _ = round_rows(x.flatten(0, 1), levels[name], signed=True)
        return integers.nan_to_num().double().view(x.shape), step.view(*x.shape[:2], 1)

    for (first_q, last_q), (first_k, last_k) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        if first_q == last_q or first_k == last_k:
            continue
        queries, keys, values = (
            t[i:j].unflatten(1, (num_heads, d)).transpose(0, 1)
            for t, i, j in ((q, first_q, last_q), (k, first_k, last_k), (v, first_k, last_k))
        )
        (q_int, q_step), (k_int, k_step) = rounded(queries, "q"), rounded(keys, "k")
        v_int, v_step = rounded(values.transpose(1, 2), "v")
        scores = (q_int @ k_int.mT).to(q.dtype) * (k_step.mT * (q_step * softmax_scale))
        p = torch.exp(scores - scores.amax(2, keepdim=True))
        p_int = torch.round(p * levels["p"]).nan_to_num().double()
        context = (p_int @ v_int.mT).to(q.dtype) * (v_step.mT / (p.sum(2, keepdim=True) * levels["p"]))
        out[first_q:last_q] = context.transpose(0, 1).flatten(1)
    return out


def quantized_encoder_ref(
    hidden: Tensor, vectors: Sequence[Tensor], integers: Sequence[Tensor], scales: Sequence[Tensor],
    sums: Sequence[Tensor], rescales: Sequence[Tensor], shifts: Sequence[Tensor], order: Sequence[int], cu_seqlens: Tensor,
    rows: Tensor | None, cu_rows: Tensor | None, num_heads: int, softmax_scale: float, eps: float, act: str, bits: int,
) -> Tensor:  # fmt: skip
    """Eager reference: what the kernel does, in the operators' references; `sums` serve the kernel alone."""
    width = hidden.shape[1]
    for i, number in enumerate(order):
        qkv_bias, dense_bias, norm, norm_bias, ffn_bias, output_bias, full, full_bias = vectors[
            8 * number : 8 * number + 8
        ]
        sizes = {"H": width, "3H": 3 * width, "I": len(ffn_bias)}

        def product(x: Tensor, name: str, number: int = number, sizes: dict[str, int] = sizes) -> Tensor:
            at = 4 * number + list(PRODUCTS).index(name)
            shape = (sizes[PRODUCTS[name][0]], sizes[PRODUCTS[name][1]])
            matrix, scale = unpack(name, integers[at], shape), unpack_channels(name, scales[at], shape[0])
            return _product_ref(x * rescales[at] + shifts[at], matrix, scale, bits, _blocks(name, shape))

        last = i + 1 == len(order) and rows is not None
        q, k, v = (product(hidden, "qkv") + qkv_bias).split(width, dim=1)
        if last:
            q, hidden = q[rows], hidden[rows]
        cu_queries = cu_rows if last and cu_rows is not None else cu_seqlens
        context = integer_attention_ref(q, k, v, cu_queries, cu_seqlens, num_heads, softmax_scale)
        attended = add_layer_norm_ref(product(context, "dense"), dense_bias, hidden, norm, norm_bias, eps)
        middle = bias_gelu_ref(product(attended, "ffn"), ffn_bias, act)
        hidden = add_layer_norm_ref(product(middle, "ffn_output"), output_bias, attended, full, full_bias, eps)
    return hidden


def _fwd(
    hidden: Tensor, vectors: list[Tensor], integers: list[Tensor], scales: list[Tensor], sums: list[Tensor],
    rescales: list[Tensor], shifts: list[Tensor], order: list[int], cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, num_heads: int, softmax_scale: float, eps: float, act: str, bits: int, backend: str,
) -> Tensor:  # fmt: skip
    if dispatch.resolve("quantized_encoder", hidden.device.type, hidden.dtype, backend) != "cpp":
        return quantized_encoder_ref(
            hidden, vectors, integers, scales, sums, rescales, shifts, order, cu_seqlens, rows, cu_rows, num_heads,
            softmax_scale, eps, act, bits,
        )  # fmt: skip
    hidden, vectors = hidden.contiguous(), [v.contiguous() for v in vectors]
    table = array.array("q")
    for layer in range(len(vectors) // 8):
        table.extend(v.data_ptr() for v in vectors[8 * layer : 8 * layer + 8])
        for i in range(4 * layer, 4 * layer + 4):
            table.extend(t[i].data_ptr() for t in (integers, scales, sums, rescales, shifts))
    steps = array.array("q", order)
    out = torch.empty((len(hidden) if rows is None else len(rows), hidden.shape[1]), dtype=torch.float32)
    dispatch.extension().quantized_encoder_fwd_cpu(
        hidden.data_ptr(), out.data_ptr(), table.buffer_info()[0], steps.buffer_info()[0], len(steps),
        cu_seqlens.data_ptr(), len(cu_seqlens) - 1, len(hidden), 0 if rows is None else rows.data_ptr(),
        0 if cu_rows is None else cu_rows.data_ptr(), 0 if rows is None else len(rows), hidden.shape[1],
        len(vectors[VECTORS.index("ffn_bias")]), num_heads, softmax_scale, eps, ACTS.index(act), bits,
        profile_address(), torch.get_num_threads(),
    )  # fmt: skip
    return out


register(
    "quantized_encoder_fwd(Tensor hidden, Tensor[] vectors, Tensor[] integers, Tensor[] scales, Tensor[] sums, "
    "Tensor[] rescales, Tensor[] shifts, int[] order, Tensor cu_seqlens, Tensor? rows, Tensor? cu_rows, int num_heads, "
    "float softmax_scale, float eps, str act, int bits, str backend) -> Tensor",
    _fwd,
    lambda hidden, vectors, integers, scales, sums, rescales, shifts, order, cu_seqlens, rows, *rest: hidden.new_empty(
        (hidden.shape[0] if rows is None else rows.shape[0], hidden.shape[1])
    ),
)

forbid_derivative("quantized_encoder_fwd", "integers have no gradient; take the weights in float32")


def quantized_encoder(
    hidden: Tensor, vectors: Sequence[Tensor], integers: Sequence[Tensor], scales: Sequence[Tensor],
    sums: Sequence[Tensor], rescales: Sequence[Tensor], shifts: Sequence[Tensor], order: Sequence[int], cu_seqlens: Tensor,
    rows: Tensor | None, cu_rows: Tensor | None, num_heads: int, softmax_scale: float | None, eps: float,
    act: str = "gelu_tanh", *, bits: int, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The embeddings after all layers, on integer weights, without dropout; no gradient.

    A sequence's result is bitwise the same whatever else is in its batch and however many threads run.

    Args:
        hidden: (T, H) float32, packed tokens.
        vectors: of each distinct layer, one after another, the eight that `VECTORS` names, float32.
        integers, scales, sums, rescales, shifts: of each distinct layer the four of `PRODUCTS`: what `pack`, `pack_channels`
            and `channel_sums` give, and the factor and the shift (K,) of each activation. The sums of a run of 256
            products of 16 bits must fit 32 bits, as those of `quantization.int16_scale` do.
        order: which distinct layer runs at each step.
        cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act, backend: as of `encoder`.
        bits: 8 or 16, of every matrix.

    Returns:
        (T, H), or (Tq, H) for `rows`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation.
    """
    count = len(vectors) // 8
    lists = {
        "vectors": vectors,
        "integers": integers,
        "scales": scales,
        "sums": sums,
        "rescales": rescales,
        "shifts": shifts,
    }
    if any(len(items) != count * (8 if name == "vectors" else 4) for name, items in lists.items()):
        lengths = ", ".join(f"{len(items)} {name}" for name, items in lists.items())
        raise ValueError(f"quantized_encoder: {lengths} are not those of whole layers")
    cu_seqlens, rows, cu_rows, softmax_scale = check_tokens(
        "quantized_encoder", hidden, order, count, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, act
    )
    if bits not in FORMATS or hidden.dtype != torch.float32:
        raise ValueError(f"quantized_encoder: expected 8 or 16 bits and float32, got {bits} and {hidden.dtype}")
    _check_layers(hidden.shape[1], vectors, integers, scales, sums, rescales, shifts, bits)
    check_devices(
        "quantized_encoder", hidden, *vectors, *integers, *scales, *sums, *rescales, *shifts, cu_seqlens, rows, cu_rows
    )
    call = torch.ops.albert_fast.quantized_encoder_fwd if needs_dispatcher(hidden, *vectors) else _fwd
    return call(
        hidden, list(vectors), list(integers), list(scales), list(sums), list(rescales), list(shifts), list(order),
        cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act, bits, backend,
    )  # fmt: skip


def _check_layers(
    width: int, vectors: Sequence[Tensor], integers: Sequence[Tensor], scales: Sequence[Tensor], sums: Sequence[Tensor],
    rescales: Sequence[Tensor], shifts: Sequence[Tensor], bits: int,
) -> None:  # fmt: skip
    """ValueError for a tensor whose elements are not as many, or not of the dtype, that the kernel reads."""
    # The compiler looks through the cache, and warns of it.
    expectation = _expected.__wrapped__ if torch.compiler.is_compiling() else _expected
    for layer in range(len(integers) // 4):
        own = slice(4 * layer, 4 * layer + 4)
        layer_vectors = vectors[8 * layer : 8 * layer + 8]
        expected = expectation(width, len(layer_vectors[VECTORS.index("ffn_bias")]), bits)
        found = (*layer_vectors, *integers[own], *scales[own], *sums[own], *rescales[own], *shifts[own])
        for (name, shape, dtype), tensor in zip(expected, found, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"quantized_encoder: expected {name} of shape {shape} in {dtype}, "
                    f"got {tuple(tensor.shape)} in {tensor.dtype}"
                )


@functools.lru_cache(maxsize=64)
def _expected(width: int, middle: int, bits: int) -> tuple[tuple[str, tuple[int], torch.dtype], ...]:
    """Name, shape and dtype of a layer's tensors: vectors, then by list those of each product."""

    def padded(n: int, multiple: int) -> int:
        return -(-n // multiple) * multiple

    form, f32 = FORMATS[bits], torch.float32
    sizes = {"qkv_bias": 3 * width, "ffn_bias": middle}
    depths = [min(SLICE, middle - i) for i in range(0, middle, SLICE)]
    parts = {name: depths if name == "ffn_output" else [width] for name in PRODUCTS}
    columns = {"qkv": 3 * padded(width, PANEL), "dense": padded(width, PANEL), "ffn": padded(middle, PANEL),
               "ffn_output": padded(width, PANEL)}  # fmt: skip
    packed = {name: columns[name] * sum(padded(k, form.group) for k in parts[name]) for name in PRODUCTS}
    return (
        *((name, (sizes.get(name, width),), f32) for name in VECTORS),
        *((f"integers of {name}", (packed[name],), form.dtype) for name in PRODUCTS),
        *((f"scales of {name}", (columns[name],), f32) for name in PRODUCTS),
        *((f"sums of {name}", (columns[name] * len(parts[name]),), f32) for name in PRODUCTS),
        *((f"{kind} of {name}", (sum(parts[name]),), f32) for kind in ("rescales", "shifts") for name in PRODUCTS),
    )
