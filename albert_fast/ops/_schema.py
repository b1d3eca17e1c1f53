"""The tensors of a layer, listed once: the name, shape and role of each, and the product that it belongs to.

The parameter orders of `encoder` and `quantized_encoder` follow from the list. C++ has the same orders and numbers in
csrc/layer_schema.h; `dispatch` compares them when it loads the extension, and refuses one built from other sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NamedTuple, TypeVar

from ..runtime import dispatch

Item = TypeVar("Item")


class LayerTensor(NamedTuple):
    """One tensor of a layer.

    shape: its sizes as letters, H the hidden size, I the intermediate size.
    product: for a matrix or a bias, the product that it belongs to; None for a norm.
    """

    name: str
    shape: str
    role: Literal["matrix", "bias", "norm weight", "norm bias"]
    product: str | None = None


LAYER = (
    LayerTensor("query", "H H", "matrix", "qkv"),
    LayerTensor("query_bias", "H", "bias", "qkv"),
    LayerTensor("key", "H H", "matrix", "qkv"),
    LayerTensor("key_bias", "H", "bias", "qkv"),
    LayerTensor("value", "H H", "matrix", "qkv"),
    LayerTensor("value_bias", "H", "bias", "qkv"),
    LayerTensor("dense", "H H", "matrix", "dense"),
    LayerTensor("dense_bias", "H", "bias", "dense"),
    LayerTensor("norm_weight", "H", "norm weight"),
    LayerTensor("norm_bias", "H", "norm bias"),
    LayerTensor("ffn", "I H", "matrix", "ffn"),
    LayerTensor("ffn_bias", "I", "bias", "ffn"),
    LayerTensor("ffn_output", "H I", "matrix", "ffn_output"),
    LayerTensor("ffn_output_bias", "H", "bias", "ffn_output"),
    LayerTensor("full_norm_weight", "H", "norm weight"),
    LayerTensor("full_norm_bias", "H", "norm bias"),
)

# The weights of `encoder`, in the order of its list, and their shapes.
WEIGHTS = {tensor.name: tensor.shape for tensor in LAYER}


def _joined(shapes: Sequence[str]) -> str:
    """The shape of tensors of equal shapes, joined along their first dimension: three of "H H" are "3H H"."""
    return f"{len(shapes)}{shapes[0]}" if len(shapes) > 1 else shapes[0]


def _of_product(product: str, role: str) -> list[str]:
    return [tensor.shape for tensor in LAYER if tensor.product == product and tensor.role == role]


def _matrix(product: str) -> tuple[str, str]:
    n, k = _joined(_of_product(product, "matrix")).split()
    return n, k


# A layer's products, in the order of `quantized_encoder`'s lists, and the shapes (N, K) of their matrices.
PRODUCTS = {tensor.product: _matrix(tensor.product) for tensor in LAYER if tensor.product is not None}
# A layer's vectors, in the order of `quantized_encoder`'s `vectors`, and their lengths: one bias a product, and the norms.
VECTORS = {
    tensor.name if tensor.product is None else f"{tensor.product}_bias": (
        tensor.shape if tensor.product is None else _joined(_of_product(tensor.product, "bias"))
    )
    for tensor in LAYER
    if tensor.role != "matrix"
}

# Columns of the FFN's middle that the C++ kernel rounds together; output channels in a panel of its packed integers.
SLICE, PANEL = 768, 32


def sizes_of(shape: str, hidden: int, intermediate_size: int) -> tuple[int, ...]:
    """The sizes that the letters of a shape stand for: for "I H" these are intermediate_size and hidden."""
    sizes = {"H": hidden, "3H": 3 * hidden, "I": intermediate_size}
    return tuple(sizes[letter] for letter in shape.split())


def matrix_sizes(product: str, hidden: int, intermediate_size: int) -> tuple[int, int]:
    """N and K of a product's matrix."""
    n, k = sizes_of(" ".join(PRODUCTS[product]), hidden, intermediate_size)
    return n, k


def split_layers(weights: Sequence[Item]) -> list[dict[str, Item]]:
    """The tensors of each distinct layer by name, from `encoder`'s list of weights."""
    count = len(WEIGHTS)
    return [dict(zip(WEIGHTS, weights[i : i + count], strict=True)) for i in range(0, len(weights), count)]


def check_orders(kernel: ModuleType, **orders: tuple[str, ...]) -> ModuleType:
    """`kernel`, a module of Triton kernels, once the lists of that name in it are found to be in the same order as here.

    Raises:
        ImportError: a list differs.
    """
    for name, order in orders.items():
        if getattr(kernel, name) != order:
            raise ImportError(f"{kernel.__name__} has {name} = {getattr(kernel, name)}, its operator passes {order}")
    return kernel


dispatch.expect(
    weights=tuple(WEIGHTS),
    vectors=tuple(VECTORS),
    products=tuple(PRODUCTS),
    slice=SLICE,
    panel=PANEL,
)
