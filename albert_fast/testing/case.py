"""OpCase: the description of an operator that its tests and benchmarks use; and functions that draw random inputs."""

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
    """One operator, described for all of its tests and benchmarks.

    name: the operator's name.
    function: its public function.
    eager: the same in plain torch, in the dtype of its inputs, as a user would write it.
    make_inputs(shape, dtype, device, generator, **options): random keyword arguments of `function`.
    shapes: odd, prime, tiny and real sizes.
    small_shapes: a few, for Triton's interpreter.
    bench_shapes: ALBERT-base's.
    options: sets of keywords for make_inputs that tests use (activations, dropout, ...).
    takes(options, dtype): whether the operator supports them together.
    gradients: names of the inputs that are differentiated.
    slack(inputs): allowed error in addition to the calibrated tolerance, relative to the largest value.
    rounded(inputs, generator): for an ill-conditioned problem, the inputs with random changes of the size of float32 rounding;
        None if the calibrated tolerance is enough.
    operations(inputs): floating-point operations of the forward.
    backward_ratio: operations of the backward divided by those of the forward; 2 if one product becomes two.
    backward_extra(inputs): bytes that the backward moves in addition to inputs and cotangent, read once, and every gradient,
        written once: usually what the forward saved for it; negative if two gradients share memory.
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
        """Bytes of the forward: each input is read once and each output is written once."""
        listed = [item for value in inputs.values() if isinstance(value, list) for item in value]
        tensors = [value for value in (*inputs.values(), *listed) if isinstance(value, Tensor)]
        gathered = inputs.get("input_ids")
        read = sum(t.numel() * t.element_size() for t in tensors)
        if gathered is not None:  # only the rows of a table that are looked up are read
            tables = [inputs[name] for name in ("word", "token_type", "position") if inputs[name] is not None]
            read += sum((len(gathered) - len(t)) * t.shape[1] * t.element_size() for t in tables)
        return read + self.output_like(inputs).numel() * self.output_like(inputs).element_size()

    def backward_bytes(self, inputs: Inputs) -> float:
        """Bytes of the backward, 0 without gradients."""
        if not self.gradients:
            return 0.0
        differentiated = [inputs[name] for name in self.gradients if isinstance(inputs.get(name), Tensor)]
        written = sum(t.numel() * t.element_size() for t in differentiated)
        return self.bytes_moved(inputs) + written + self.backward_extra(inputs)

    def backward_operations(self, inputs: Inputs) -> float:
        """Floating-point operations of the backward, 0 without gradients."""
        return self.backward_ratio * self.operations(inputs) if self.gradients else 0.0

    def output_like(self, inputs: Inputs) -> Tensor:
        """An empty tensor of the output's shape and dtype, on the meta device."""
        if self.name == "embedding_projection":
            return torch.empty(
                (len(inputs["token_type_ids"]), len(inputs["proj_weight"])), dtype=inputs["word"].dtype, device="meta"
            )
        if self.name == "embedding_layer_norm":
            shape = len(inputs["position_ids"]), inputs["word"].shape[1]
            return torch.empty(shape, dtype=inputs["word"].dtype, device="meta")
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
