"""The inputs of CUDA graphs: static tensors of ids, types, positions and lengths, written by one kernel before each replay."""

from __future__ import annotations

import torch
from torch import Tensor

# A tensor, and its strides from sequence to sequence and from token to token.
Strided = tuple[Tensor, int, int]


class GraphInputs:
    """Static tensors for up to `capacity` tokens and as many sequences, from batches of at most `columns` columns.

    Every graph of a model reads the beginning of the same tensors, since replays follow one another. Beyond a call's tokens
    a graph reads token 0, which every table has, outside all sequences.
    """

    def __init__(self, capacity: int, columns: int, device: torch.device) -> None:
        self._static = torch.zeros((3, capacity), dtype=torch.int64, device=device)
        self._cu_seqlens = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        # Read for positions that are not given; and for types that are not given, with a stride of 0.
        self._columns = torch.arange(columns, device=device)

    def views(self, tokens: int, sequences: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, types, positions (tokens,) int64 and cu_seqlens (sequences + 1,) int32, for the capture of a graph."""
        ids, types, positions = self._static[:, :tokens].unbind()
        return ids, types, positions, self._cu_seqlens[: sequences + 1]

    def blank(self, tokens: int, sequences: int, length: int) -> None:
        """Write token 0 everywhere, in sequences of `length`: the input during a capture, so that a tuner has work."""
        self._static[:, :tokens].zero_()
        ends = length * torch.arange(sequences + 1, dtype=torch.int32, device=self._static.device)
        self._cu_seqlens[: sequences + 1].copy_(ends)

    def write_padded(
        self,
        ids: Tensor,
        types: Tensor | None,
        positions: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        tokens: int,
        bounds: tuple[int, int],
    ) -> tuple[Tensor | None, Tensor]:
        """Write a batch (B, S) for a graph that reads `bounds` (tokens, sequences).

        Args:
            ids, types, positions, mask: (B, S) integers, types and positions or None; a mask of any dtype, None: all real.
            lengths: (B,) int64, the mask's real tokens in each row; tokens: their sum.

        Returns:
            (T,) int64, the indices of the real tokens in the flattened batch, None without a mask; cu_seqlens (B + 1,) int32.
        """
        from ..kernels._graph_inputs import graph_inputs

        cu_seqlens = torch.empty(len(ids) + 1, dtype=torch.int32, device=ids.device)
        indices = None if mask is None else torch.empty(tokens, dtype=torch.int64, device=ids.device)
        read, real = self._strided_ids(ids, types, positions), None if mask is None else _strided(mask)
        written = indices, cu_seqlens, self._static, self._cu_seqlens
        graph_inputs(*read, real, lengths, None, *written, (ids.shape[0], ids.shape[1]), bounds)
        return indices, cu_seqlens

    def write_packed(
        self,
        ids: Tensor,
        types: Tensor | None,
        positions: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        bounds: tuple[int, int],
    ) -> None:
        """Write packed ids (T,), types and positions, (T,) or None, of sequences as in cu_seqlens (B + 1,) int32."""
        from ..kernels._graph_inputs import graph_inputs

        read, shape = self._strided_ids(ids, types, positions), (len(cu_seqlens) - 1, max_seqlen)
        graph_inputs(*read, None, None, cu_seqlens, None, None, self._static, self._cu_seqlens, shape, bounds)

    def _strided_ids(
        self, ids: Tensor, types: Tensor | None, positions: Tensor | None
    ) -> tuple[Strided, Strided, Strided]:
        types_read = (self._columns, 0, 0) if types is None else _strided(types)
        return _strided(ids), types_read, (self._columns, 0, 1) if positions is None else _strided(positions)


def _strided(x: Tensor) -> Strided:
    """x (B, S), or packed (T,), with the strides of sequences and of tokens; packed, both are the stride of tokens."""
    return x, x.stride(0), x.stride(-1)
