"""quantized_encoder: `encoder` on rounded weights and activations, for inference.

With float32 hidden states it computes as the C++ kernel does: integers of 8 or 16 bits, attention on integers too, float32
between. With bfloat16 ones it computes as the Triton kernels do: int8 or float8 products, attention in bfloat16, bfloat16
between. `_integers` has the formats and both arithmetics.
"""

from __future__ import annotations

import array
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..registration import check_devices, forbid_derivative, needs_dispatcher, register
from ._integers import (
    ARITHMETICS,
    FORMATS,
    PRODUCTS,
    expected_layout,
    product_ref,
    round_rows,
    slices,
    unpack,
    unpack_channels,
)
from .add_layer_norm import add_layer_norm_ref
from .attention import attention_ref
from .bias_gelu import ACTS, bias_gelu_ref
from .encoder import check_tokens, profile_address

# The vectors of a layer, in the order in which `vectors` has them.
VECTORS = ("qkv_bias", "dense_bias", "norm_weight", "norm_bias", "ffn_bias", "ffn_output_bias", "full_norm_weight",
           "full_norm_bias")  # fmt: skip


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
    rows: Tensor | None, cu_rows: Tensor | None, num_heads: int, softmax_scale: float, eps: float, act: str,
    precision: str,
) -> Tensor:  # fmt: skip
    """Eager reference: what the kernels do, in the operators' references; `sums` serve the kernels alone."""
    arithmetic, width = ARITHMETICS[hidden.dtype], hidden.shape[1]
    attention = integer_attention_ref if arithmetic.integer_attention else attention_ref

    def kept(x: Tensor) -> Tensor:
        """As it comes back from memory."""
        return x.to(arithmetic.between).float()

    # What is rounded has not been to memory yet; what is added to it has.
    exact = hidden.float()
    for i, number in enumerate(order):
        qkv_bias, dense_bias, norm, norm_bias, ffn_bias, output_bias, full, full_bias = (
            vector.float() for vector in vectors[8 * number : 8 * number + 8]
        )
        sizes = {"H": width, "3H": 3 * width, "I": len(ffn_bias)}

        def product(x: Tensor, name: str, number: int = number, sizes: dict[str, int] = sizes) -> Tensor:
            at = 4 * number + list(PRODUCTS).index(name)
            shape = (sizes[PRODUCTS[name][0]], sizes[PRODUCTS[name][1]])
            matrix, scale = unpack(name, integers[at], shape), unpack_channels(name, scales[at], shape[0])
            parts = slices(name, shape[1], arithmetic.slice)
            return product_ref(x * rescales[at] + shifts[at], matrix, scale, precision, parts)

        last = i + 1 == len(order) and rows is not None
        q, k, v = kept(product(exact, "qkv") + qkv_bias).split(width, dim=1)
        residual = kept(exact)
        if last:
            q, residual = q[rows], residual[rows]
        cu_queries = cu_rows if last and cu_rows is not None else cu_seqlens
        context = kept(attention(q, k, v, cu_queries, cu_seqlens, num_heads, softmax_scale))
        attended = add_layer_norm_ref(kept(product(context, "dense")), dense_bias, residual, norm, norm_bias, eps)
        middle = bias_gelu_ref(kept(product(attended, "ffn")), ffn_bias, act)
        down = kept(product(middle, "ffn_output"))
        exact = add_layer_norm_ref(down, output_bias, kept(attended), full, full_bias, eps)
    return exact.to(hidden.dtype)


def _fwd(
    hidden: Tensor, vectors: list[Tensor], integers: list[Tensor], scales: list[Tensor], sums: list[Tensor],
    rescales: list[Tensor], shifts: list[Tensor], order: list[int], cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, schedule: Tensor | None, max_seqlen: int, max_rows: int, num_heads: int,
    softmax_scale: float, eps: float, act: str, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    chosen = dispatch.resolve("quantized_encoder", hidden.device.type, hidden.dtype, backend)
    if chosen == "reference":
        return quantized_encoder_ref(
            hidden, vectors, integers, scales, sums, rescales, shifts, order, cu_seqlens, rows, cu_rows, num_heads,
            softmax_scale, eps, act, precision,
        )  # fmt: skip
    panels = integers[0].dim() == 1
    if panels != (chosen == "cpp"):
        found, expected = ("panels", "rows") if panels else ("rows", "panels")
        raise ValueError(f"quantized_encoder: the {chosen} kernel reads integers in {expected}, not in {found}")
    if chosen == "triton":
        from ..kernels.quantized_encoder import quantized_encoder_fwd

        return quantized_encoder_fwd(
            hidden, vectors, integers, scales, sums, rescales, shifts, order, cu_seqlens, rows, cu_rows, schedule,
            max_seqlen, max_rows, num_heads, softmax_scale, eps, act,
        )  # fmt: skip
    hidden, vectors = hidden.contiguous(), [v.contiguous() for v in vectors]
    table = array.array("q")
    for layer in range(len(vectors) // 8):
        table.extend(v.data_ptr() for v in vectors[8 * layer : 8 * layer + 8])
        for i in range(4 * layer, 4 * layer + 4):
            table.extend(t[i].data_ptr() for t in (integers, scales, sums, rescales, shifts))
    steps, threads = array.array("q", order), torch.get_num_threads()
    out = torch.empty((len(hidden) if rows is None else len(rows), hidden.shape[1]), dtype=torch.float32)
    dispatch.extension().quantized_encoder_fwd_cpu(
        hidden.data_ptr(), out.data_ptr(), table.buffer_info()[0], steps.buffer_info()[0], len(steps),
        cu_seqlens.data_ptr(), len(cu_seqlens) - 1, len(hidden), 0 if rows is None else rows.data_ptr(),
        0 if cu_rows is None else cu_rows.data_ptr(), 0 if rows is None else len(rows), hidden.shape[1],
        len(vectors[VECTORS.index("ffn_bias")]), num_heads, softmax_scale, eps, ACTS.index(act),
        FORMATS[precision].dtype.itemsize * 8, profile_address(threads), threads,
    )  # fmt: skip
    return out


register(
    "quantized_encoder_fwd(Tensor hidden, Tensor[] vectors, Tensor[] integers, Tensor[] scales, Tensor[] sums, "
    "Tensor[] rescales, Tensor[] shifts, int[] order, Tensor cu_seqlens, Tensor? rows, Tensor? cu_rows, "
    "Tensor? schedule, SymInt max_seqlen, SymInt max_rows, int num_heads, float softmax_scale, float eps, str act, "
    "str precision, str backend) -> Tensor",
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
    act: str = "gelu_tanh", *, precision: str, schedule: Tensor | None = None, max_seqlen: int | None = None,
    max_rows: int | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The embeddings after all layers, on rounded weights, without dropout; no gradient.

    A sequence's result is bitwise the same whatever else is in its batch, however many threads run and on any GPU whose
    kernels have the same tiles.

    Args:
        hidden: (T, H), packed tokens: float32 for the C++ kernel, bfloat16 for the Triton kernels.
        vectors: of each distinct layer, one after another, the eight that `VECTORS` names: biases in float32, weights and
            biases of the norms in hidden's dtype.
        integers, scales, sums: of each distinct layer the four of `PRODUCTS`, as `lay_out` gives them. The sums of a run
            of 256 products of 16 bits must fit 32 bits, as those of `quantization.int16_scale` do.
        rescales, shifts: the factor and the shift (K,) of each activation, float32.
        order: which distinct layer runs at each step.
        cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act, backend: as of `encoder`.
        precision: "int8", "int16" (in float32 alone) or "fp8" (in bfloat16 alone), of every matrix.
        schedule, max_seqlen, max_rows: for a GPU: `order` of `attention`, and bounds on a sequence's tokens and on the
            rows that are asked of one; T where they are not given.

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
    if precision not in FORMATS:
        raise ValueError(f"quantized_encoder: unknown precision {precision!r}; known: {', '.join(FORMATS)}")
    if hidden.dtype not in FORMATS[precision].hidden:
        known = " or ".join(str(dtype) for dtype in FORMATS[precision].hidden)
        raise ValueError(f"quantized_encoder: {precision} expects hidden in {known}, got {hidden.dtype}")
    _check_layers(hidden, vectors, integers, scales, sums, rescales, shifts, precision)
    check_devices(
        "quantized_encoder", hidden, *vectors, *integers, *scales, *sums, *rescales, *shifts, cu_seqlens, rows, cu_rows,
        schedule,
    )  # fmt: skip
    max_seqlen = len(hidden) if max_seqlen is None else max_seqlen
    max_rows = max_seqlen if max_rows is None else max_rows
    call = torch.ops.albert_fast.quantized_encoder_fwd if needs_dispatcher(hidden, *vectors) else _fwd
    return call(
        hidden, list(vectors), list(integers), list(scales), list(sums), list(rescales), list(shifts), list(order),
        cu_seqlens, rows, cu_rows, schedule, max_seqlen, max_rows, num_heads, softmax_scale, eps, act, precision, backend,
    )  # fmt: skip


def _check_layers(
    hidden: Tensor, vectors: Sequence[Tensor], integers: Sequence[Tensor], scales: Sequence[Tensor],
    sums: Sequence[Tensor], rescales: Sequence[Tensor], shifts: Sequence[Tensor], precision: str,
) -> None:  # fmt: skip
    """ValueError for a tensor whose elements are not as many, or not of the dtype, that the kernel reads."""
    # The compiler looks through the cache, and warns of it.
    expectation = _expected.__wrapped__ if torch.compiler.is_compiling() else _expected
    panels = bool(integers) and integers[0].dim() == 1
    for layer in range(len(integers) // 4):
        own = slice(4 * layer, 4 * layer + 4)
        layer_vectors = vectors[8 * layer : 8 * layer + 8]
        middle = len(layer_vectors[VECTORS.index("ffn_bias")])
        expected = expectation(hidden.shape[1], middle, hidden.dtype, precision, panels)
        found = (*layer_vectors, *integers[own], *scales[own], *sums[own], *rescales[own], *shifts[own])
        for (name, shape, dtype), tensor in zip(expected, found, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"quantized_encoder: expected {name} of shape {shape} in {dtype}, "
                    f"got {tuple(tensor.shape)} in {tensor.dtype}"
                )


@functools.lru_cache(maxsize=64)
def _expected(
    width: int, middle: int, hidden: torch.dtype, precision: str, panels: bool
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of a layer's tensors: vectors, then by list those of each product."""
    f32, sizes = torch.float32, {"H": width, "3H": 3 * width, "I": middle}
    shapes = {name: (sizes[n], sizes[k]) for name, (n, k) in PRODUCTS.items()}
    laid = {name: expected_layout(name, shape, precision, panels) for name, shape in shapes.items()}
    lengths = {"qkv_bias": 3 * width, "ffn_bias": middle}
    return (
        *((name, (lengths.get(name, width),), hidden if "norm" in name else f32) for name in VECTORS),
        *((f"integers of {name}", laid[name]["integers"], FORMATS[precision].dtype) for name in PRODUCTS),
        *((f"{kind} of {name}", laid[name][kind], f32) for kind in ("scales", "sums") for name in PRODUCTS),
        *((f"{kind} of {name}", shapes[name][1:], f32) for kind in ("rescales", "shifts") for name in PRODUCTS),
    )
