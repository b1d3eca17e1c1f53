"""The weights of a layer, and of layers that differ, as the persistent encoder kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from ._capture import capturing


class LayerWeights(NamedTuple):
    """The weights of one layer; one argument of the kernel."""

    query_ptr: Any  # (H, H)
    query_bias_ptr: Any  # (H,)
    key_ptr: Any  # (H, H)
    key_bias_ptr: Any  # (H,)
    value_ptr: Any  # (H, H)
    value_bias_ptr: Any  # (H,)
    dense_ptr: Any  # (H, H)
    dense_bias_ptr: Any  # (H,)
    norm_weight_ptr: Any  # (H,)
    norm_bias_ptr: Any  # (H,)
    ffn_ptr: Any  # (I, H)
    ffn_bias_ptr: Any  # (I,)
    ffn_output_ptr: Any  # (H, I)
    ffn_output_bias_ptr: Any  # (H,)
    full_norm_weight_ptr: Any  # (H,)
    full_norm_bias_ptr: Any  # (H,)


_COUNT = tl.constexpr(len(LayerWeights._fields))
# The order of a layer's weights, by name; ops/encoder.py compares it with the schema.
WEIGHTS = tuple(name.removesuffix("_ptr") for name in LayerWeights._fields)


class DistinctLayers(NamedTuple):
    """The weights of layers that differ; one argument of the kernel. None, None: every layer has those of LayerWeights."""

    addresses_ptr: (
        Any  # (distinct layers, 16) int64, the addresses of each layer's weights in the order of LayerWeights
    )
    indices_ptr: Any  # (n_layers,) int64, the distinct layer of each step


@triton.jit
def layer_weight(
    distinct,  # DistinctLayers
    layer,
    first_ptr,  # the same weight of LayerWeights
    COLUMN: tl.constexpr,  # its place among them
):
    """The pointer to a weight of the layer that runs at step `layer`."""
    if distinct.addresses_ptr is not None:
        row = tl.load(distinct.indices_ptr + layer)
        address = tl.load(distinct.addresses_ptr + row * _COUNT + COLUMN)
        # The launcher has checked the alignment, which lets 16 bytes be loaded at a time.
        first_ptr = tl.multiple_of(address.to(first_ptr.dtype), 16)
    return first_ptr


# Tables of addresses on the GPU, by the first weight and what is in them: a captured graph reads them at each replay, so they
# live as long as the weights do.
_TABLES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def distinct_layers(weights: Sequence[torch.Tensor], layer_indices: Sequence[int]) -> DistinctLayers | None:
    """What the kernel needs for layers that differ; None where a weight begins at no multiple of 16 bytes, or where a CUDA graph is
    captured, into which nothing can be copied from the host, before these weights were met."""
    addresses = [weight.data_ptr() for weight in weights]
    if any(address % 16 for address in addresses):
        return None
    known = _TABLES.setdefault(weights[0], {})
    key = (*addresses, *layer_indices)
    if key not in known and capturing():
        return None
    if key not in known:
        device = weights[0].device
        table = torch.tensor(addresses, dtype=torch.int64, device=device).view(-1, len(WEIGHTS))
        known[key] = DistinctLayers(table, torch.tensor(list(layer_indices), dtype=torch.int64, device=device))
    found: DistinctLayers = known[key]
    return found
