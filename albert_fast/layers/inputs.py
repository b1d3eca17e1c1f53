"""A forward's input tensors as one record, and the checks that need no model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .packing import Packing

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class PackedInputs(NamedTuple):
    """The real tokens of a batch: ids, types (None: all 0) and positions (T,) int64, embeddings (T, E)."""

    ids: Tensor | None
    types: Tensor | None
    positions: Tensor
    embeds: Tensor | None


class Inputs(NamedTuple):
    """What a forward is given: a padded batch (B, S), or packed tokens (T,) with `cu_seqlens` (B + 1,) int32.

    Exactly one of input_ids and inputs_embeds (B, S, E) or (T, E) is given.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0

    def given(self) -> Tensor:
        """input_ids or inputs_embeds.

        Raises:
            ValueError: both or neither, or tensors on the meta device. TypeError: not a tensor.
        """
        given = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        if given is None or (self.input_ids is not None and self.inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if not isinstance(given, Tensor):
            raise TypeError(f"expected a tensor, got {type(given).__name__}: torch.as_tensor makes one")
        if given.is_meta:
            raise ValueError("tensors on meta hold no ids: load the model and its input on the CPU or a GPU")
        return given

    def shape(self) -> tuple[int, int]:
        """(B, S) of a padded batch.

        Raises:
            ValueError: input_ids or inputs_embeds of another number of dimensions. Others as `given`.
        """
        given = self.given()
        if given.dim() != (2 if self.inputs_embeds is None else 3):
            raise ValueError(
                f"expected input_ids (B, S) or inputs_embeds (B, S, E), got the shape {tuple(given.shape)}"
            )
        return given.shape[0], given.shape[1]

    def for_all_rows(self) -> Inputs:
        """With mask, types and positions of shape (1, S) expanded to (B, S)."""
        batch, columns = self.shape()
        if batch == 1:
            return self
        return self._replace(
            attention_mask=_expanded(self.attention_mask, batch, columns),
            token_type_ids=_expanded(self.token_type_ids, batch, columns),
            position_ids=_expanded(self.position_ids, batch, columns),
        )

    def check_ids(self) -> None:
        """Check ids, positions and types against the batch's shape.

        Raises:
            TypeError: numbers that are not integers. ValueError: another shape.
        """
        shape = tuple(self.given().shape[: 1 if self.cu_seqlens is not None else 2])
        named = {name: getattr(self, name) for name in ("input_ids", "position_ids", "token_type_ids")}
        for name, ids in named.items():
            if ids is not None:
                check_ids(name, ids, shape)

    def pack(self, packing: Packing) -> PackedInputs:
        """The real tokens of the batch; position_ids must be given.

        Raises:
            TypeError: ids that are not integers, embeddings that are not floats. ValueError: shapes that do not fit.
        """
        shape = tuple(self.given().shape[: 1 if packing.shape is None else 2])
        ids, types, positions = (
            None if tensor is None else _packed(name, tensor, packing, shape)
            for name, tensor in (
                ("input_ids", self.input_ids),
                ("token_type_ids", self.token_type_ids),
                ("position_ids", self.position_ids),
            )
        )
        assert positions is not None
        if self.inputs_embeds is not None and not self.inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds must be floats, got {self.inputs_embeds.dtype}")
        embeds = None if self.inputs_embeds is None else packing.gather(self.inputs_embeds)
        return PackedInputs(ids, types, positions, embeds)


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    """TypeError where `ids` are not integers, ValueError where their shape is not the batch's."""
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(f"{name} {tuple(ids.shape)} does not fit the batch of {tuple(shape)}")


def _packed(name: str, ids: Tensor, packing: Packing, shape: tuple[int, ...]) -> Tensor:
    check_ids(name, ids, shape)
    packed = packing.gather(ids)
    return packed if packed.dtype == torch.int64 else packed.long()


def _expanded(tensor: Tensor | None, batch: int, columns: int) -> Tensor | None:
    """(1, S) as (B, S); anything else as it is."""
    if batch != 1 and isinstance(tensor, Tensor) and tensor.shape == (1, columns):
        return tensor.expand(batch, columns)
    return tensor
