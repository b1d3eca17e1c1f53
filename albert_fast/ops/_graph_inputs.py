"""What CUDA graphs read: static tensors of ids, types, positions and lengths, written by one kernel ahead of each replay."""

from __future__ import annotations

import torch
from torch import Tensor


class GraphInputs:
    """Room for `capacity` tokens in as many sequences, of batches with at most so many `columns`; every graph of a model reads
    the beginning of it.

    Replays follow one another, so one set serves all graphs; what a graph reads beyond a call's tokens is token 0, which
    every table has, in no sequence.
    """

    def __init__(self, capacity: int, columns: int, device: torch.device) -> None:
        self._static = torch.zeros((3, capacity), dtype=torch.int64, device=device)
        self._cu_seqlens = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        # Positions that are not given, and with a stride of 0 the types.
        self._columns = torch.arange(columns, device=device)

    def views(self, tokens: int, sequences: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, types, positions (tokens,) int64 and cu_seqlens (sequences + 1,) int32, as a graph is captured with."""
        ids, types, positions = self._static[:, :tokens].unbind()
        return ids, types, positions, self._cu_seqlens[: sequences + 1]

    def blank(self, tokens: int, sequences: int, length: int) -> None:
        """Token 0 everywhere, in sequences of `length`: what is there while a graph is captured, for a tuner to have work."""
        self._static[:, :tokens].zero_()
        ends = length * torch.arange(sequences + 1, dtype=torch.int32, device=self._static.device)
        self._cu_seqlens[: sequences + 1].copy_(ends)

    def write_padded(
        self, ids: Tensor, types: Tensor | None, positions: Tensor | None, mask: Tensor | None, lengths: Tensor | None,
        tokens: int, bounds: tuple[int, int],
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Write a batch (B, S) for a graph that reads `bounds` (tokens, sequences).

        Args:
            ids, types, positions, mask: (B, S) integers, types and positions or None; a mask of any dtype, None: all real.
            lengths: (B,) int64, the mask's real tokens in each row; tokens: their sum.

        Returns:
            (T,) int64, places of the real tokens in the flattened batch, None without a mask; cu_seqlens (B + 1,) int32.
        """
        from ..kernels._graph_inputs import graph_inputs

        cu_seqlens = torch.empty(len(ids) + 1, dtype=torch.int32, device=ids.device)
        indices = None if mask is None else torch.empty(tokens, dtype=torch.int64, device=ids.device)
        graph_inputs(
            _strided(ids),
            (self._columns, 0, 0) if types is None else _strided(types),
            (self._columns, 0, 1) if positions is None else _strided(positions),
            None if mask is None else _strided(mask),
            lengths, None, indices, cu_seqlens, self._static, self._cu_seqlens, (ids.shape[0], ids.shape[1]), bounds,
        )  # fmt: skip
        return indices, cu_seqlens

    def write_packed(
        self, ids: Tensor, types: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
        bounds: tuple[int, int],
    ) -> None:  # fmt: skip
        """Write packed ids (T,), types and positions, (T,) or None, of sequences as in cu_seqlens (B + 1,) int32."""
        from ..kernels._graph_inputs import graph_inputs

        graph_inputs(
            _strided(ids),
            (self._columns, 0, 0) if types is None else _strided(types),
            (self._columns, 0, 1) if positions is None else _strided(positions),
            None, None, cu_seqlens, None, None, self._static, self._cu_seqlens, (len(cu_seqlens) - 1, max_seqlen), bounds,
        )  # fmt: skip


def _strided(x: Tensor) -> tuple[Tensor, int, int]:
    """A batch (B, S), or packed (T,), as the kernel takes it: packed, its sequences begin as many strides in as tokens do."""
    return x, x.stride(0), x.stride(-1)
