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

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_choice, check_launch, head_size, hold, matrix
from ..runtime.registration import forbid_derivative, needs_dispatcher, register
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
from .encoder import asked_rows, check_content, check_tokens, profile_address, raise_content

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
        if last and rows is not None and cu_rows is not None:
            q, residual = (asked_rows(t, rows, cu_rows, cu_seqlens) for t in (q, residual))
        cu_queries = cu_rows if last and cu_rows is not None else cu_seqlens
        context = kept(attention(q, k, v, cu_queries, cu_seqlens, num_heads, softmax_scale))
        attended = add_layer_norm_ref(kept(product(context, "dense")), dense_bias, residual, norm, norm_bias, eps)
        middle = bias_gelu_ref(kept(product(attended, "ffn")), ffn_bias, act)
        down = kept(product(middle, "ffn_output"))
        exact = add_layer_norm_ref(down, output_bias, kept(attended), full, full_bias, eps)
    return exact.to(hidden.dtype)


def _operands(
    hidden: Tensor, vectors: Sequence[Tensor], integers: Sequence[Tensor], scales: Sequence[Tensor],
    sums: Sequence[Tensor], rescales: Sequence[Tensor], shifts: Sequence[Tensor], order: Sequence[int], cu_seqlens: Tensor,
    rows: Tensor | None, cu_rows: Tensor | None, schedule: Tensor | None, num_heads: int, act: str, precision: str,
) -> tuple[list[Operand], list[list[Operand]]]:  # fmt: skip
    """What is read beside weights, and of each distinct layer in the order of the C++ function's table."""
    op, count = "quantized_encoder", len(vectors) // 8
    products = {"integers": integers, "scales": scales, "sums": sums, "rescales": rescales, "shifts": shifts}
    if not count or len(vectors) % 8 or any(len(items) != 4 * count for items in products.values()):
        lengths = ", ".join(f"{len(items)} {name}" for name, items in {"vectors": vectors, **products}.items())
        raise ValueError(f"{op}: {lengths} are not those of whole layers")
    tokens = check_tokens(op, hidden, order, count, cu_seqlens, rows, cu_rows, num_heads, act)
    tokens.append(("schedule", schedule, (cu_seqlens.shape[0] - 1,), torch.int32))
    check_choice(op, "precision", precision, FORMATS)
    if hidden.dtype not in FORMATS[precision].hidden:
        known = " or ".join(str(dtype) for dtype in FORMATS[precision].hidden)
        raise ValueError(f"{op}: {precision} expects hidden in {known}, got {hidden.dtype}")
    width, panels, layers = hidden.shape[1], integers[0].dim() == 1, []
    for layer in range(count):
        own = slice(4 * layer, 4 * layer + 4)
        layer_vectors = vectors[8 * layer : 8 * layer + 8]
        middle = layer_vectors[VECTORS.index("ffn_bias")]
        if middle.dim() != 1 or not len(middle):
            raise ValueError(f"{op}: expected ffn_bias of shape (I,), I above 0, got {tuple(middle.shape)}")
        # A symbolic size of a compiler has no hash.
        expectation = _expected if type(width) is type(len(middle)) is int else _expected.__wrapped__
        expected = expectation(width, len(middle), hidden.dtype, precision, panels)
        # Product by product.
        found = (*layer_vectors, *itertools.chain(*zip(*(items[own] for items in products.values()), strict=True)))
        layers.append([(name, t, shape, dtype) for (name, shape, dtype), t in zip(expected, found, strict=True)])
    return tokens, layers


def _fwd(
    hidden: Tensor, vectors: list[Tensor], integers: list[Tensor], scales: list[Tensor], sums: list[Tensor],
    rescales: list[Tensor], shifts: list[Tensor], order: list[int], cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, schedule: Tensor | None, max_seqlen: int, max_rows: int, num_heads: int,
    softmax_scale: float, eps: float, act: str, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    tokens, layers = _operands(
        hidden, vectors, integers, scales, sums, rescales, shifts, order, cu_seqlens, rows, cu_rows, schedule, num_heads,
        act, precision,
    )  # fmt: skip
    chosen = dispatch.resolve("quantized_encoder", hidden.device.type, hidden.dtype, backend)
    if chosen != "cpp":
        check_launch("quantized_encoder", chosen, hidden.device, [*tokens, *itertools.chain(*layers)])
        check_content("quantized_encoder", len(hidden), cu_seqlens, rows, cu_rows)
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
    memory = hold("quantized_encoder", hidden.device, tokens[:4])
    held = [hold("quantized_encoder", hidden.device, layer) for layer in layers]
    table = array.array("q", [address for layer in held for address in layer.addresses])
    steps, threads = array.array("q", order), torch.get_num_threads()
    (count, width), asked = tokens[0][2], 0 if rows is None else tokens[2][2][0]
    out = torch.empty((count if rows is None else asked, width), dtype=torch.float32)
    states, ends, rows_address, cu_rows_address = memory.addresses
    fits = dispatch.extension().quantized_encoder_fwd_cpu(
        states, out.data_ptr(), table.buffer_info()[0], steps.buffer_info()[0], len(steps), ends, tokens[1][2][0] - 1,
        count, rows_address, cu_rows_address, asked, width, layers[0][VECTORS.index("ffn_bias")][2][0], num_heads,
        softmax_scale, eps, ACTS.index(act), FORMATS[precision].dtype.itemsize * 8, profile_address(threads), threads,
    )  # fmt: skip
    if not fits:
        raise_content("quantized_encoder", count, cu_seqlens, rows, cu_rows)
    return out


def _fwd_fake(
    hidden, vectors, integers, scales, sums, rescales, shifts, order, cu_seqlens, rows, cu_rows, schedule, max_seqlen,
    max_rows, num_heads, softmax_scale, eps, act, precision, backend,
):  # fmt: skip
    tokens, layers = _operands(
        hidden, vectors, integers, scales, sums, rescales, shifts, order, cu_seqlens, rows, cu_rows, schedule, num_heads,
        act, precision,
    )  # fmt: skip
    check("quantized_encoder", hidden.device, [*tokens, *itertools.chain(*layers)])
    return hidden.new_empty((hidden.shape[0] if rows is None else rows.shape[0], hidden.shape[1]))


register(
    "quantized_encoder_fwd(Tensor hidden, Tensor[] vectors, Tensor[] integers, Tensor[] scales, Tensor[] sums, "
    "Tensor[] rescales, Tensor[] shifts, int[] order, Tensor cu_seqlens, Tensor? rows, Tensor? cu_rows, "
    "Tensor? schedule, SymInt max_seqlen, SymInt max_rows, int num_heads, float softmax_scale, float eps, str act, "
    "str precision, str backend) -> Tensor",
    _fwd,
    _fwd_fake,
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
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation or precision; on a CPU also cu_seqlens,
            rows and cu_rows outside their ranges. TypeError: an argument that is no dense tensor.
    """
    width = matrix("quantized_encoder", "hidden", hidden)[1]
    if softmax_scale is None:
        softmax_scale = head_size("quantized_encoder", width, num_heads) ** -0.5
    max_seqlen = len(hidden) if max_seqlen is None else max_seqlen
    max_rows = max_seqlen if max_rows is None else max_rows
    call = torch.ops.albert_fast.quantized_encoder_fwd if needs_dispatcher(hidden, *vectors) else _fwd
    return call(
        hidden, list(vectors), list(integers), list(scales), list(sums), list(rescales), list(shifts), list(order),
        cu_seqlens, rows, cu_rows, schedule, max_seqlen, max_rows, num_heads, softmax_scale, eps, act, precision, backend,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _expected(
    width: int, middle: int, hidden: torch.dtype, precision: str, panels: bool
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of a layer's tensors: vectors, then product by product those of each list."""
    f32, sizes = torch.float32, {"H": width, "3H": 3 * width, "I": middle}
    shapes = {name: (sizes[n], sizes[k]) for name, (n, k) in PRODUCTS.items()}
    laid = {name: expected_layout(name, shape, precision, panels) for name, shape in shapes.items()}
    lengths = {"qkv_bias": 3 * width, "ffn_bias": middle}
    vectors = ((name, (lengths.get(name, width),), hidden if "norm" in name else f32) for name in VECTORS)
    products = (
        (
            (f"integers of {name}", laid[name]["integers"], FORMATS[precision].dtype),
            *((f"{kind} of {name}", laid[name][kind], f32) for kind in ("scales", "sums")),
            *((f"{kind} of {name}", shape[1:], f32) for kind in ("rescales", "shifts")),
        )
        for name, shape in shapes.items()
    )
    return (*vectors, *itertools.chain(*products))
