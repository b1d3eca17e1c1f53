"""Counts what a launch of a GPU kernel moves and computes, from its arguments, and the least time a chip needs for that.

These are counts, not measurements. Bytes: every tensor argument counts once, by its size; if a kernel touches only part of a
tensor, `_TOUCHED` gives the number of elements. Floating-point operations: `_OPERATIONS` has a row for every kernel, except
those that only copy or count. tests/test_floors.py compares the bytes with every address that Triton's interpreter loads from
and stores to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops._schema import WEIGHTS

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Rates:
    """A chip's datasheet: bytes per second of its memory, dense operations per second of each kind; 0: it has none."""

    name: str
    memory: float
    f32: float
    tf32: float
    half: float  # bfloat16 and float16
    int8: float
    fp8: float


# NVIDIA's datasheets of the A100 80 GB SXM and the H100 SXM; the H100's rates there include sparsity and are twice these.
CHIPS = (
    Rates("A100", 2.0e12, 19.5e12, 156e12, 312e12, 624e12, 0.0),
    Rates("H100", 3.35e12, 67e12, 494.5e12, 989e12, 1979e12, 1979e12),
)
_KINDS = {torch.float32: "f32", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True)
class Cost:
    """What one launch takes: bytes read and written, operations, and the name of the operations' rate in `Rates`."""

    bytes: int
    operations: float
    kind: str = "f32"

    def seconds(self, chip: Rates) -> tuple[float, str] | None:
        """(the floor in seconds, what sets it: memory or the kind of operations); None on a chip without that kind."""
        rate = getattr(chip, self.kind)
        if not rate:
            return None
        times = {"memory": self.bytes / chip.memory, self.kind: self.operations / rate}
        slower = max(times, key=lambda name: times[name])
        return times[slower], slower


def by_name(arguments: Arguments) -> dict[str, Any]:
    """The arguments of a kernel, with the members of its named tuples under their own names."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found |= by_name(value._asdict()) if hasattr(value, "_asdict") else {name: value}
    return found


def launch_cost(kernel: str, arguments: Arguments) -> Cost:
    """What a launch of this Triton kernel (such as `_bias_gelu_fwd_kernel`) takes with these arguments, by name.

    Only the ends of sequences are read, where pairs of tokens are counted: all other tensors may be on the meta device.
    """
    arguments = by_name(arguments)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    elements = {name: tensor.numel() for name, tensor in tensors.items()}
    elements |= _TOUCHED.get(kernel, lambda a: {})(arguments)
    nbytes = sum(elements[name] * tensor.element_size() for name, tensor in tensors.items())
    return Cost(nbytes, float(_OPERATIONS.get(kernel, lambda a: 0)(arguments)), _kind(kernel, arguments))


def microseconds(time: float) -> str:
    """A time in microseconds as text: one digit behind the point, or three below one microsecond."""
    return f"{time:.1f}" if time >= 1 else f"{time:.3f}"


def product_cost(factors: tuple[Tensor, ...], out: Tensor) -> Cost:
    """What a library's product a (M, K) @ b (K, N) takes; `factors` ends with a and b, before them comes what is added."""
    nbytes = sum(t.numel() * t.element_size() for t in (*factors, out))
    a = factors[-2]
    return Cost(nbytes, 2.0 * a.numel() * out.shape[1], _KINDS.get(a.dtype, "half"))


def _kind(kernel: str, a: Arguments) -> str:
    factor = next((a[name] for name in ("q_ptr", "x_ptr", "hidden_ptr") if name in a), None)
    if kernel not in _PRODUCTS or factor is None:
        return "f32"  # the arithmetic is float32 for every dtype of the operands
    return "tf32" if a.get("TF32") else _KINDS.get(factor.dtype, "half")


# Elements that a kernel touches of tensors it does not touch as a whole --------------------------------------------------------


def _graph_inputs_elements(a: Arguments) -> dict[str, int]:
    sequences = len(a["cu_seqlens_ptr"] if a["ends_ptr"] is None else a["ends_ptr"]) - 1
    tokens = sequences * a["columns"]
    if a["ends_ptr"] is not None:
        tokens = a["ids_ptr"].numel()
    elif a["mask_ptr"] is not None:
        tokens = len(a["indices_ptr"])
    found = {"static_ptr": 3 * a["bound_tokens"], "static_cu_seqlens_ptr": a["bound_sequences"] + 1}
    for name in ("ids", "types", "positions"):  # a stride of 0 repeats
        repeated = a["columns"] if a[f"{name}_col"] else 1
        found[f"{name}_ptr"] = tokens if a[f"{name}_row"] else repeated
    if a["mask_ptr"] is not None:
        # The lengths of all rows but the last are read.
        found |= {"mask_ptr": sequences * a["columns"], "lengths_ptr": sequences - 1}
    return found


def _column_sums_elements(a: Arguments) -> dict[str, int]:
    sums = a["partials_ptr"].shape[1]
    return {name: a["n_cols"] * (sums > number) for number, name in enumerate(("first_ptr", "second_ptr", "third_ptr"))}


def _embedding_elements(a: Arguments) -> dict[str, int]:
    """Upper bound: every token reads a row of each table; a row that several tokens share is counted for each of them."""
    rows = len(a["positions_ptr"]) * a["n_cols"]
    return {name: rows for name in ("word_ptr", "type_ptr", "position_ptr") if a[name] is not None}


def _embedding_bwd_elements(a: Arguments) -> dict[str, int]:
    return _embedding_elements(a) | _layer_norm_bwd_elements(a)


def _layer_norm_bwd_elements(a: Arguments) -> dict[str, int]:
    return {"means_ptr": 0} if a["WHOLE_ROWS"] else {}


_LAYER_WEIGHTS = tuple(f"{name}_ptr" for name in WEIGHTS)


def encoder_buffers() -> tuple[str, ...]:
    """What the persistent encoder writes and reads again in one launch: it need not leave the L2 cache."""
    from ...kernels.encoder import Buffers

    return Buffers._fields


def _encoder_elements(a: Arguments) -> dict[str, int]:
    """Layers that differ are found by their addresses: each has as many weights as the first, which is an argument."""
    found = dict.fromkeys(encoder_buffers(), 0)
    if a["addresses_ptr"] is not None:
        found |= {name: len(a["addresses_ptr"]) * a[name].numel() for name in _LAYER_WEIGHTS}
    return found


def _shared_ends(a: Arguments) -> dict[str, int]:
    """If queries and keys are the same tokens, one tensor holds the ends of their sequences."""
    return {"cu_seqlens_k_ptr": 0} if a["cu_seqlens_k_ptr"] is a["cu_seqlens_q_ptr"] else {}


_TOUCHED: dict[str, Callable[[Arguments], dict[str, int]]] = {
    "_attention_fwd_kernel": _shared_ends,
    "_attention_bwd_dq_kernel": _shared_ends,
    "_attention_bwd_dkdv_kernel": _shared_ends,
    "_graph_inputs_kernel": _graph_inputs_elements,
    "_column_sums_kernel": _column_sums_elements,
    "_add_layer_norm_bwd_kernel": _layer_norm_bwd_elements,
    "_gelu_layer_norm_bwd_kernel": _layer_norm_bwd_elements,
    # Written only for a bad id.
    "_embedding_layer_norm_fwd_kernel": lambda a: _embedding_elements(a) | {"first_bad_ptr": 0},
    "_embedding_layer_norm_bwd_means_kernel": _embedding_elements,
    "_embedding_layer_norm_bwd_kernel": _embedding_bwd_elements,
    "_encoder_fwd_kernel": _encoder_elements,
    # float8 has no zero points, so the sums of the weights are not read.
    "_quantized_product_kernel": lambda a: {"sums_ptr": 0} if a["zeros_ptr"] is None else {},
    # Rows are padded to whole blocks. If every row is labelled, the gathering kernel alone writes the padding.
    "_linear_cross_entropy_labelled_kernel": lambda a: {"rows_ptr": a["n_rows"], "targets_ptr": a["n_rows"]},
    "_linear_cross_entropy_bwd_gather_kernel": lambda a: {
        "rows_ptr": len(a["x_ptr"]),
        "targets_ptr": len(a["x_out_ptr"]) - len(a["x_ptr"]),
    },
    "_linear_cross_entropy_bwd_sum_kernel": lambda a: {"rows_ptr": a["n_rows"]},
}


# Operations -------------------------------------------------------------------------------------------------------------------


def _pairs(queries: Tensor, keys: Tensor) -> int:
    """The number of (query, key) pairs, from the ends (B + 1,) of the sequences of queries and of keys."""
    return int((queries.diff().long() * keys.diff().long()).sum())


def _attention_pairs(a: Arguments) -> float:
    """The pairs of a query and a key that it sees."""
    ends_q, ends_k, lengths = a["cu_seqlens_q_ptr"], a["cu_seqlens_k_ptr"], a["key_lengths_ptr"]
    queries, keys = ends_q.diff().double(), (ends_k.diff() if lengths is None else lengths).double()
    if not a["CAUSAL"]:
        return float((queries * keys).sum())
    seeing = torch.minimum(queries, keys)  # with more queries than keys, the first see none
    return float((seeing * keys - seeing * (seeing - 1) / 2).sum())


def _attention(products: int) -> Callable[[Arguments], float]:
    """The operations of that many products of the size of the scores."""
    return lambda a: 2.0 * products * a["q_ptr"].shape[1] * _attention_pairs(a)


def _vocabulary_gradient(owned: str, walked: str) -> Callable[[Arguments], float]:
    """Every chunk of columns of the result computes all logits again, which takes as many operations as the chunk itself."""

    def operations(a: Arguments) -> float:
        chunks = -(-a["WIDTH"] // a["BLOCK_O"])
        return 2.0 * (chunks + 1) * len(a[owned]) * len(a[walked]) * a["WIDTH"]

    return operations


def _encoder(a: Arguments) -> float:
    width, middle, tokens, queries = a["width"], a["middle_width"], a["n_tokens"], a["n_wanted"]
    ends = a["cu_seqlens_ptr"]
    last_ends = ends if a["cu_wanted_ptr"] is None else a["cu_wanted_ptr"]
    rest = width * width + 2 * width * middle
    # Every layer computes keys and values of all tokens. The last layer needs queries, and what follows them, of the wanted
    # rows only; that the kernel computes all queries there is not counted.
    layer = 2.0 * tokens * (3 * width * width + rest) + 4.0 * width * _pairs(ends, ends)
    last = 2.0 * (tokens * 2 * width * width + queries * (width * width + rest)) + 4.0 * width * _pairs(last_ends, ends)
    return (a["n_layers"] - 1) * layer + last


def _each(operations: float, name: str = "x_ptr") -> Callable[[Arguments], float]:
    """That many operations for each element of an operand."""
    return lambda a: operations * a[name].numel()


def _matrix_product(a: Arguments) -> float:
    return 2.0 * a["x_ptr"].numel() * len(a["weight_ptr"])


_OPERATIONS: dict[str, Callable[[Arguments], float]] = {
    "_attention_fwd_kernel": _attention(2),
    "_attention_bwd_dq_kernel": _attention(3),  # scores again, gradients of probabilities, dQ
    "_attention_bwd_dkdv_kernel": _attention(4),  # the first two again, dK and dV
    "_linear_gelu_fwd_kernel": _matrix_product,
    "_quantized_product_kernel": _matrix_product,
    "_linear_cross_entropy_fwd_kernel": lambda a: 2.0 * len(a["x_ptr"]) * a["weight_ptr"].numel(),
    "_linear_cross_entropy_bwd_x_kernel": _vocabulary_gradient("x_ptr", "weight_ptr"),
    "_linear_cross_entropy_bwd_weight_kernel": _vocabulary_gradient("weight_ptr", "x_ptr"),
    "_encoder_fwd_kernel": _encoder,
    # These multiply no matrices: a few operations per element, only exact enough to show that memory bounds them.
    "_linear_cross_entropy_fwd_merge_kernel": _each(10, "max_ptr"),
    "_linear_cross_entropy_fwd_mean_kernel": _each(1, "losses_ptr"),
    "_linear_cross_entropy_bwd_sum_kernel": _each(1, "shares_ptr"),
    "_bias_gelu_fwd_kernel": _each(10),
    "_bias_gelu_bwd_kernel": _each(20),
    "_add_layer_norm_fwd_kernel": _each(10),
    "_add_layer_norm_bwd_means_kernel": _each(10),
    "_add_layer_norm_bwd_kernel": _each(20),
    "_gelu_layer_norm_fwd_kernel": _each(18),
    "_gelu_layer_norm_bwd_means_kernel": _each(18),
    "_gelu_layer_norm_bwd_kernel": _each(36),
    "_embedding_layer_norm_fwd_kernel": lambda a: 10.0 * a["n_rows"] * a["n_cols"],
    "_embedding_layer_norm_bwd_means_kernel": lambda a: 10.0 * a["n_rows"] * a["n_cols"],
    "_embedding_layer_norm_bwd_kernel": lambda a: 20.0 * a["n_rows"] * a["n_cols"],
    "_round_rows_kernel": _each(10),
    "_add_layer_norm_rounded_kernel": _each(20),
    "_bias_gelu_rounded_kernel": _each(20),
    "_column_sums_kernel": _each(1, "partials_ptr"),
}
_PRODUCTS = {
    "_attention_fwd_kernel",
    "_attention_bwd_dq_kernel",
    "_attention_bwd_dkdv_kernel",
    "_linear_gelu_fwd_kernel",
    "_quantized_product_kernel",
    "_linear_cross_entropy_fwd_kernel",
    "_linear_cross_entropy_bwd_x_kernel",
    "_linear_cross_entropy_bwd_weight_kernel",
    "_encoder_fwd_kernel",
}
