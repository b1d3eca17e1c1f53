"""What a test and a benchmark know of an operator: the class OpCase, and how random inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops._dropout import keep_scale_2d

Inputs = dict[str, Any]
EPS = 1e-12


@dataclass(frozen=True)
class OpCase:
    """One operator, for every test and benchmark of it.

    name: the operator's. function: its public function.
    eager: the same in plain torch, in the dtype of its inputs, as a user would write it.
    make_inputs(shape, dtype, device, generator, **options): random keyword arguments of `function`.
    shapes: odd, prime, tiny and real sizes; small_shapes: a few for Triton's interpreter; bench_shapes: ALBERT-base's.
    options: keyword sets for make_inputs that tests go through (activations, dropout, ...).
    takes(options, dtype): whether they go together.
    gradients: names of the inputs that are differentiated.
    slack(inputs): what the largest error may be beyond the calibrated tolerance, relative to the largest value.
    rounded(inputs, generator): for an ill-conditioned problem, inputs changed at random by as much as float32 rounds what is
    computed from them; None where the calibrated tolerance suffices.
    bytes_moved(inputs): each input read once and each output written once. operations(inputs): floating-point operations.
    backward_bytes(inputs), backward_operations(inputs): the same of the gradients, 0 where there are none.
    backward_ratio: operations of the backward over those of the forward; 2 where a product becomes two.
    backward_extra(inputs): bytes of the backward beside inputs and cotangent read once and every gradient written once:
    what the forward saved for it; negative where a gradient is another's memory.
    """

    name: str
    function: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    make_inputs: Callable[..., Inputs]
    shapes: tuple[Any, ...]
    small_shapes: tuple[Any, ...]
    bench_shapes: tuple[Any, ...]
    options: tuple[dict[str, Any], ...]
    gradients: tuple[str, ...]
    operations: Callable[[Inputs], float]
    takes: Callable[[dict[str, Any], torch.dtype], bool] = lambda options, dtype: True
    slack: Callable[[Inputs], float] = lambda inputs: 0.0
    rounded: Callable[[Inputs, torch.Generator], Inputs | None] = lambda inputs, generator: None
    backward_ratio: float = 2.0
    backward_extra: Callable[[Inputs], float] = lambda inputs: 0.0

    def run(self, inputs: Inputs, backend: str = "auto") -> Tensor:
        """The operator on `backend`."""
        return self.function(**inputs, backend=backend)

    def exact(self, inputs: Inputs) -> Tensor:
        """Plain torch in float64 on the same numbers."""
        return self.eager(**{name: _double(value) for name, value in inputs.items()})

    def bytes_moved(self, inputs: Inputs) -> int:
        listed = [item for value in inputs.values() if isinstance(value, list) for item in value]
        tensors = [value for value in (*inputs.values(), *listed) if isinstance(value, Tensor)]
        gathered = inputs.get("input_ids")
        read = sum(t.numel() * t.element_size() for t in tensors)
        if gathered is not None:  # of a table, only the rows that are looked up
            tables = [inputs[name] for name in ("word", "token_type", "position")]
            read += sum((len(gathered) - len(t)) * t.shape[1] * t.element_size() for t in tables)
        return read + self.output_like(inputs).numel() * self.output_like(inputs).element_size()

    def backward_bytes(self, inputs: Inputs) -> float:
        if not self.gradients:
            return 0.0
        differentiated = [inputs[name] for name in self.gradients if isinstance(inputs.get(name), Tensor)]
        written = sum(t.numel() * t.element_size() for t in differentiated)
        return self.bytes_moved(inputs) + written + self.backward_extra(inputs)

    def backward_operations(self, inputs: Inputs) -> float:
        return self.backward_ratio * self.operations(inputs) if self.gradients else 0.0

    def output_like(self, inputs: Inputs) -> Tensor:
        """An empty tensor of the output's shape and dtype, on the meta device."""
        if self.name == "embedding_projection":
            return torch.empty(
                (len(inputs["token_type_ids"]), len(inputs["proj_weight"])), dtype=inputs["word"].dtype, device="meta"
            )
        if self.name == "linear_cross_entropy":
            return torch.empty((), device="meta")
        if self.name == "linear_gelu":
            return torch.empty((len(inputs["x"]), len(inputs["weight"])), dtype=inputs["x"].dtype, device="meta")
        if inputs.get("wanted_rows") is not None:
            return torch.empty((len(inputs["wanted_rows"]), inputs["hidden"].shape[1]), device="meta")
        like = next(inputs[name] for name in ("x", "q", "hidden") if name in inputs)
        return torch.empty_like(like, device="meta")


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def norm_weights(width: int, dtype: torch.dtype, device: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = 1 + 0.2 * torch.randn(width, generator=generator)
    return weight.to(device=device, dtype=dtype), randn((width,), dtype, device, generator)


def drawn_seed(p: float, generator: torch.Generator) -> Tensor | None:
    return torch.randint(0, 2**63 - 1, (), generator=generator) if p else None


def dropped(u: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return u * keep_scale_2d(int(seed), u.shape, p, u.device).to(u.dtype) if p and seed is not None else u
