"""encoder: the shared layer num_hidden_layers times in one call, for inference (Lan et al. 2019, section 3.1).

The C++ kernel reads weights that are packed once, on first use; the packed copy lives as long as the weights and is made
again when they change. The Triton kernel reads them as they are.
"""

from __future__ import annotations

import array
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import dispatch
from ..registration import check_devices, forbid_derivative, needs_dispatcher, register
from .add_layer_norm import add_layer_norm_ref
from .attention import attention_ref, check_ranges
from .bias_gelu import ACTS, bias_gelu_ref

# A layer's weights, in the order in which `weights` has them, and their shapes in H and I.
WEIGHTS = {
    "qkv": "3H H", "qkv_bias": "3H", "dense": "H H", "dense_bias": "H", "norm_weight": "H", "norm_bias": "H",
    "ffn": "I H", "ffn_bias": "I", "ffn_output": "H I", "ffn_output_bias": "H", "full_norm_weight": "H",
    "full_norm_bias": "H",
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
_SAMPLES = 64


def _layer_ref(
    hidden: Tensor, weights: Sequence[Tensor], cu_seqlens: Tensor, rows: Tensor | None, cu_rows: Tensor,
    num_heads: int, softmax_scale: float, eps: float, act: str,
) -> Tensor:  # fmt: skip
    qkv, qkv_bias, dense, dense_bias, norm, norm_bias, ffn, ffn_bias, ffn_output, ffn_output_bias, full, full_bias = (
        weights
    )
    q, k, v = torch.nn.functional.linear(hidden, qkv, qkv_bias).split(hidden.shape[1], dim=1)
    if rows is not None:
        q, hidden = q[rows], hidden[rows]
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


@dataclass(frozen=True)
class _Packed:
    """A layer's matrices in the kernel's layout, and what tells whether they are still those of the model."""

    memory: Tensor
    versions: tuple[tuple[int, int], ...]
    samples: tuple[Tensor, ...]

    def is_current(self, matrices: Sequence[Tensor]) -> bool:
        # Writes through `.data` leave the version as it is; some elements are compared for those.
        return self.versions == _versions(matrices) and all(map(torch.equal, map(_sample, matrices), self.samples))


# Of each thread that asks: the tensor that `stage_seconds` yielded.
_profile = threading.local()
# Keyed by the first matrix of a layer, as long as that lives.
_PACKED = WeakIdKeyDictionary()


def _versions(matrices: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((m.data_ptr(), 0 if m.is_inference() else m._version) for m in matrices)


def _sample(matrix: Tensor) -> Tensor:
    return matrix.detach().flatten()[:: max(1, matrix.numel() // _SAMPLES)]


def packed(weights: Sequence[Tensor]) -> Tensor:
    """The memory of one layer's packed matrices, made where it is not there or not theirs any more."""
    matrices = [weights[i] for i in _MATRICES]
    found: _Packed | None = _PACKED.get(matrices[0])
    if found is None or not found.is_current(matrices):
        extension, (middle, hidden) = dispatch.extension(), weights[_MATRICES[2]].shape
        memory = torch.empty(extension.encoder_packed_size_cpu(hidden, middle), dtype=torch.float32)
        extension.encoder_pack_cpu(
            *(m.data_ptr() for m in matrices), memory.data_ptr(), hidden, middle, torch.get_num_threads()
        )
        found = _Packed(memory, _versions(matrices), tuple(_sample(m).clone() for m in matrices))
        _PACKED[matrices[0]] = found
    return found.memory


def forget_packed(weights: Sequence[Tensor]) -> None:
    """Let go of one layer's packed matrices: the next call makes them anew."""
    _PACKED.pop(weights[_MATRICES[0]], None)


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
    backend = dispatch.resolve("encoder", hidden.device.type, hidden.dtype, backend)
    if backend == "triton":
        from ..kernels.encoder import encoder_fwd

        return encoder_fwd(hidden, weights, order, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act)
    if backend == "reference":
        return encoder_ref(hidden, weights, order, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act)
    hidden, weights = hidden.contiguous(), [w.contiguous() for w in weights]
    layers = [weights[i : i + _PER_LAYER] for i in range(0, len(weights), _PER_LAYER)]
    memory = [packed(layer) for layer in layers]
    table = array.array("q")
    for layer, matrices in zip(layers, memory, strict=True):
        table.extend([*(w.data_ptr() for w in layer), matrices.data_ptr()])
    steps, threads = array.array("q", order), torch.get_num_threads()
    out = torch.empty((len(hidden) if rows is None else len(rows), hidden.shape[1]), dtype=torch.float32)
    dispatch.extension().encoder_fwd_cpu(
        hidden.data_ptr(), out.data_ptr(), table.buffer_info()[0], steps.buffer_info()[0], len(steps),
        cu_seqlens.data_ptr(), len(cu_seqlens) - 1, len(hidden), 0 if rows is None else rows.data_ptr(),
        0 if cu_rows is None else cu_rows.data_ptr(), 0 if rows is None else len(rows), hidden.shape[1],
        len(layers[0][WEIGHT_NAMES.index("ffn")]), num_heads, softmax_scale, eps, ACTS.index(act),
        profile_address(threads), threads,
    )  # fmt: skip
    return out


register(
    "encoder_fwd(Tensor hidden, Tensor[] weights, int[] order, Tensor cu_seqlens, Tensor? rows, Tensor? cu_rows, "
    "int num_heads, float softmax_scale, float eps, str act, str backend) -> Tensor",
    _fwd,
    lambda hidden, weights, order, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act, backend: (
        hidden.new_empty((hidden.shape[0] if rows is None else rows.shape[0], hidden.shape[1]))
    ),
)

forbid_derivative("encoder_fwd", "for a gradient run the layers' operators one by one, as the models do")


def check_tokens(
    op: str, hidden: Tensor, order: Sequence[int], layers: int, cu_seqlens: Tensor, rows: Tensor | None,
    cu_rows: Tensor | None, num_heads: int, softmax_scale: float | None, act: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, float]:  # fmt: skip
    """What both encoders ask of everything but weights: ValueError, or cu_seqlens, rows, cu_rows and scale as kernels take them."""
    if hidden.dim() != 2 or num_heads < 1 or hidden.shape[1] % num_heads:
        raise ValueError(
            f"{op}: expected hidden (T, H), H a multiple of num_heads, got {tuple(hidden.shape)} and {num_heads} heads"
        )
    if act not in ACTS:
        raise ValueError(f"{op}: unknown act {act!r}; known: {', '.join(ACTS)}")
    if not order or not all(0 <= number < layers for number in order):
        raise ValueError(f"{op}: the weights of {layers} layers do not make the layers {list(order)}")
    if (rows is None) != (cu_rows is None):
        raise ValueError(f"{op}: rows and cu_rows come together")
    cu_seqlens = cu_seqlens.contiguous()
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ranges(op, "cu_seqlens", cu_seqlens, len(hidden))
        if rows is not None and cu_rows is not None:
            check_ranges(op, "cu_rows", cu_rows, len(rows))
            if len(cu_rows) != len(cu_seqlens) or bool(((rows < 0) | (rows >= len(hidden))).any()):
                raise ValueError(f"{op}: rows must lie in [0, {len(hidden)}) and cu_rows have the shape of cu_seqlens")
            rows, cu_rows = rows.contiguous(), cu_rows.contiguous()
    return cu_seqlens, rows, cu_rows, (hidden.shape[1] // num_heads) ** -0.5 if softmax_scale is None else softmax_scale


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
            sequence's begin among them, (B + 1,) int32; None: all.
        num_heads: heads, each of H / num_heads adjacent columns.
        softmax_scale: factor on the scores, by default 1 / sqrt(head_dim).
        eps: of every LayerNorm. act: "gelu_tanh", "gelu_erf" or "relu".
        backend: "auto", or the name of one.

    Returns:
        (T, H), or (Tq, H) for `rows`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation.
    """
    count = len(weights) // _PER_LAYER
    if len(weights) % _PER_LAYER:
        raise ValueError(f"encoder: {len(weights)} weights do not make layers of {_PER_LAYER} each")
    cu_seqlens, rows, cu_rows, softmax_scale = check_tokens(
        "encoder", hidden, order, count, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, act
    )
    sizes = {"H": hidden.shape[1], "3H": 3 * hidden.shape[1], "I": weights[WEIGHT_NAMES.index("ffn")].shape[0]}
    for i, weight in enumerate(weights):
        name, shape = (
            WEIGHT_NAMES[i % _PER_LAYER],
            tuple(sizes[n] for n in WEIGHTS[WEIGHT_NAMES[i % _PER_LAYER]].split()),
        )
        if weight.shape != shape or weight.dtype != hidden.dtype:
            raise ValueError(
                f"encoder: expected {name} of shape {shape} in {hidden.dtype}, got {tuple(weight.shape)} in {weight.dtype}"
            )
    check_devices("encoder", hidden, *weights, cu_seqlens, rows, cu_rows)
    call = torch.ops.albert_fast.encoder_fwd if needs_dispatcher(hidden, *weights) else _fwd
    return call(
        hidden, list(weights), list(order), cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act, backend
    )
