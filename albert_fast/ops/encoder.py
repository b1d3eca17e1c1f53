"""encoder: all layers in one call, for inference (Lan et al. 2019, section 3.1: one layer, applied many times).

The C++ kernel reads weights that are packed once, on first use. The packed copy lives as long as the weights, and is made
again when they change. The Triton kernel reads the weights as they are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.derived import Derived
from ..runtime.kept_operands import Checked, KeptOperands
from ..runtime.operands import Operand, check, check_launch, head_size, hold, matrix
from ..runtime.registration import forbid_derivative, is_traced, needs_dispatcher, register
from ._encoder_call import CALL_SCHEMA, EncoderCall, check_call, check_content, run_cpp
from ._schema import LAYER, SLICE, WEIGHTS, check_orders, sizes_of, split_layers
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


def pack_matrices(matrices: Sequence[Tensor]) -> Tensor:
    """A layer's six matrices, in the order of the schema, in one piece of memory as the C++ kernel reads them.

    Raises:
        BackendUnavailableError: there is no C++ extension.
    """
    extension, (intermediate_size, hidden) = dispatch.extension(), matrices[_MATRICES.index(_FFN)].shape
    memory = torch.empty(extension.encoder_packed_size_cpu(hidden, intermediate_size), dtype=torch.float32)
    shapes = zip(_MATRICES, matrices, strict=True)
    held = hold("encoder", memory.device, [(_NAMES[i], m, tuple(m.shape), m.dtype) for i, m in shapes])
    extension.encoder_pack_cpu(*held.addresses, memory.data_ptr(), hidden, intermediate_size, torch.get_num_threads())
    return memory


_PACKED = Derived(pack_matrices)


def _packed(layer: Sequence[Operand]) -> Tensor:
    """One layer's packed matrices: packed now, unless they are already and have not changed since."""
    return _PACKED([layer[i][1].contiguous() for i in _MATRICES])  # type: ignore[union-attr]


def panel_columns() -> int:
    """The columns of a panel of packed matrices, which depend on the instruction set that the extension runs on."""
    return int(dispatch.extension().encoder_packed_size_cpu(1, 1)) // len(_MATRICES)


def unpack_matrix(packed: Tensor, number: int, hidden: int, intermediate_size: int) -> Tensor:
    """Matrix `number` of a layer again, bit for bit, from what `pack_matrices` made of six.

    Args:
        hidden: H. intermediate_size: I.
    """
    # Panels of columns follow one another; the last product's inner dimension is cut into slices, each with its panels.
    panel = panel_columns()
    shapes = [sizes_of(LAYER[i].shape, hidden, intermediate_size) for i in _MATRICES]
    begin = sum(-(-n // panel) * panel * k for n, k in shapes[:number])
    n, k = shapes[number]
    panels, slices = -(-n // panel), [k]
    if number == len(shapes) - 1:
        slices = [min(SLICE, k - first) for first in range(0, k, SLICE)]
    parts = []
    for columns in slices:
        region = packed[begin : begin + panels * panel * columns].view(panels, columns, panel)
        parts.append(region.transpose(1, 2).reshape(panels * panel, columns)[:n])
        begin += region.numel()
    return torch.cat(parts, dim=1)


@functools.cache
def _triton_kernel() -> ModuleType:
    """kernels.encoder, once its arguments were found to be in the order of the schema."""
    from ..kernels import _encoder_weights as weights
    from ..kernels import encoder as kernel

    check_orders(weights, WEIGHTS=_NAMES)
    return kernel


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


class EncoderWeights(list[Tensor]):
    """The weights of `encoder`, which a caller keeps from call to call: then C++ checks them all at once, see `KeptOperands`."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__(weights)
        self.kept = KeptOperands(weights)


def _run(weights: Sequence[Tensor], call: EncoderCall, backend: str) -> Tensor:
    hidden = call.hidden
    device, dtype = hidden.device, hidden.dtype
    if (
        isinstance(weights, EncoderWeights)
        and not is_traced()
        and dispatch.resolve("encoder", device.type, dtype, backend) == "cpp"
    ):
        expected = dtype, hidden.shape[1:]
        held, checked = weights.kept.hold("encoder", device, expected, lambda: _weight_operands(weights, hidden))
        return _run_cpp(held, checked, call)
    listed = _weight_operands(weights, hidden)
    operands = check_call("encoder", call, len(listed) // _PER_LAYER)
    backend = dispatch.resolve("encoder", device.type, dtype, backend)
    if backend == "cpp":
        memory = hold("encoder", device, listed)
        return _run_cpp(memory, Checked(None, listed, memory.addresses), call)
    check_launch("encoder", backend, device, [*operands, *listed])
    check_content("encoder", call)
    if backend == "triton":
        _, *others = call
        out: Tensor = _triton_kernel().encoder_fwd(hidden, weights, *others)
        return out
    return encoder_ref(weights, call)


def _run_cpp(held: Any, checked: Checked, call: EncoderCall) -> Tensor:
    """The call in C++; `held` keeps the memory behind the addresses alive until it has returned."""
    _, weights, addresses = checked
    begins = range(0, len(weights), _PER_LAYER)
    operands = check_call("encoder", call, len(begins))
    packed = [_packed(weights[i : i + _PER_LAYER]) for i in begins]
    table: list[int] = []
    for i, matrices in zip(begins, packed, strict=True):
        table += (*addresses[i : i + _PER_LAYER], matrices.data_ptr())
    out = run_cpp("encoder", dispatch.extension().encoder_fwd_cpu, call, operands, table, weights[_FFN][2][0])
    del held
    return out


def _fwd(weights: list[Tensor], *arguments: Any) -> Tensor:
    *call, backend = arguments
    return _run(weights, EncoderCall(*call), backend)


def _fwd_fake(weights, *arguments):
    *fields, _ = arguments
    call = EncoderCall(*fields)
    listed = _weight_operands(weights, call.hidden)
    operands = check_call("encoder", call, len(listed) // _PER_LAYER)
    check("encoder", call.hidden.device, [*operands, *listed])
    return call.fake_out()


register(f"encoder_fwd(Tensor[] weights, {CALL_SCHEMA}, str backend) -> Tensor", _fwd, _fwd_fake)

forbid_derivative("encoder_fwd", "for a gradient run the layers' operators one by one, as the models do")


def _weight_operands(weights: Sequence[Tensor], hidden: Tensor) -> list[Operand]:
    """The operands of all distinct layers, each in the order of `WEIGHTS`."""
    width = matrix("encoder", "hidden", hidden)[1]
    if not weights or len(weights) % _PER_LAYER:
        raise ValueError(f"encoder: {len(weights)} weights do not make layers of {_PER_LAYER} each")
    intermediate_size, _ = matrix("encoder", "ffn", weights[_FFN])
    if width < 1 or intermediate_size < 1:
        raise ValueError(f"encoder: expected H and I above 0, got {width} and {intermediate_size}")
    # A tracer would warn that it looks through the cache; its symbolic sizes cannot be keys.
    cached = not is_traced() and type(width) is int and type(intermediate_size) is int
    shapes = (_shapes if cached else _shapes.__wrapped__)(width, intermediate_size)
    named = itertools.cycle(zip(_NAMES, shapes, strict=True))
    return [(name, t, shape, hidden.dtype) for t, (name, shape) in zip(weights, named, strict=False)]


@functools.lru_cache(maxsize=64)
def _shapes(width: int, intermediate_size: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a layer's weights, in the order of `WEIGHTS`."""
    return tuple(sizes_of(shape, width, intermediate_size) for shape in WEIGHTS.values())


def packed_encoder(
    vectors: Sequence[Sequence[Tensor]], packed: Sequence[Tensor], intermediate_size: int, call: EncoderCall
) -> Tensor:
    """`encoder` in C++ for layers of which only the packed matrices are kept.

    Args:
        vectors: of each distinct layer, the ten tensors of the schema that are no matrices, in its order.
        packed: of each distinct layer, what `pack_matrices` made of its matrices.
        intermediate_size: I.

    Raises:
        As `encoder`.
    """
    hidden = call.hidden
    shapes = _shapes(matrix("encoder", "hidden", hidden)[1], intermediate_size)
    operands = check_call("encoder", call, len(packed))
    size = dispatch.extension().encoder_packed_size_cpu(hidden.shape[1], intermediate_size)
    places = [i for i in range(_PER_LAYER) if i not in _MATRICES]
    memories, table = [], []
    for own, matrices in zip(vectors, packed, strict=True):
        listed: list[Operand] = [(_NAMES[i], t, shapes[i], torch.float32) for i, t in zip(places, own, strict=True)]
        memory = hold("encoder", hidden.device, [*listed, ("packed", matrices, (size,), torch.float32)])
        row = [0] * (_PER_LAYER + 1)
        for place, address in zip((*places, _PER_LAYER), memory.addresses, strict=True):
            row[place] = address
        memories.append(memory)
        table += row
    out = run_cpp("encoder", dispatch.extension().encoder_fwd_cpu, call, operands, table, intermediate_size)
    del memories
    return out


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
        weights: for each distinct layer in turn, the tensors that `WEIGHTS` names, in its order; as EncoderWeights where the
            caller keeps them.
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
    kept = isinstance(weights, EncoderWeights)  # of no subclass; without gradients nothing else is asked of them
    if needs_dispatcher(hidden, *(() if kept and not torch.is_grad_enabled() else weights)):
        out: Tensor = torch.ops.albert_fast.encoder_fwd(list(weights), *call, backend)
        return out
    return _run(weights if kept else list(weights), call, backend)
