"""The tokens that a caller wants of the last layer: as callers say it, and as rows of a packed batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.operands import check_launch
from ..runtime.registration import is_traced, register
from .packing import Packing


class WantedRows(NamedTuple):
    """Rows of a packed batch for which the last layer is computed, sequence by sequence.

    rows: (Tq,) int64. cu_seqlens: (B + 1,) int32, where each sequence's rows begin, and Tq at the end. max_seqlen: at least
    the largest number of rows in one sequence.
    """

    rows: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


@dataclass(frozen=True)
class WantedTokens:
    """Which tokens a caller wants of the last layer; the last layer is computed for those alone.

    which: "all"; "first", the first real token of each sequence; or "masked", the real tokens where `mask` is True.
    mask: (B, S) bool, or (T,) for packed input; given for "masked", and for nothing else.

    Raises:
        ValueError: any other `which`, "masked" without a mask, or a mask for another one.
    """

    which: str = "all"
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.which not in ("all", "first", "masked"):
            raise ValueError(f'WantedTokens: which must be "all", "first" or "masked", got {self.which!r}')
        if (self.which == "masked") != (self.mask is not None):
            raise ValueError('WantedTokens: "masked" needs a mask, and only "masked" takes one')

    @classmethod
    def of(cls, wanted: WantedTokens | Tensor | str) -> WantedTokens:
        """From the short forms that models take: "all", "first" or a mask.

        Raises:
            ValueError: any other value.
        """
        if isinstance(wanted, WantedTokens):
            return wanted
        if isinstance(wanted, Tensor):
            return cls("masked", wanted)
        if wanted not in ("all", "first"):
            raise ValueError(f'wanted_tokens must be "all", "first" or a bool tensor, got {wanted!r}')
        return cls(wanted)

    def check(self, expected: tuple[int, ...]) -> None:
        """TypeError for a mask that is not bool, ValueError for a mask of another shape than the batch's."""
        if self.mask is None:
            return
        if self.mask.dtype != torch.bool:
            raise TypeError(f"wanted_tokens must be bool, got {self.mask.dtype}")
        if self.mask.shape != expected:
            raise ValueError(f"wanted_tokens {tuple(self.mask.shape)} does not fit the batch of {tuple(expected)}")

    def rows(self, packing: Packing, tokens: int) -> WantedRows | None:
        """The rows of the batch of `tokens` packed tokens that are wanted; None for all of them.

        Raises:
            TypeError: a mask that is not bool. ValueError: a mask of another shape than the batch.
        """
        if self.which == "all":
            return None
        if self.mask is None:
            return first_rows(packing, tokens)
        self.check(packing.shape if packing.shape is not None else (tokens,))
        return _masked_rows(packing, self.mask)


def first_rows(packing: Packing, tokens: int) -> WantedRows:
    """Each sequence's first token. For an empty sequence it is some other token: `blank_empty` clears its result."""
    starts = packing.cu_seqlens[:-1].long().clamp(max=tokens - 1).clamp(min=0)
    cu_seqlens = torch.arange(starts.shape[0] + 1, dtype=torch.int32, device=starts.device)
    return WantedRows(starts, cu_seqlens, 1)


def _masked_rows(packing: Packing, mask: Tensor) -> WantedRows:
    rows, cu_seqlens = torch.ops.albert_fast.select_rows(packing.gather(mask), packing.cu_seqlens)
    return WantedRows(rows, cu_seqlens, packing.max_seqlen)


def take(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[rows]. In a compiled graph, which cannot ask whether there are any tokens, a row of zeros is added to read."""
    if is_traced():
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
    return hidden.index_select(0, rows)


def blank_empty(states: Tensor, packing: Packing) -> Tensor:
    """(B, H) with zeros in the rows of sequences that have no token."""
    return states.masked_fill((packing.cu_seqlens.diff() == 0)[:, None], 0.0)


def _select_rows(flags: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    if flags.dim() != 1 or cu_seqlens.dim() != 1:
        shapes = f"{tuple(flags.shape)} and {tuple(cu_seqlens.shape)}"
        raise ValueError(f"select_rows: expected flags (T,) and cu_seqlens (B + 1,), got {shapes}")
    operands = [("flags", flags, flags.shape, torch.bool), ("cu_seqlens", cu_seqlens, cu_seqlens.shape, torch.int32)]
    check_launch("select_rows", "reference", flags.device, operands)
    before = torch.zeros(flags.shape[0] + 1, dtype=torch.int32, device=flags.device)
    before[1:] = flags.cumsum(0)
    # An index outside of the array would end a CUDA context.
    return flags.nonzero().squeeze(1), before[cu_seqlens.long().clamp(0, flags.shape[0])]


def _select_rows_fake(flags: Any, cu_seqlens: Any) -> Any:
    rows = torch.library.get_ctx().new_dynamic_size()
    return flags.new_empty(rows, dtype=torch.int64), torch.empty_like(cu_seqlens)


# Its size depends on data: as an operator with a dynamic size it stays inside a graph compiled with fullgraph=True.
register("select_rows(Tensor flags, Tensor cu_seqlens) -> (Tensor, Tensor)", _select_rows, _select_rows_fake)
