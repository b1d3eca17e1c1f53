"""Groups for one operator: ours against plain torch and torch.compile, forward and backward, on its OpCase's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from albert_fast.inspect.timing import Side
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES, OpCase
from shared.harness import CallGroup, Options, allowed_error

Eager = Callable[..., Tensor]
_DTYPES = (torch.float32, torch.bfloat16)
# What fills a GPU: 64 sequences of 512 tokens of ALBERT-base.
GPU_SHAPES: dict[str, Any] = {
    "embedding_projection": (32768, 128, 768, 30000, 512, 2),
    "embedding_layer_norm": (32768, 768, 30522, 512, 2),
    "attention": ((512,) * 64, None, 12, 64),
    "bias_gelu": (32768, 3072),
    "linear_gelu": (32768, 768, 3072),
    "add_layer_norm": (32768, 768),
    "gelu_layer_norm": (32768, 128),
    "linear_cross_entropy": (4915, 128, 30000),
    "encoder": ((128,) * 4, 768, 12, 3072, 1, 12),  # its kernel is for few tokens
}


class OperatorGroup(CallGroup):
    """One operator, direction, dtype and shape."""

    pause = False  # every side shares torch's one thread pool
    warmup = 3
    flushes = 8  # about half a millisecond: a kernel's own time is the question, and autograd takes longer to launch it

    def __init__(
        self,
        case: OpCase,
        eager: Eager,
        shape_name: str,
        shape: Any,
        backward: bool,
        dtype: torch.dtype,
        device: torch.device,
        make_options: dict[str, Any] | None = None,
    ) -> None:
        self.case, self.eager, self.shape, self.backward = case, eager, shape, backward
        self.make_options = make_options or {}
        self.dtype, self.device = dtype, device
        self.key = f"{case.name}/{'bwd' if backward else 'fwd'}/{str(dtype).removeprefix('torch.')}/{shape_name}"
        self.backend = dispatch.resolve(case.name, device.type, dtype)
        self._made: dict[str, Any] | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The operator's keyword arguments, drawn once."""
        if self._made is None:
            generator = torch.Generator().manual_seed(0)
            self._made = self.case.make_inputs(self.shape, self.dtype, self.device, generator, **self.make_options)
        return self._made

    @property
    def operations(self) -> float:
        """Operations that the direction needs; what a kernel recomputes does not count."""
        count = self.case.backward_operations if self.backward else self.case.operations
        return float(count(self.inputs))

    @property
    def bytes_moved(self) -> float:
        """Backward: inputs, the output's gradient and what was saved read once, every gradient written once."""
        count = self.case.backward_bytes if self.backward else self.case.bytes_moved
        return float(count(self.inputs))

    def sides(self) -> tuple[str, ...]:
        return self.backend, "eager", "compile"

    def why_not(self, side: str) -> str | None:
        return None

    def ours(self, side: str) -> str:
        return self.backend

    def allowed(self, side: str) -> float:
        """The largest relative error; a case's slack for roundings to integers is for few layers, and these are twelve."""
        return allowed_error(side, self.dtype) + 4 * self.case.slack(self.inputs)

    def build(self, side: str) -> Side:
        function = self.case.function
        if side == "eager":
            function = self.eager
        elif side == "compile":
            mode = "max-autotune-no-cudagraphs" if self.device.type == "cuda" else None
            function = torch.compile(self.eager, dynamic=False, mode=mode)
        return self._side(function, self.inputs, self._differentiated())

    def expected(self) -> tuple[Tensor, ...]:
        """Plain torch in float64."""
        leaves = {name: t.double() for name, t in self._differentiated().items()}
        if not self.backward:
            return (self.case.exact(self.inputs),)
        inputs = {name: v.double() if _is_float(v) else v for name, v in self.inputs.items()}
        side = self._side(self.case.eager, inputs, leaves)
        return self.comparable(side.call(*side.arguments()))

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        return output if self.backward else (output,)

    def close(self) -> None:
        self._made = None
        torch.compiler.reset()

    def _side(self, function: Eager, inputs: dict[str, Any], differentiated: dict[str, Tensor]) -> Side:
        if not self.backward:
            return Side(torch.inference_mode()(lambda: function(**inputs)))
        leaves = {name: t.detach().requires_grad_() for name, t in differentiated.items()}
        cotangent = self.cotangent()
        # Every call builds its own graph: a graph that is kept for a second call may not reuse its memory.
        return Side(
            lambda output: torch.autograd.grad(output, tuple(leaves.values()), cotangent.to(output.dtype)),
            lambda: function(**{**inputs, **leaves}),
        )

    def cotangent(self) -> Tensor:
        """The output's gradient, the same in every call."""
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(self.case.output_like(self.inputs).shape, generator=generator)
        return drawn.to(self.device, self.dtype)

    def _differentiated(self) -> dict[str, Tensor]:
        """The inputs whose gradients the backward computes."""
        return {name: self.inputs[name] for name in self.case.gradients if _is_float(self.inputs.get(name))}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def operator_groups(
    op: str,
    options: Options,
    shape_name: Callable[[Any], str],
    eager: Eager | None = None,
    shapes: tuple[Any, ...] = (),
    directions: tuple[bool, ...] = (False, True),
    kind: type[OperatorGroup] = OperatorGroup,
    **make_options: Any,
) -> Iterator[OperatorGroup]:
    """Every group of `op`: its largest shape (--long: all, --quick: the smallest), each dtype and direction.

    Args:
        shape_name: shape -> its name in ids.
        eager: plain torch at its best for these shapes, where that is not the OpCase's.
        shapes: smallest first, if they are not the OpCase's.
        directions: whether to measure the backward: False, True or both.
        kind: the class of the groups.
        make_options: keywords of the OpCase's make_inputs.
    """
    case = ALL_CASES[op]
    if not shapes:
        shapes = case.bench_shapes
        if options.device.type == "cuda":
            shapes = (*shapes, GPU_SHAPES[op])
    if options.quick:
        shapes = shapes[:1]
    elif not options.long:
        shapes = shapes[-1:]
    for shape in shapes:
        for dtype in _DTYPES:
            if dispatch.why_not(op, options.device.type, dispatch.TABLE[op][options.device.type][0], dtype) is not None:
                continue
            for backward in directions if case.gradients else (False,):
                name = shape_name(shape)
                yield kind(case, eager or case.eager, name, shape, backward, dtype, options.device, make_options)
