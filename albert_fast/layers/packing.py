"""Padding is removed once, before the embedding: the real tokens become rows (T, ...), and cu_seqlens says where each sequence
begins.

Also `aligned_representation`, the representation of a pair, which reads unpacked hidden states, and `aligned_mean`, its mean,
of packed ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..runtime.operands import check_launch
from ..runtime.registration import is_traced, register


@dataclass(frozen=True)
class Packing:
    """Where the T real tokens of a (B, S) batch are.

    indices: (T,) int64, their positions in the flattened batch, ascending; None where every token is real.
    cu_seqlens: (B + 1,) int32, each sequence's first row, and T at the end.
    max_seqlen: an upper bound on the longest sequence.
    shape: (B, S); None for input that came packed.
    sequence_order: (B,) int32, the sequences from long to short, where attention uses it: see `with_sequence_order`.
    """

    indices: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, int] | None
    sequence_order: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def is_dense(self) -> bool:
        """Whether each of the B sequences has all of its S tokens."""
        return self.indices is None and self.shape is not None

    @property
    def has_own_keys(self) -> bool:
        """Whether attention reads other rows as keys than as queries; the operators for all layers at once cannot."""
        return False

    def keys(self, hidden: Tensor) -> tuple[Tensor, Packing]:
        """The rows (Tk, H) of `hidden` (T, H) that attention reads as keys and values, and their packing: all of them."""
        return hidden, self

    def with_sequence_order(self) -> Packing:
        """With `sequence_order`, found once for all layers, on a GPU where lengths may differ. C++ kernels sort by themselves."""
        if self.sequence_order is not None or self.is_dense or self.num_sequences < 2 or not self.cu_seqlens.is_cuda:
            return self
        return replace(self, sequence_order=longest_first(self.cu_seqlens))

    def gather(self, padded: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...); packed input passes through."""
        if self.shape is None:
            return padded
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def scatter(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) -> (B, S, ...), `fill` at padding; packed input stays packed."""
        if self.shape is None:
            return packed
        if self.indices is not None:
            flat = packed.new_full((self.shape[0] * self.shape[1], *packed.shape[1:]), fill)
            packed = flat.index_copy_(0, self.indices, packed)
        return packed.unflatten(0, self.shape)

    def mask(self) -> Tensor:
        """(B, S) bool, True at the real tokens."""
        assert self.shape is not None, "packed input has no mask"
        tokens = self.cu_seqlens.new_ones(
            self.shape[0] * self.shape[1] if self.indices is None else self.indices.shape[0]
        )
        return self.scatter(tokens) != 0

    def locate(self, token: int) -> tuple[int, int]:
        """(row, column) in the padded batch of packed row `token`; (sequence, offset) where the input came packed."""
        if self.shape is not None:
            flat = token if self.indices is None else int(self.indices[token])
            return divmod(flat, self.shape[1])
        sequence = int(torch.searchsorted(self.cu_seqlens, token, right=True)) - 1
        return sequence, token - int(self.cu_seqlens[sequence])


def _pack_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    if mask.dim() != 2:
        raise ValueError(f"pack_indices: expected mask of shape (B, S), got {tuple(mask.shape)}")
    check_launch("pack_indices", "reference", mask.device, [("mask", mask, mask.shape, mask.dtype)])
    real = mask != 0
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = real.sum(1).cumsum(0)
    return real.flatten().nonzero().squeeze(1), cu_seqlens


def _pack_indices_fake(mask):
    tokens = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty(tokens, dtype=torch.int64), mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


# Its size depends on data: as an operator with a dynamic size it stays inside a graph compiled with fullgraph=True.
register("pack_indices(Tensor mask) -> (Tensor, Tensor)", _pack_indices, _pack_indices_fake)


def check_mask(shape: tuple[int, int], attention_mask: Tensor) -> None:
    """ValueError for a mask of another shape than (B, S), or one with negative elements; TypeError for no tensor."""
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not fit the batch of {tuple(shape)}")
    if attention_mask.is_floating_point() and not is_traced() and bool((attention_mask < 0).any()):
        raise ValueError(
            "attention_mask has negative elements: it is 0 at padding and 1 elsewhere, not added to scores"
        )


def pack(shape: tuple[int, int], attention_mask: Tensor | None, device: torch.device) -> Packing:
    """The packing of a (B, S) batch. `attention_mask` (B, S) is 0 at padding, in any pattern; None means that all are real.

    Raises:
        ValueError: a mask of another shape, or one with negative elements.
    """
    if attention_mask is not None:
        check_mask(shape, attention_mask)
    batch, columns = shape
    # On a CPU looking at the mask costs less than packing; on a GPU both wait for it, and one wait is enough.
    asked = attention_mask is not None and not attention_mask.is_cuda and not is_traced()
    if attention_mask is None or (asked and bool(attention_mask.all())):
        # No step of 0 columns: arange needs the count, not the step.
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * columns
        return Packing(None, cu_seqlens, columns, shape)
    indices, cu_seqlens = torch.ops.albert_fast.pack_indices(attention_mask)
    if not is_traced() and len(indices) == batch * columns:
        return Packing(None, cu_seqlens, columns, shape)
    return Packing(indices, cu_seqlens, columns, shape)


def packed_already(tokens: int, cu_seqlens: Tensor, max_seqlen: int, device: torch.device) -> Packing:
    """The packing of input on `device` that holds no padding. cu_seqlens is checked, because kernels trust it: on the CPU
    without waiting for the GPU, to which it is then copied.

    Raises:
        TypeError: cu_seqlens is not int32. ValueError: it does not run from 0 to T without falling, or a sequence is
        longer than max_seqlen. RuntimeError: the copy would be captured in a CUDA graph, with the lengths of this call.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}: cu_seqlens.int() is that")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must have the shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if not is_traced():
        ends = cu_seqlens.tolist()  # one wait for a GPU
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens must run from 0 to T = {tokens} and never fall, got {ends}")
        if max(lengths, default=0) > max_seqlen:
            raise ValueError(f"max_seqlen is {max_seqlen}, the longest sequence has {max(lengths)} tokens")
    cu_seqlens = cu_seqlens.contiguous()  # kernels read it without strides
    if cu_seqlens.device.type == "cpu" and device.type != "cpu":
        cu_seqlens = _copied_ahead(cu_seqlens, device)
    return Packing(None, cu_seqlens, max_seqlen, None)


def _copied_ahead(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, made without waiting for it: torch keeps pinned memory until the copy has been made."""
    if is_traced():
        return cu_seqlens.to(device)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "forward_packed inside a CUDA graph would repeat the lengths of its capture: call it outside"
        )
    return cu_seqlens.pin_memory().to(device, non_blocking=True)


def longest_first(cu_seqlens: Tensor) -> Tensor:
    """(B,) int32, the sequences from long to short, computed on the device of `cu_seqlens` (B + 1,) without waiting for it."""
    return cu_seqlens.diff().argsort(descending=True, stable=True).to(torch.int32)


def aligned_representation(hidden_states: Tensor, position: int | Tensor) -> Tensor:
    """concat(h[1 .. L-1], h[L+1 .. N]): the hidden states before and after position L, joined without it.

    With L the [SEP] between two segments this is the representation of the pair.

    Args:
        hidden_states: (N, H) or (B, N, H).
        position: L, counted from 1, ends included; an int, or (B,) integers, one for each row.

    Returns:
        (N - 1, H) or (B, N - 1, H).

    Raises:
        TypeError: positions that are not integers. ValueError: shapes that do not fit. IndexError: L outside 1 .. N.
    """
    if hidden_states.dim() == 2:
        return aligned_representation(hidden_states[None], position)[0]
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states must be (N, H) or (B, N, H), got {tuple(hidden_states.shape)}")
    batch, columns, width = hidden_states.shape
    where = torch.as_tensor(position, device=hidden_states.device)
    if where.is_floating_point() or where.is_complex() or where.dtype == torch.bool:
        raise TypeError(f"position must be an integer or integers, got {where.dtype}")
    if where.dim() > 1 or (where.dim() == 1 and len(where) not in (1, batch)):
        raise ValueError(f"position must be one integer or ({batch},), got {tuple(where.shape)}")
    where = where.expand(batch)[:, None]
    if not is_traced() and bool(((where < 1) | (where > columns)).any()):
        bad = where[(where < 1) | (where > columns)][0]
        raise IndexError(f"position {int(bad)} lies outside 1 to {columns}")
    columns_kept = torch.arange(columns - 1, device=hidden_states.device)[None, :]
    columns_kept = columns_kept + (columns_kept >= where - 1)
    return hidden_states.gather(1, columns_kept[:, :, None].expand(-1, -1, width))


def aligned_mean(hidden: Tensor, types: Tensor, packing: Packing) -> Tensor:
    """The mean of each sequence's `aligned_representation`, where L is the last token of its first segment, the [SEP].

    Args:
        hidden: (T, H) states of the real tokens.
        types: (T,) token types, 0 in the first segment.

    Returns:
        (B, H), in the dtype of `hidden`; zeros for a sequence of fewer than two tokens.
    """
    counts, rows = packing.cu_seqlens.diff().long(), torch.arange(len(hidden), device=hidden.device)
    sequence = torch.repeat_interleave(counts, output_size=len(hidden))
    starts = packing.cu_seqlens[:-1].long()[sequence]
    first_segment = torch.zeros_like(counts).index_add(0, sequence, (types == 0).long())
    kept = (rows - starts != first_segment[sequence] - 1)[:, None]
    states = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    sums = states.new_zeros(len(counts), hidden.shape[1]).index_add(0, sequence, states * kept)
    return (sums / (counts - 1).clamp(min=1)[:, None]).to(hidden.dtype)
