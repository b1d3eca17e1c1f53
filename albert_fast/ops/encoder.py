"""encoder: the shared layer num_hidden_layers times in one call, for inference (Lan et al. 2019, section 3.1).

The C++ kernel reads weights that are packed once, on first use; the packed copy lives as long as the weights and is made
again when they change. The Triton kernel reads them as they are.
"""

from __future__ import annotations

import array
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.derived import Derived
from ..runtime.operands import Operand, check, check_choice, check_launch, head_size, hold, matrix
from ..runtime.registration import forbid_derivative, is_traced, needs_dispatcher, register
from .add_layer_norm import add_layer_norm_ref
from .attention import attention_ref, check_ranges
from .bias_gelu import ACTS, bias_gelu_ref

# A layer's weights, in the order in which `weights` has them, and their shapes in H and I.
WEIGHTS = {
    "query": "H H", "query_bias": "H", "key": "H H", "key_bias": "H", "value": "H H", "value_bias": "H",
    "dense": "H H", "dense_bias": "H", "norm_weight": "H", "norm_bias": "H", "ffn": "I H", "ffn_bias": "I",
    "ffn_output": "H I", "ffn_output_bias": "H", "full_norm_weight": "H", "full_norm_bias": "H",
}  # fmt: skip
# What the kernel's time goes to, in the order in which it counts.
STAGES = (
    *("query, key, value", "attention", "attention output", "add, LayerNorm"),
    *("FFN up, activation", "FFN down", "rounding to integers", "copies", "waiting"),
)
# Of the Triton kernel: above so many tokens the operators' kernels, or torch's products, fill a GPU by themselves.
MAX_KERNEL_TOKENS = 512
MAX_KERNEL_HEAD_DIM = 128
WEIGHT_NAMES = tuple(WEIGHTS)
_PER_LAYER = len(WEIGHTS)
_MATRICES = [i for i, shape in enumerate(WEIGHTS.values()) if " " in shape]
_FFN = WEIGHT_NAMES.index("ffn")


def asked_rows(x: Tensor, rows: Tensor, cu_rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x[rows]; zeros for a row of a sequence without tokens, wherever it points."""
    counts, empty = cu_rows.diff(), cu_seqlens.diff() == 0
    none = empty.repeat_interleave(counts, output_size=len(rows))[:, None]
    if not len(x):
        return x.new_zeros((len(rows), *x.shape[1:]))
    return x[rows.clamp(0, len(x) - 1)].masked_fill(none, 0.0)


def _layer_ref(
    hidden: Tensor, weights: Sequence[Tensor], cu_seqlens: Tensor, rows: Tensor | None, cu_rows: Tensor,
    num_heads: int, softmax_scale: float, eps: float, act: str,
) -> Tensor:  # fmt: skip
    w_q, b_q, w_k, b_k, w_v, b_v, dense, dense_bias, norm, norm_bias, ffn, ffn_bias, ffn_output, ffn_output_bias = (
        weights[:14]
    )
    full, full_bias = weights[14:]
    fused = torch.nn.functional.linear(hidden, torch.cat([w_q, w_k, w_v]), torch.cat([b_q, b_k, b_v]))
    q, k, v = fused.split(hidden.shape[1], dim=1)
    if rows is not None:
        q, hidden = (asked_rows(t, rows, cu_rows, cu_seqlens) for t in (q, hidden))
    context = attention_ref(q, k, v, cu_rows, cu_seqlens, num_heads, softmax_scale)
    attended = add_layer_norm_ref(context @ dense.t(), dense_bias, hidden, norm, norm_bias, eps)
    middle = bias_gelu_ref(attended @ ffn.t(), ffn_bias, act)
    return add_layer_norm_ref(middle @ ffn_output.t(), ffn_output_bias, attended, full, full_bias, eps)


def encoder_ref(
    hidden: Tensor, weights: Sequence[Tensor], order: Sequence[int], cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, num_heads: int, softmax_scale: float, eps: float, act: str,
) -> Tensor:  # fmt: skip
    """Eager reference: the operators' references, layer after layer."""
    for i, number in enumerate(order):
        layer = weights[number * _PER_LAYER : (number + 1) * _PER_LAYER]
        last = i + 1 == len(order) and rows is not None and cu_rows is not None
        hidden = _layer_ref(
            hidden, layer, cu_seqlens, rows if last else None, cu_rows if last and cu_rows is not None else cu_seqlens,
            num_heads, softmax_scale, eps, act,
        )  # fmt: skip
    return hidden


def _pack(matrices: Sequence[Tensor]) -> Tensor:
    extension, (middle, hidden) = dispatch.extension(), matrices[_MATRICES.index(_FFN)].shape
    memory = torch.empty(extension.encoder_packed_size_cpu(hidden, middle), dtype=torch.float32)
    shapes = zip(_MATRICES, matrices, strict=True)
    held = hold("encoder", memory.device, [(WEIGHT_NAMES[i], m, tuple(m.shape), m.dtype) for i, m in shapes])
    extension.encoder_pack_cpu(*held.addresses, memory.data_ptr(), hidden, middle, torch.get_num_threads())
    return memory


# Of each thread that asks: the tensor that `stage_seconds` yielded.
_profile = threading.local()
_PACKED = Derived(_pack)


def packed(layer: Sequence[Operand]) -> Tensor:
    """The memory of one layer's packed matrices, made where it is not there or not theirs any more."""
    return _PACKED([layer[i][1].contiguous() for i in _MATRICES])  # type: ignore[union-attr]


def profile_address(threads: int) -> int:
    """Where a kernel on `threads` threads adds its seconds by stage; 0 where this thread does not ask for them."""
    seconds: Tensor | None = getattr(_profile, "seconds", None)
    if seconds is None:
        return 0
    if len(seconds) < threads:  # torch.set_num_threads was called inside
        before = len(seconds)
        seconds.resize_(threads, len(STAGES))[before:] = 0.0
    return seconds.data_ptr()


@contextmanager
def stage_seconds() -> Iterator[Tensor]:
    """Inside, calls of the C++ kernel add their seconds to the tensor that this yields: (threads, len(STAGES)) float64.

    Only calls from the thread that entered count. The tensor has a row for each thread that torch has on entry, and grows
    where torch.set_num_threads allows a kernel more.
    """
    before = getattr(_profile, "seconds", None)
    _profile.seconds = torch.zeros(torch.get_num_threads(), len(STAGES), dtype=torch.float64)
    try:
        yield _profile.seconds
    finally:
        _profile.seconds = before


def kernels_are_compared() -> bool:
    """Whether ALBERT_FAST_TUNE=1 asks for measurements on this GPU, so that `kernel_is_faster` may say True."""
    from ..kernels import _tuning

    return _tuning.asked_for()


def kernel_is_faster(
    dtype: torch.dtype, tokens: int, sizes: Sequence[int], run: Callable[[str], Tensor] | None
) -> bool:
    """Whether the Triton kernel was measured faster than the layers' operators, both in CUDA graphs, on this GPU.

    False where ALBERT_FAST_TUNE=1 does not ask for it; else what is in the tuner's file, or measured now.

    Args:
        tokens: up to the next power of two they are alike. sizes: whatever else the time depends on: widths, heads, layers.
        run: computes the layers on "operators" or "triton"; None: measure nothing, and say False of what is not known.
    """
    from ..kernels import _precision, _tuning

    by = ("operators", "triton")
    key = "x".join(map(str, (*sizes, 1 << (tokens - 1).bit_length()))) + " "
    key += _precision.numbers_name(dtype, _precision.multiplies_tf32(dtype))
    winner = _tuning.known("encoder", key)
    if winner is None and run is not None:
        candidates = [{"ONE_KERNEL": i} for i in range(2)]
        winner = _tuning.choose(
            "encoder", lambda: key, candidates, lambda tiles: run(by[tiles["ONE_KERNEL"]]), _tuning.time_in_graph
        )
    return winner is not None and winner["ONE_KERNEL"] == 1


def _fwd(
    hidden: Tensor, weights: list[Tensor], order: list[int], cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, num_heads: int, softmax_scale: float, eps: float, act: str, backend: str,
) -> Tensor:  # fmt: skip
    width, layers = _check_weights(hidden, weights)
    vectors = check_tokens("encoder", hidden, order, len(layers), cu_seqlens, rows, cu_rows, num_heads, act)
    backend = dispatch.resolve("encoder", hidden.device.type, hidden.dtype, backend)
    if backend != "cpp":
        operands = [operand for layer in layers for operand in layer]
        check_launch("encoder", backend, hidden.device, [*vectors, *operands])
        check_content("encoder", len(hidden), cu_seqlens, rows, cu_rows)
    if backend == "triton":
        from ..kernels.encoder import encoder_fwd

        return encoder_fwd(hidden, weights, order, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act)
    if backend == "reference":
        return encoder_ref(hidden, weights, order, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act)
    memory = hold("encoder", hidden.device, vectors)
    held = [hold("encoder", hidden.device, layer) for layer in layers]
    matrices = [packed(layer) for layer in layers]
    table = array.array("q")
    for layer, own in zip(held, matrices, strict=True):
        table.extend((*layer.addresses, own.data_ptr()))
    steps, threads = array.array("q", order), torch.get_num_threads()
    tokens, asked = vectors[0][2][0], 0 if rows is None else vectors[2][2][0]
    out = torch.empty((tokens if rows is None else asked, width), dtype=torch.float32)
    states, ends, rows_address, cu_rows_address = memory.addresses
    fits = dispatch.extension().encoder_fwd_cpu(
        states, out.data_ptr(), table.buffer_info()[0], steps.buffer_info()[0], len(steps), ends, vectors[1][2][0] - 1,
        tokens, rows_address, cu_rows_address, asked, width, layers[0][_FFN][2][0], num_heads,
        softmax_scale, eps, ACTS.index(act), profile_address(threads), threads,
    )  # fmt: skip
    if not fits:
        raise_content("encoder", tokens, cu_seqlens, rows, cu_rows)
    return out


def _fwd_fake(
    hidden, weights, order, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act, backend,
):  # fmt: skip
    _, layers = _check_weights(hidden, weights)
    vectors = check_tokens("encoder", hidden, order, len(layers), cu_seqlens, rows, cu_rows, num_heads, act)
    check("encoder", hidden.device, [*vectors, *(operand for layer in layers for operand in layer)])
    return hidden.new_empty((hidden.shape[0] if rows is None else rows.shape[0], hidden.shape[1]))


register(
    "encoder_fwd(Tensor hidden, Tensor[] weights, int[] order, Tensor cu_seqlens, Tensor? rows, Tensor? cu_rows, "
    "int num_heads, float softmax_scale, float eps, str act, str backend) -> Tensor",
    _fwd,
    _fwd_fake,
)

forbid_derivative("encoder_fwd", "for a gradient run the layers' operators one by one, as the models do")


def check_tokens(
    op: str, hidden: Tensor, order: Sequence[int], layers: int, cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, num_heads: int, act: str,
) -> list[Operand]:  # fmt: skip
    """What both encoders read beside weights: hidden, cu_seqlens, rows and cu_rows; ValueError for what does not go together."""
    shape = matrix(op, "hidden", hidden)
    head_size(op, shape[1], num_heads)
    check_choice(op, "act", act, ACTS)
    if not order or not all(0 <= number < layers for number in order):
        raise ValueError(f"{op}: order must name at least one layer, each from 0 to {layers - 1}, got {list(order)}")
    if (rows is None) != (cu_rows is None):
        raise ValueError(f"{op}: rows and cu_rows come together")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have the shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if rows is not None and rows.dim() != 1:
        raise ValueError(f"{op}: rows must have the shape (Tq,), got {tuple(rows.shape)}")
    ends = (cu_seqlens.shape[0],)
    return [
        ("hidden", hidden, shape, hidden.dtype),
        ("cu_seqlens", cu_seqlens, ends, torch.int32),
        ("rows", rows, (0 if rows is None else rows.shape[0],), torch.int64),
        ("cu_rows", cu_rows, ends, torch.int32),
    ]


def check_content(op: str, tokens: int, cu_seqlens: Tensor, rows: Tensor | None, cu_rows: Tensor | None) -> None:
    """ValueError for ranges and rows that do not lie where both encoders read them; a GPU is not waited for."""
    if cu_seqlens.device.type != "cpu":
        return
    check_ranges(op, "cu_seqlens", cu_seqlens, tokens)
    if rows is None or cu_rows is None:
        return
    check_ranges(op, "cu_rows", cu_rows, len(rows))
    counts = cu_rows.diff()
    first, end = (t.repeat_interleave(counts) for t in (cu_seqlens[:-1], cu_seqlens[1:]))
    outside = ((rows < first) | (rows >= end)) & (first < end)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"{op}: rows[{i}] is {int(rows[i])}, outside its sequence, which cu_rows and cu_seqlens put at "
            f"{int(first[i])} to {int(end[i]) - 1}"
        )


def raise_content(op: str, tokens: int, cu_seqlens: Tensor, rows: Tensor | None, cu_rows: Tensor | None) -> NoReturn:
    """What a C++ function found wrong."""
    check_content(op, tokens, cu_seqlens, rows, cu_rows)
    raise ValueError(f"{op}: cu_seqlens, rows or cu_rows was written while it was read")


def _check_weights(hidden: Tensor, weights: Sequence[Tensor]) -> tuple[int, list[list[Operand]]]:
    """H, and what is read of each distinct layer, by `WEIGHTS`."""
    width, count = matrix("encoder", "hidden", hidden)[1], len(weights) // _PER_LAYER
    if not count or len(weights) % _PER_LAYER:
        raise ValueError(f"encoder: {len(weights)} weights do not make layers of {_PER_LAYER} each")
    middle, _ = matrix("encoder", "ffn", weights[_FFN])
    if width < 1 or middle < 1:
        raise ValueError(f"encoder: expected H and I above 0, got {width} and {middle}")
    # A tracer looks through the cache, and warns of it; its symbols are no keys.
    cached = not is_traced() and type(width) is int and type(middle) is int
    shapes, dtype = (_shapes if cached else _shapes.__wrapped__)(width, middle), hidden.dtype
    return width, [
        [(name, weights[first + i], shape, dtype) for i, (name, shape) in enumerate(zip(WEIGHTS, shapes, strict=True))]
        for first in range(0, len(weights), _PER_LAYER)
    ]


@functools.lru_cache(maxsize=64)
def _shapes(width: int, middle: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a layer's weights, in the order of `WEIGHTS`."""
    sizes = {"H": width, "I": middle}
    return tuple(tuple(sizes[letter] for letter in shape.split()) for shape in WEIGHTS.values())


def encoder(
    hidden: Tensor, weights: Sequence[Tensor], order: Sequence[int], cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, num_heads: int, softmax_scale: float | None, eps: float, act: str = "gelu_tanh",
    *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The embeddings after all layers, without dropout; no gradient.

    In C++ a sequence's result is bitwise the same whatever else is in its batch and however many threads run; in Triton a
    batch's is the same on every chip, and the order of sums depends on how many tokens there are.

    Args:
        hidden: (T, H), packed tokens.
        weights: of each distinct layer, one after another, the tensors that `WEIGHTS` names, in its order.
        order: which distinct layer runs at each step.
        cu_seqlens: (B + 1,) int32, each sequence's first row, and T at the end.
        rows, cu_rows: the packed rows (Tq,) int64 that the last layer is asked for, sequence by sequence, and where each
            sequence's begin among them, (B + 1,) int32; None: all. A row that is asked of a sequence without tokens is
            computed from zeros in C++.
        num_heads: heads, each of H / num_heads adjacent columns.
        softmax_scale: factor on the scores, by default 1 / sqrt(head_dim).
        eps: of every LayerNorm. act: "gelu_tanh", "gelu_erf" or "relu".
        backend: "auto", or the name of one.

    Returns:
        (T, H), or (Tq, H) for `rows`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation; on a CPU also cu_seqlens, rows and
            cu_rows outside their ranges: a GPU, which is not waited for, stays within the tensors.
        TypeError: an argument that is no dense tensor, states that are not floating-point.
    """
    width = matrix("encoder", "hidden", hidden)[1]
    if softmax_scale is None:
        softmax_scale = head_size("encoder", width, num_heads) ** -0.5
    call = torch.ops.albert_fast.encoder_fwd if needs_dispatcher(hidden, *weights) else _fwd
    return call(
        hidden, list(weights), list(order), cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act, backend
    )
