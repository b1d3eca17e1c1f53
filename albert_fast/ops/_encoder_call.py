"""What `encoder` and `quantized_encoder` share: the record of a call, its checks, and the call of a C++ function."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..runtime.operands import Operand, check_choice, head_size, hold, matrix
from ._stages import profile_address
from .attention import check_ranges
from .bias_gelu import ACTS


class EncoderCall(NamedTuple):
    """What a call of an encoder reads beside the layers' weights. CALL_SCHEMA has the fields as the operators take them."""

    hidden: Tensor  # (T, H), packed tokens
    layer_indices: list[int]  # which distinct layer runs at each step
    cu_seqlens: Tensor  # (B + 1,) int32
    wanted_rows: Tensor | None  # (Tq,) int64, the rows that the last layer is computed for; None: all
    cu_wanted: Tensor | None  # (B + 1,) int32, where each sequence's rows begin among them
    num_heads: int
    softmax_scale: float
    eps: float
    act: str

    def steps(self) -> Iterator[tuple[int, Tensor | None, Tensor]]:
        """For each step: the distinct layer, the wanted rows (None: all), and where each sequence's queries begin."""
        last = len(self.layer_indices) - 1
        for step, layer_index in enumerate(self.layer_indices):
            if step == last and self.wanted_rows is not None and self.cu_wanted is not None:
                yield layer_index, self.wanted_rows, self.cu_wanted
            else:
                yield layer_index, None, self.cu_seqlens

    def select_wanted(self, x: Tensor) -> Tensor:
        """The wanted rows of x (T, N); zeros for a row of a sequence without tokens, whatever its number."""
        assert self.wanted_rows is not None
        assert self.cu_wanted is not None
        rows = self.wanted_rows
        if not len(x):
            return x.new_zeros((len(rows), *x.shape[1:]))
        empty = self.cu_seqlens.diff() == 0
        in_empty = empty.repeat_interleave(self.cu_wanted.diff(), output_size=len(rows))[:, None]
        return x[rows.clamp(0, len(x) - 1)].masked_fill(in_empty, 0.0)

    def fake_out(self) -> Tensor:
        """An empty tensor of the result's shape, for a compiler."""
        rows = self.hidden if self.wanted_rows is None else self.wanted_rows
        return self.hidden.new_empty((rows.shape[0], self.hidden.shape[1]))


CALL_SCHEMA = (
    "Tensor hidden, int[] layer_indices, Tensor cu_seqlens, Tensor? wanted_rows, Tensor? cu_wanted, int num_heads, "
    "float softmax_scale, float eps, str act"
)


def check_call(op: str, call: EncoderCall, layers: int) -> list[Operand]:
    """The tensors of a call as operands, in the order of the fields. ValueError for arguments that do not fit together.

    Args:
        layers: how many distinct layers there are.
    """
    shape = matrix(op, "hidden", call.hidden)
    head_size(op, shape[1], call.num_heads)
    check_choice(op, "act", call.act, ACTS)
    indices, cu_seqlens, wanted_rows = call.layer_indices, call.cu_seqlens, call.wanted_rows
    if not indices or not all(0 <= index < layers for index in indices):
        raise ValueError(
            f"{op}: layer_indices must name at least one layer, each from 0 to {layers - 1}, got {list(indices)}"
        )
    if (wanted_rows is None) != (call.cu_wanted is None):
        raise ValueError(f"{op}: give both wanted_rows and cu_wanted, or neither")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have the shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if wanted_rows is not None and wanted_rows.dim() != 1:
        raise ValueError(f"{op}: wanted_rows must have the shape (Tq,), got {tuple(wanted_rows.shape)}")
    ends = (cu_seqlens.shape[0],)
    return [
        ("hidden", call.hidden, shape, call.hidden.dtype),
        ("cu_seqlens", cu_seqlens, ends, torch.int32),
        ("wanted_rows", wanted_rows, (0 if wanted_rows is None else wanted_rows.shape[0],), torch.int64),
        ("cu_wanted", call.cu_wanted, ends, torch.int32),
    ]


def check_content(op: str, call: EncoderCall) -> None:
    """ValueError for cu_seqlens, cu_wanted or wanted_rows out of range. Values on a GPU are not checked: that would wait."""
    if call.cu_seqlens.device.type != "cpu":
        return
    check_ranges(op, "cu_seqlens", call.cu_seqlens, len(call.hidden))
    if call.wanted_rows is None or call.cu_wanted is None:
        return
    rows = call.wanted_rows
    check_ranges(op, "cu_wanted", call.cu_wanted, len(rows))
    counts = call.cu_wanted.diff()
    first, end = (t.repeat_interleave(counts) for t in (call.cu_seqlens[:-1], call.cu_seqlens[1:]))
    outside = ((rows < first) | (rows >= end)) & (first < end)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"{op}: wanted_rows[{i}] is {int(rows[i])}, outside its sequence, which has the rows {int(first[i])} to "
            f"{int(end[i]) - 1} by cu_seqlens and cu_wanted"
        )


def _raise_content(op: str, call: EncoderCall) -> NoReturn:
    """Raise the error for what a C++ function refused."""
    check_content(op, call)
    raise ValueError(f"{op}: another thread wrote to cu_seqlens, wanted_rows or cu_wanted during the call")


def run_cpp(
    op: str,
    function: Callable[..., bool],
    call: EncoderCall,
    operands: list[Operand],
    table: list[int],
    intermediate_size: int,
    *more: int,
) -> Tensor:
    """The result of a C++ encoder.

    Args:
        function: of the extension; takes the fields of csrc/encoder_arguments.h, then `more`.
        operands: those of `check_call`.
        table: the addresses of the layers' tensors; the caller holds their memory.
        intermediate_size: I, the columns of the FFN's middle.
    """
    memory = hold(op, call.hidden.device, operands)
    # Sizes from the operands, which were checked: another thread may have changed the tensors since.
    (_, _, (tokens, width), _), (_, _, (ends,), _), (_, _, (wanted,), _), _ = operands
    out = torch.empty((tokens if call.wanted_rows is None else wanted, width), dtype=torch.float32)
    hidden, cu_seqlens, wanted_rows, cu_wanted = memory.addresses
    addresses, steps, threads = array.array("q", table), array.array("q", call.layer_indices), torch.get_num_threads()
    fits = function(
        hidden,
        out.data_ptr(),
        addresses.buffer_info()[0],
        steps.buffer_info()[0],
        len(steps),
        cu_seqlens,
        ends - 1,
        tokens,
        wanted_rows,
        cu_wanted,
        wanted,
        width,
        intermediate_size,
        call.num_heads,
        call.softmax_scale,
        call.eps,
        ACTS.index(call.act),
        profile_address(threads),
        threads,
        *more,
    )
    if not fits:
        _raise_content(op, call)
    return out
