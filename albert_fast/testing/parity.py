"""Compares one operator on one backend with plain torch, forward and backward; every tests/test_<op>.py runs these checks.

pytest is needed only for parametrisations and imported there: benchmarks use the rest on machines without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime import dispatch
from . import poison_empty
from .case import Inputs, OpCase
from .cases import ALL_CASES
from .covering import pairwise
from .tolerances import assert_close_calibrated, largest_error

if TYPE_CHECKING:
    import pytest

# (id, case, shape, options, dtype, backend) of a parity test.
GridRow = tuple[str, OpCase, Any, dict[str, Any], torch.dtype, str]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def device_of(backend: str) -> torch.device:
    """The device on which a test runs `backend`: GPU kernels run on the GPU if there is one, otherwise in Triton's interpreter."""
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def parity_grid(op: str, *backends: str) -> list[GridRow]:
    """(id, case, shape, options, dtype, backend) of every parity test of `op`; Triton's interpreter gets the small shapes.

    `without_thorough` leaves the part that a quick run needs.
    """
    case, grid = ALL_CASES[op], []
    for backend in backends:
        device = device_of(backend).type
        shapes = case.small_shapes if backend == "triton" and device == "cpu" else case.shapes
        dtypes = [name for name, dtype in DTYPES.items() if dispatch.why_not(op, device, backend, dtype) is None]
        for dtype, shape, options in itertools.product(dtypes, shapes, case.options):
            if not case.takes(options, DTYPES[dtype]):
                continue
            name = "-".join([backend, dtype, _shape_id(shape), *(f"{k}={v}" for k, v in options.items())])
            grid.append((name, case, shape, options, DTYPES[dtype], backend))
    return grid


def without_thorough(grid: list[GridRow]) -> list[GridRow]:
    """The rows that every test run takes: for each backend every pair of a dtype, a shape and a set of options."""
    rows = [
        tuple((backend, value) for value in (dtype, shape, options)) for _, _, shape, options, dtype, backend in grid
    ]
    return [grid[at] for at in pairwise(rows)]


def parity_tests(op: str) -> tuple[pytest.MarkDecorator, pytest.MarkDecorator]:
    """pytest parametrisations of `check_forward` and `check_backward` over the grid of every backend that runs here.

    Rows beyond `without_thorough` are marked "thorough".
    """
    import pytest

    names = ("case", "shape", "options", "dtype", "backend")
    on_gpu = dispatch.TABLE[op]["cuda"] if torch.cuda.is_available() else ()
    # The reference is tested on the CPU only: on a GPU it is the same Python.
    forward = parity_grid(op, *dict.fromkeys((*dispatch.runnable_on(op, "cpu"), *on_gpu)))
    always = {row[0] for row in without_thorough(forward)}

    def parametrized(grid: list[GridRow]) -> pytest.MarkDecorator:
        marks = [() if row[0] in always else (pytest.mark.thorough,) for row in grid]
        return pytest.mark.parametrize(
            names, [pytest.param(*row[1:], id=row[0], marks=mark) for row, mark in zip(grid, marks, strict=True)]
        )

    return parametrized(forward), parametrized([row for row in forward if row[1].gradients])


def every_pair(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """A pytest parametrisation by all combinations of the arguments' values; those beyond every pair of two are "thorough"."""
    import pytest

    rows = list(itertools.product(*values.values()))
    always = set(pairwise(rows))
    marks = [() if at in always else (pytest.mark.thorough,) for at in range(len(rows))]
    return pytest.mark.parametrize(
        list(values), [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]
    )


def float16_if_thorough() -> pytest.MarkDecorator:
    """A pytest parametrisation of `dtype`, for slow tests of code that treats both 16-bit types alike."""
    import pytest

    marks = {"f16": pytest.mark.thorough}
    values = [pytest.param(dtype, id=name, marks=marks.get(name, ())) for name, dtype in DTYPES.items()]
    return pytest.mark.parametrize("dtype", values)


def _shape_id(shape: Any) -> str:
    return "x".join(_shape_id(part) for part in shape) if isinstance(shape, tuple) else str(shape)


def make_inputs(
    case: OpCase, shape: Any, options: dict[str, Any], dtype: torch.dtype, backend: str = "reference"
) -> Inputs:
    """Random inputs of a case, the same on every device."""
    return case.make_inputs(shape, dtype, device_of(backend), torch.Generator().manual_seed(11), **options)


def check_forward(case: OpCase, shape: Any, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Compare the operator's output with plain torch in the same dtype and in float64, with unwritten memory poisoned."""
    inputs = make_inputs(case, shape, options, dtype, backend)
    with poison_empty():
        actual = case.run(inputs, backend)
    same = case.eager(**inputs)
    assert actual.dtype == same.dtype
    assert_close_calibrated(actual, same, case.exact(inputs), slack=case.slack(inputs))


def check_backward(case: OpCase, shape: Any, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Compare the gradient of every differentiable input, for a random cotangent, in the same way."""
    inputs = make_inputs(case, shape, options, dtype, backend)
    cotangent = torch.randn(case.output_like(inputs).shape, generator=torch.Generator().manual_seed(12))
    cotangent = cotangent.to(device_of(backend), dtype)
    with poison_empty():
        actual = _gradients(case, inputs, cotangent, lambda leaves: case.run(leaves, backend))
    same = _gradients(case, inputs, cotangent, lambda leaves: case.eager(**leaves))
    exact = _gradients(case, inputs, cotangent, case.exact)
    slack = _condition(case, inputs, cotangent, exact)
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype
        assert_close_calibrated(gradient, same[name], exact[name], f"gradient of {name}", slack[name])


def _condition(case: OpCase, inputs: Inputs, cotangent: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    """How far float32 rounding moves an ill-conditioned gradient, relative to its largest value; 0 for other gradients.

    It is computed in float64, so that it does not depend on the order in which a library adds.
    """
    generator, moved = torch.Generator().manual_seed(13), dict.fromkeys(exact, 0.0)
    for _ in range(8):
        rounded = case.rounded(inputs, generator)
        if rounded is None:
            break
        for name, gradient in _gradients(case, rounded, cotangent, case.exact).items():
            moved[name] = max(moved[name], largest_error(gradient, exact[name]))
    sizes = {name: float(gradient.abs().max()) if gradient.numel() else 0.0 for name, gradient in exact.items()}
    return {name: move / sizes[name] if sizes[name] else 0.0 for name, move in moved.items()}


def _gradients(case: OpCase, inputs: Inputs, cotangent: Tensor, run: Any) -> dict[str, Tensor]:
    names = [name for name in case.gradients if isinstance(inputs.get(name), Tensor)]
    if case.name.startswith("embedding_") and inputs.get("inputs_embeds") is not None:
        names.remove("word")  # the embeddings are given, so no row is looked up
    leaves = {**inputs, **{name: inputs[name].detach().requires_grad_() for name in names}}
    output = run(leaves)
    gradients = torch.autograd.grad(
        output, [leaves[name] for name in names], cotangent.to(output.dtype), allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, gradients, strict=True))
