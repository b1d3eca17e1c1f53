"""Layers of which only the packed matrices are kept, as the C++ encoder reads them: one copy of the weights instead of two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import ops

# The modules of a layer, in the order of the matrices in its packed memory.
ORDER = ("query", "key", "value", "dense", "ffn", "ffn_output")


class PackedLinear(nn.Module):
    """Takes the place of a Linear (K -> N) of a layer: its bias, and its share of the layer's packed matrices.

    state_dict has `weight` (N, K), which is unpacked, bit for bit, and `bias` (N,). The packed matrices stay float32 on the CPU
    whatever the model is converted to; a forward then names that.
    """

    def __init__(self, linear: Any, packed: Tensor, number: int, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.number, self.sizes, self.panel = number, sizes, ops.panel_columns()
        self.register_buffer("packed", packed, persistent=False)

    packed: Tensor

    @property
    def weight(self) -> Tensor:
        """(N, K), unpacked at each access."""
        self.check_panel()
        return ops.unpack_matrix(self.packed, self.number, *self.sizes)

    def check_panel(self) -> None:
        """RuntimeError where the model was unpickled on a machine, or under ALBERT_FAST_ISA, that packs otherwise."""
        if self.panel != ops.panel_columns():
            raise RuntimeError(
                f"these weights were packed in panels of {self.panel} columns, this machine reads {ops.panel_columns()}: "
                "load the checkpoint here instead of a pickle"
            )

    def extra_repr(self) -> str:
        n, k = self.weight_shape()
        return f"in_features={k}, out_features={n}, packed"

    def weight_shape(self) -> tuple[int, int]:
        """N and K."""
        hidden, middle = self.sizes
        return {4: (middle, hidden), 5: (hidden, middle)}.get(self.number, (hidden, hidden))

    def check_stays(self, fn: Callable[[Tensor], Tensor]) -> None:
        """RuntimeError where `fn`, which `Module.to` and the like apply to every tensor, moves to another device."""
        if fn(self.bias.detach()).device != self.bias.device:
            raise RuntimeError("packed layers run on the CPU: load the model without keep_float=False to move it")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.check_stays(fn)
        return self  # converted to another dtype, it stays as it is: only floats of 32 bits are packed

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        errors.append(f"{prefix}weight: only packed weights are kept: load the checkpoint anew, with keep_float=False")

    def forward(self, *_: Any) -> NoReturn:
        raise RuntimeError("a packed layer runs as a whole: see ops.packed_encoder")


def packed_in(module: nn.Module) -> Iterator[PackedLinear]:
    """The packed layers among the parts of `module`, each once."""
    return (part for part in module.modules() if isinstance(part, PackedLinear))


def packed_linears(linears: list[nn.Linear]) -> list[PackedLinear]:
    """What takes the place of a layer's six Linears, in the order of `ORDER`; their float weights may be freed then.

    Raises:
        BackendUnavailableError: there is no C++ extension. RuntimeError: unpacking does not give the weights back.
    """
    weights = [linear.weight.detach().contiguous() for linear in linears]
    middle, hidden = weights[4].shape
    with torch.no_grad():
        packed = ops.pack_matrices(weights)
    for number, weight in enumerate(weights):
        again = ops.unpack_matrix(packed, number, hidden, middle)
        # As integers, so that NaN equals itself.
        if not torch.equal(again.view(torch.int32), weight.view(torch.int32)):
            raise RuntimeError(f"packing does not keep {ORDER[number]} bit for bit: report this")
    return [PackedLinear(linear, packed, number, (hidden, middle)) for number, linear in enumerate(linears)]
