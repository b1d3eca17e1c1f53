"""quantized_encoder: `encoder` on rounded weights and activations, for inference.

The dtype of the hidden states selects the arithmetic (`_integers.ARITHMETICS`). float32: the C++ kernel's, with integers of 8
or 16 bits, attention on integers too, and float32 between. bfloat16: the Triton kernels', with int8 or float8 products, and
attention and everything between in bfloat16.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.kept_operands import Checked, KeptOperands
from ..runtime.operands import Operand, check, check_choice, check_launch, head_size, hold, matrix
from ..runtime.registration import forbid_derivative, needs_dispatcher, register
from ._encoder_call import CALL_SCHEMA, EncoderCall, check_call, check_content, run_cpp
from ._integers import (
    ARITHMETICS,
    FORMATS,
    VALUE_LEVELS,
    expected_layout,
    product_ref,
    round_rows,
    slices,
    unpack,
    unpack_channels,
)
from ._schema import PRODUCTS, VECTORS, check_orders, matrix_sizes, sizes_of
from .add_layer_norm import add_layer_norm_ref
from .attention import attention_ref
from .bias_gelu import bias_gelu_ref

_OP = "quantized_encoder"


class ProductTensors(NamedTuple):
    """One product's matrix (N, K), laid out by `lay_out`, and the factor and shift (K,) of its activations."""

    integers: Tensor
    scales: Tensor
    sums: Tensor
    rescales: Tensor
    shifts: Tensor


dispatch.expect(product_tensors=ProductTensors._fields)


class QuantizedLayers(NamedTuple):
    """The rounded weights of all distinct layers, as flat lists: VECTORS of each layer in turn, and for each of PRODUCTS the
    lists of its ProductTensors."""

    vectors: list[Tensor]
    integers: list[Tensor]
    scales: list[Tensor]
    sums: list[Tensor]
    rescales: list[Tensor]
    shifts: list[Tensor]

    def layers(self) -> Iterator[tuple[dict[str, Tensor], dict[str, ProductTensors]]]:
        """Each distinct layer's vectors and products, by name.

        Raises:
            ValueError: the lists do not hold whole layers.
        """
        vectors, *products = self
        count = len(vectors) // len(VECTORS)
        fits = all(len(tensors) == count * len(PRODUCTS) for tensors in products)
        if not count or len(vectors) % len(VECTORS) or not fits:
            lengths = ", ".join(f"{len(tensors)} {name}" for name, tensors in zip(self._fields, self, strict=True))
            raise ValueError(f"{_OP}: {lengths} are not those of whole layers")
        tensors = map(ProductTensors._make, zip(*products, strict=True))
        for i in range(0, len(vectors), len(VECTORS)):
            named = dict(zip(VECTORS, vectors[i : i + len(VECTORS)], strict=True))
            yield named, dict(zip(PRODUCTS, itertools.islice(tensors, len(PRODUCTS)), strict=True))


class QuantizedWeights(QuantizedLayers):
    """QuantizedLayers that a caller keeps from call to call: then C++ checks them all at once, see `KeptOperands`."""

    @functools.cached_property
    def kept(self) -> KeptOperands:
        """The tensors in the order of the C++ function's table."""
        return KeptOperands([t for vectors, products in self.layers() for t in _table_row(vectors, products)])


class QuantizedOptions(NamedTuple):
    """What a call names beside layers and EncoderCall. The first three serve GPUs: see `quantized_encoder`."""

    sequence_order: Tensor | None  # (B,) int32
    max_seqlen: int
    max_wanted: int
    precision: str
    backend: str


_SCHEMA = (
    "Tensor[] vectors, Tensor[] integers, Tensor[] scales, Tensor[] sums, Tensor[] rescales, Tensor[] shifts, "
    f"{CALL_SCHEMA}, Tensor? sequence_order, SymInt max_seqlen, SymInt max_wanted, str precision, str backend"
)


def integer_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, num_heads: int, softmax_scale: float
) -> Tensor:
    """Attention as the C++ kernel computes it (csrc/cpu/integer_attention.h), softmax in floats.

    Keys and queries are rounded row by row, values column by column, probabilities to steps of the largest. Their bits are
    chosen so that sums of 64 products fit 32 bits.
    """
    out, d = torch.zeros_like(q), q.shape[1] // num_heads
    most = FORMATS["int16"].activation_levels
    levels = {"q": min(most, (2**31 - 1) // (most * min(d, 64))), "k": most, "v": VALUE_LEVELS, "p": most}

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


def _product_ref(
    products: dict[str, ProductTensors], sizes: tuple[int, int], precision: str, part: int | None, x: Tensor, name: str
) -> Tensor:
    """x (T, K) times the matrix of the product `name`, of a layer of the sizes (H, I); rounded in parts of `part` columns."""
    n, k = matrix_sizes(name, *sizes)
    integers, scales, _, rescales, shifts = products[name]
    matrix, steps = unpack(name, integers, (n, k)), unpack_channels(name, scales, n)
    return product_ref(x * rescales + shifts, matrix, steps, precision, slices(name, k, part))


def quantized_encoder_ref(layers: QuantizedLayers, call: EncoderCall, precision: str) -> Tensor:
    """Eager reference: what the kernels do, in the operators' references; it does not read `sums`."""
    arithmetic, width = ARITHMETICS[call.hidden.dtype], call.hidden.shape[1]
    attention = integer_attention_ref if arithmetic.integer_attention else attention_ref

    def stored(x: Tensor) -> Tensor:
        """x after it was written to memory and read again."""
        return x.to(arithmetic.between).float()

    distinct = list(layers.layers())
    # A kernel rounds its result for the next product before it stores it; residuals are read from memory.
    exact = call.hidden.float()
    for layer_index, wanted_rows, cu_queries in call.steps():
        vectors, products = distinct[layer_index]
        w = {name: vector.float() for name, vector in vectors.items()}
        product = functools.partial(_product_ref, products, (width, len(w["ffn_bias"])), precision, arithmetic.slice)

        q, k, v = stored(product(exact, "qkv") + w["qkv_bias"]).split(width, dim=1)
        residual = stored(exact)
        if wanted_rows is not None:
            q, residual = call.select_wanted(q), call.select_wanted(residual)
        context = stored(attention(q, k, v, cu_queries, call.cu_seqlens, call.num_heads, call.softmax_scale))
        dense, norm = stored(product(context, "dense")), (w["norm_weight"], w["norm_bias"])
        attended = add_layer_norm_ref(dense, w["dense_bias"], residual, *norm, call.eps)
        activated = bias_gelu_ref(stored(product(attended, "ffn")), w["ffn_bias"], call.act)
        down, norm = stored(product(activated, "ffn_output")), (w["full_norm_weight"], w["full_norm_bias"])
        exact = add_layer_norm_ref(down, w["ffn_output_bias"], stored(attended), *norm, call.eps)
    return exact.to(call.hidden.dtype)


def _layer_operands(layers: QuantizedLayers, hidden: Tensor, precision: str) -> list[Operand]:
    """The operands of all distinct layers, in the order of the C++ function's table."""
    check_choice(_OP, "precision", precision, FORMATS)
    form, width = FORMATS[precision], matrix(_OP, "hidden", hidden)[1]
    if hidden.dtype not in form.hidden:
        known = " or ".join(str(dtype) for dtype in form.hidden)
        raise ValueError(f"{_OP}: {precision} expects hidden in {known}, got {hidden.dtype}")
    distinct, operands = list(layers.layers()), list[Operand]()
    panels = layers.integers[0].dim() == 1
    for vectors, products in distinct:
        ffn_bias = vectors["ffn_bias"]
        if ffn_bias.dim() != 1 or not len(ffn_bias):
            raise ValueError(f"{_OP}: expected ffn_bias of shape (I,), I above 0, got {tuple(ffn_bias.shape)}")
        # A compiler's symbolic sizes cannot be keys of the cache.
        expectation = _expected if type(width) is type(len(ffn_bias)) is int else _expected.__wrapped__
        expected = expectation(width, len(ffn_bias), hidden.dtype, precision, panels)
        row = zip(expected, _table_row(vectors, products), strict=True)
        operands += [(name, tensor, shape, dtype) for (name, shape, dtype), tensor in row]
    return operands


def _table_row(vectors: dict[str, Tensor], products: dict[str, ProductTensors]) -> Iterator[Tensor]:
    """A layer's tensors in the order of the C++ function's table."""
    return itertools.chain(vectors.values(), *products.values())


def _call_operands(layers: QuantizedLayers, call: EncoderCall, options: QuantizedOptions) -> list[Operand]:
    """The operands of a call beside the layers."""
    operands = check_call(_OP, call, len(layers.vectors) // len(VECTORS))
    return [*operands, ("sequence_order", options.sequence_order, (call.cu_seqlens.shape[0] - 1,), torch.int32)]


@functools.cache
def _triton_kernel() -> ModuleType:
    """kernels.quantized_encoder, once its arguments were found to be in the order of the schema."""
    from ..kernels import quantized_encoder as kernel

    orders = {"VECTORS": tuple(VECTORS), "PRODUCTS": tuple(PRODUCTS), "PRODUCT_TENSORS": ProductTensors._fields}
    return check_orders(kernel, **orders)


def run_quantized_encoder(layers: QuantizedLayers, call: EncoderCall, options: QuantizedOptions) -> Tensor:
    """`quantized_encoder` from its arguments as records."""
    kept = isinstance(layers, QuantizedWeights)  # of no subclass; without gradients nothing else is asked of them
    if needs_dispatcher(call.hidden, *(() if kept and not torch.is_grad_enabled() else layers.vectors)):
        out: Tensor = torch.ops.albert_fast.quantized_encoder_fwd(*layers, *call, *options)
        return out
    return _run(layers, call, options)


def _run(layers: QuantizedLayers, call: EncoderCall, options: QuantizedOptions) -> Tensor:
    device, dtype, precision = call.hidden.device, call.hidden.dtype, options.precision
    if isinstance(layers, QuantizedWeights) and dispatch.resolve(_OP, device.type, dtype, options.backend) == "cpp":
        expected = dtype, call.hidden.shape[1:], precision
        _check_layout(layers, "cpp")
        held, checked = layers.kept.hold(_OP, device, expected, lambda: _layer_operands(layers, call.hidden, precision))
        return _run_cpp(held, checked, layers, call, options)
    operands = _layer_operands(layers, call.hidden, precision)
    call_operands = _call_operands(layers, call, options)
    backend = dispatch.resolve(_OP, device.type, dtype, options.backend)
    if backend != "cpp":
        check_launch(_OP, backend, device, [*call_operands, *operands])
        check_content(_OP, call)
    if backend == "reference":
        return quantized_encoder_ref(layers, call, precision)
    _check_layout(layers, backend)
    if backend == "triton":
        out: Tensor = _triton_kernel().quantized_encoder_fwd(
            call.hidden,
            *layers,
            call.layer_indices,
            call.cu_seqlens,
            call.wanted_rows,
            call.cu_wanted,
            options.sequence_order,
            options.max_seqlen,
            options.max_wanted,
            call.num_heads,
            call.softmax_scale,
            call.eps,
            call.act,
        )
        return out
    memory = hold(_OP, device, operands)
    return _run_cpp(memory, Checked(None, operands, memory.addresses), layers, call, options)


def _check_layout(layers: QuantizedLayers, backend: str) -> None:
    """ValueError for integers that were laid out for another backend."""
    panels = layers.integers[0].dim() == 1
    if panels != (backend == "cpp"):
        found, expected = ("panels", "rows") if panels else ("rows", "panels")
        raise ValueError(f"{_OP}: the {backend} kernel reads integers in {expected}, not in {found}")


def _run_cpp(
    held: Any, checked: Checked, layers: QuantizedLayers, call: EncoderCall, options: QuantizedOptions
) -> Tensor:
    """The call in C++; `held` keeps the memory behind the addresses alive until it has returned."""
    (intermediate_size,), bits = checked.operands[_FFN_BIAS][2], FORMATS[options.precision].dtype.itemsize * 8
    operands = check_call(_OP, call, len(layers.vectors) // len(VECTORS))  # C++ sorts sequences by itself
    function = dispatch.extension().quantized_encoder_fwd_cpu
    out = run_cpp(_OP, function, call, operands, checked.addresses, intermediate_size, bits)
    del held
    return out


_FFN_BIAS = tuple(VECTORS).index("ffn_bias")


def _records(arguments: tuple[Any, ...]) -> tuple[QuantizedLayers, EncoderCall, QuantizedOptions]:
    """The records of a call from its arguments in the order of _SCHEMA."""
    rest = iter(arguments)
    layers = QuantizedLayers._make(itertools.islice(rest, len(QuantizedLayers._fields)))
    call = EncoderCall._make(itertools.islice(rest, len(EncoderCall._fields)))
    return layers, call, QuantizedOptions._make(rest)


def _fwd(*arguments: Any) -> Tensor:
    return _run(*_records(arguments))


def _fwd_fake(*arguments):
    layers, call, options = _records(arguments)
    operands = _layer_operands(layers, call.hidden, options.precision)
    check(_OP, call.hidden.device, [*_call_operands(layers, call, options), *operands])
    return call.fake_out()


register(f"quantized_encoder_fwd({_SCHEMA}) -> Tensor", _fwd, _fwd_fake)

forbid_derivative("quantized_encoder_fwd", "integers have no gradient; take the weights in float32")


def quantized_encoder(
    hidden: Tensor,
    vectors: Sequence[Tensor],
    integers: Sequence[Tensor],
    scales: Sequence[Tensor],
    sums: Sequence[Tensor],
    rescales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    layer_indices: Sequence[int],
    cu_seqlens: Tensor,
    wanted_rows: Tensor | None,
    cu_wanted: Tensor | None,
    num_heads: int,
    softmax_scale: float | None,
    eps: float,
    act: str = "gelu_tanh",
    *,
    precision: str,
    sequence_order: Tensor | None = None,
    max_seqlen: int | None = None,
    max_wanted: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The hidden states after all layers, on rounded weights, without dropout; no gradient.

    A sequence's result does not depend on the rest of the batch, to the bit, nor on the number of threads; on GPUs it is the
    same wherever the kernels have the same tiles.

    Args:
        hidden: (T, H), packed tokens: float32 for the C++ kernel, bfloat16 for the Triton kernels.
        vectors: for each distinct layer in turn, the eight that `VECTORS` names: biases in float32, weights and biases of
            the norms in hidden's dtype.
        integers, scales, sums: for each distinct layer in turn, those of its four `PRODUCTS`, as `lay_out` gives them. In
            16 bits, sums of a run of 256 products must fit 32 bits, as with `quantization.rounding.int16_scale`.
        rescales, shifts: likewise, the factor and the shift (K,) of each activation, float32.
        layer_indices: which distinct layer runs at each step.
        cu_seqlens, wanted_rows, cu_wanted, num_heads, softmax_scale, eps, act, backend: as for `encoder`.
        precision: "int8", "int16" (float32 hidden only) or "fp8" (bfloat16 hidden only), of every matrix.
        sequence_order, max_seqlen, max_wanted: for GPUs: `sequence_order` of `attention`, and upper bounds on the tokens
            and on the wanted rows of a sequence; T by default.

    Returns:
        (T, H), or (Tq, H) for `wanted_rows`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation or precision; on a CPU also cu_seqlens,
            wanted_rows and cu_wanted out of range. TypeError: an argument that is no dense tensor.
    """
    width = matrix(_OP, "hidden", hidden)[1]
    if softmax_scale is None:
        softmax_scale = head_size(_OP, width, num_heads) ** -0.5
    max_seqlen = len(hidden) if max_seqlen is None else max_seqlen
    max_wanted = max_seqlen if max_wanted is None else max_wanted
    layers = QuantizedLayers._make(map(list, (vectors, integers, scales, sums, rescales, shifts)))
    indices = list(layer_indices)
    call = EncoderCall(hidden, indices, cu_seqlens, wanted_rows, cu_wanted, num_heads, softmax_scale, eps, act)
    options = QuantizedOptions(sequence_order, max_seqlen, max_wanted, precision, backend)
    return run_quantized_encoder(layers, call, options)


@functools.lru_cache(maxsize=64)
def _expected(
    width: int, intermediate_size: int, hidden: torch.dtype, precision: str, panels: bool
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of a layer's tensors: the vectors, then product by product its ProductTensors."""
    f32 = torch.float32
    expected = [
        (name, sizes_of(shape, width, intermediate_size), hidden if "norm" in name else f32)
        for name, shape in VECTORS.items()
    ]
    for name in PRODUCTS:
        n, k = matrix_sizes(name, width, intermediate_size)
        shapes = {**expected_layout(name, (n, k), precision, panels), "rescales": (k,), "shifts": (k,)}
        for kind in ProductTensors._fields:
            dtype = FORMATS[precision].dtype if kind == "integers" else f32
            expected.append((f"{kind} of {name}", shapes[kind], dtype))
    return tuple(expected)
