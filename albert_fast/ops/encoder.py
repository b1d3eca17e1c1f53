"""encoder: all layers in one call, for inference (Lan et al. 2019, section 3.1: one layer, applied many times).

The C++ kernel reads weights that are packed once, on first use. The packed copy lives as long as the weights, and is made
again when they change. The Triton kernel reads the weights as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.derived import Derived
from ..runtime.operands import Operand, check, check_launch, head_size, hold, matrix
from ..runtime.registration import forbid_derivative, is_traced, needs_dispatcher, register
from ._encoder_call import CALL_SCHEMA, EncoderCall, check_call, check_content, run_cpp
from ._schema import LAYER, WEIGHTS, check_orders, sizes_of, split_layers
from .add_layer_norm import add_layer_norm_ref
from .attention import attention_ref
from .bias_gelu import bias_gelu_ref

# The Triton kernel takes no more tokens: with more, the operators' kernels or torch's products fill a GPU by themselves.
MAX_KERNEL_TOKENS = 512
MAX_KERNEL_HEAD_DIM = 128
_NAMES = tuple(WEIGHTS)
_PER_LAYER = len(WEIGHTS)
_MATRICES = [i for i, tensor in enumerate(LAYER) if tensor.role == "matrix"]
_FFN = _NAMES.index("ffn")


def encoder_ref(weights: Sequence[Tensor], call: EncoderCall) -> Tensor:
    """Eager reference: the operators' references, layer after layer."""
    layers, hidden = split_layers(weights), call.hidden
    for layer_index, wanted_rows, cu_queries in call.steps():
        w = layers[layer_index]
        matrices, biases = (
            torch.cat([w[f"{name}{kind}"] for name in ("query", "key", "value")]) for kind in ("", "_bias")
        )
        q, k, v = torch.nn.functional.linear(hidden, matrices, biases).split(hidden.shape[1], dim=1)
        if wanted_rows is not None:
            q, hidden = call.select_wanted(q), call.select_wanted(hidden)
        context = attention_ref(q, k, v, cu_queries, call.cu_seqlens, call.num_heads, call.softmax_scale)
        product = context @ w["dense"].t()
        attended = add_layer_norm_ref(product, w["dense_bias"], hidden, w["norm_weight"], w["norm_bias"], call.eps)
        down = bias_gelu_ref(attended @ w["ffn"].t(), w["ffn_bias"], call.act) @ w["ffn_output"].t()
        norm = w["full_norm_weight"], w["full_norm_bias"]
        hidden = add_layer_norm_ref(down, w["ffn_output_bias"], attended, *norm, call.eps)
    return hidden


def _pack(matrices: Sequence[Tensor]) -> Tensor:
    extension, (intermediate_size, hidden) = dispatch.extension(), matrices[_MATRICES.index(_FFN)].shape
    memory = torch.empty(extension.encoder_packed_size_cpu(hidden, intermediate_size), dtype=torch.float32)
    shapes = zip(_MATRICES, matrices, strict=True)
    held = hold("encoder", memory.device, [(_NAMES[i], m, tuple(m.shape), m.dtype) for i, m in shapes])
    extension.encoder_pack_cpu(*held.addresses, memory.data_ptr(), hidden, intermediate_size, torch.get_num_threads())
    return memory


_PACKED = Derived(_pack)


def _packed(layer: Sequence[Operand]) -> Tensor:
    """One layer's packed matrices: packed now, unless they are already and have not changed since."""
    return _PACKED([layer[i][1].contiguous() for i in _MATRICES])  # type: ignore[union-attr]


@functools.cache
def _triton_kernel() -> ModuleType:
    """kernels.encoder, once its arguments were found to be in the order of the schema."""
    from ..kernels import encoder as kernel

    return check_orders(kernel, WEIGHTS=_NAMES)


def kernels_are_compared() -> bool:
    """Whether ALBERT_FAST_TUNE=1 asks for measurements on this GPU, so that `kernel_is_faster` may say True."""
    from ..kernels import _tuning

    return _tuning.asked_for()


def kernel_is_faster(
    dtype: torch.dtype, tokens: int, sizes: Sequence[int], run: Callable[[str], Tensor] | None
) -> bool:
    """Whether the Triton kernel was measured faster than the layers' operators, both in CUDA graphs, on this GPU.

    The answer comes from the tuner's file or is measured now; without ALBERT_FAST_TUNE=1 it is False.

    Args:
        tokens: counts up to the same power of two share one answer. sizes: what else the time depends on: widths, heads,
            layers.
        run: computes the layers on "operators" or "triton"; None: measure nothing, and return False if it is not known.
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


def _run(weights: Sequence[Tensor], call: EncoderCall, backend: str) -> Tensor:
    layers = _layer_operands(weights, call.hidden)
    operands = check_call("encoder", call, len(layers))
    device = call.hidden.device
    backend = dispatch.resolve("encoder", device.type, call.hidden.dtype, backend)
    if backend == "cpp":
        held = [hold("encoder", device, layer) for layer in layers]
        packed = [_packed(layer) for layer in layers]
        table = [at for own, matrices in zip(held, packed, strict=True) for at in (*own.addresses, matrices.data_ptr())]
        intermediate_size = layers[0][_FFN][2][0]
        return run_cpp("encoder", dispatch.extension().encoder_fwd_cpu, call, operands, table, intermediate_size)
    check_launch("encoder", backend, device, [*operands, *(operand for layer in layers for operand in layer)])
    check_content("encoder", call)
    if backend == "triton":
        hidden, *others = call
        out: Tensor = _triton_kernel().encoder_fwd(hidden, weights, *others)
        return out
    return encoder_ref(weights, call)


def _fwd(weights: list[Tensor], *arguments: Any) -> Tensor:
    *call, backend = arguments
    return _run(weights, EncoderCall(*call), backend)


def _fwd_fake(weights, *arguments):
    *fields, _ = arguments
    call = EncoderCall(*fields)
    layers = _layer_operands(weights, call.hidden)
    operands = check_call("encoder", call, len(layers))
    check("encoder", call.hidden.device, [*operands, *(operand for layer in layers for operand in layer)])
    return call.fake_out()


register(f"encoder_fwd(Tensor[] weights, {CALL_SCHEMA}, str backend) -> Tensor", _fwd, _fwd_fake)

forbid_derivative("encoder_fwd", "for a gradient run the layers' operators one by one, as the models do")


def _layer_operands(weights: Sequence[Tensor], hidden: Tensor) -> list[list[Operand]]:
    """The operands of each distinct layer, in the order of `WEIGHTS`."""
    width = matrix("encoder", "hidden", hidden)[1]
    if not weights or len(weights) % _PER_LAYER:
        raise ValueError(f"encoder: {len(weights)} weights do not make layers of {_PER_LAYER} each")
    intermediate_size, _ = matrix("encoder", "ffn", weights[_FFN])
    if width < 1 or intermediate_size < 1:
        raise ValueError(f"encoder: expected H and I above 0, got {width} and {intermediate_size}")
    # A tracer would warn that it looks through the cache; its symbolic sizes cannot be keys.
    cached = not is_traced() and type(width) is int and type(intermediate_size) is int
    shapes = (_shapes if cached else _shapes.__wrapped__)(width, intermediate_size)
    return [
        [
            (name, t, shape, hidden.dtype)
            for name, t, shape in zip(_NAMES, weights[i : i + _PER_LAYER], shapes, strict=True)
        ]
        for i in range(0, len(weights), _PER_LAYER)
    ]


@functools.lru_cache(maxsize=64)
def _shapes(width: int, intermediate_size: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a layer's weights, in the order of `WEIGHTS`."""
    return tuple(sizes_of(shape, width, intermediate_size) for shape in WEIGHTS.values())


def encoder(
    hidden: Tensor,
    weights: Sequence[Tensor],
    layer_indices: Sequence[int],
    cu_seqlens: Tensor,
    wanted_rows: Tensor | None,
    cu_wanted: Tensor | None,
    num_heads: int,
    softmax_scale: float | None,
    eps: float,
    act: str = "gelu_tanh",
    *,
    backend: str = "auto",
) -> Tensor:
    """The hidden states after all layers, without dropout; no gradient.

    In C++ a sequence's result does not depend on the rest of the batch or on the number of threads, to the bit. In Triton
    a batch's result is the same on every chip, and the order of sums depends on the number of tokens.

    Args:
        hidden: (T, H), packed tokens.
        weights: for each distinct layer in turn, the tensors that `WEIGHTS` names, in its order.
        layer_indices: which distinct layer runs at each step.
        cu_seqlens: (B + 1,) int32, each sequence's first row, and T at the end.
        wanted_rows, cu_wanted: the rows (Tq,) int64 of the packed batch that the last layer is computed for, sequence by
            sequence, and (B + 1,) int32 where each sequence's rows begin among them; None: all rows. In C++ a row that is
            wanted of a sequence without tokens is computed from zeros.
        num_heads: heads, each of H / num_heads adjacent columns.
        softmax_scale: factor on the scores, by default 1 / sqrt(head_dim).
        eps: of every LayerNorm. act: "gelu_tanh", "gelu_erf" or "relu".
        backend: "auto", or the name of one.

    Returns:
        (T, H), or (Tq, H) for `wanted_rows`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation; on a CPU also cu_seqlens, wanted_rows
            and cu_wanted out of range. A GPU is not waited for: there the kernels read nothing outside the tensors.
        TypeError: an argument that is no dense tensor, states that are not floating-point.
    """
    width = matrix("encoder", "hidden", hidden)[1]
    if softmax_scale is None:
        softmax_scale = head_size("encoder", width, num_heads) ** -0.5
    call = EncoderCall(
        hidden, list(layer_indices), cu_seqlens, wanted_rows, cu_wanted, num_heads, softmax_scale, eps, act
    )
    if needs_dispatcher(hidden, *weights):
        out: Tensor = torch.ops.albert_fast.encoder_fwd(list(weights), *call, backend)
        return out
    return _run(list(weights), call, backend)
