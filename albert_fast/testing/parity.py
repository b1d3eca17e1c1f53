"""Parity of one operator on one backend with plain torch, forward and backward: what every tests/test_<op>.py runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from .. import dispatch
from . import poison_empty
from .cases import ALL_CASES, Inputs, OpCase
from .tolerances import assert_close_calibrated

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_BACKEND_DTYPES = {"cpp": ("f32", "bf16"), "triton": ("f32", "bf16", "f16"), "reference": ("f32", "bf16", "f16")}


def parity_tests(op: str) -> tuple[pytest.MarkDecorator, pytest.MarkDecorator]:
    """(forward, backward): pytest parametrisations of `check_forward` and `check_backward` over every shape, option and
    dtype of `op`, on every backend that runs on CPU tensors; Triton's interpreter gets the small shapes.

    The gradient of a Triton forward runs through the reference, which is tested under its own name.
    """
    case = ALL_CASES[op]
    grid = []
    for backend in dispatch.runnable_on(op, "cpu"):
        shapes = case.small_shapes if backend == "triton" else case.shapes
        for dtype, shape, options in itertools.product(_BACKEND_DTYPES[backend], shapes, case.options):
            name = "-".join([backend, dtype, _shape_id(shape), *(f"{k}={v}" for k, v in options.items())])
            grid.append(pytest.param(case, shape, options, DTYPES[dtype], backend, id=name))
    names = ("case", "shape", "options", "dtype", "backend")
    trained = [row for row in grid if row.values[-1] != "triton"]
    return pytest.mark.parametrize(names, grid), pytest.mark.parametrize(names, trained)


def _shape_id(shape: Any) -> str:
    return "x".join(_shape_id(part) for part in shape) if isinstance(shape, tuple) else str(shape)


def make_inputs(case: OpCase, shape: Any, options: dict[str, Any], dtype: torch.dtype) -> Inputs:
    return case.make_inputs(shape, dtype, generator=torch.Generator().manual_seed(11), **options)


def check_forward(case: OpCase, shape: Any, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """The operator's output against plain torch in the same dtype and in float64, with unwritten memory poisoned."""
    inputs = make_inputs(case, shape, options, dtype)
    with poison_empty():
        actual = case.run(inputs, backend)
    assert actual.dtype == dtype
    assert_close_calibrated(actual, case.eager(**inputs), case.exact(inputs))


def check_backward(case: OpCase, shape: Any, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """The gradient of every differentiable input, for a random cotangent, in the same way."""
    inputs = make_inputs(case, shape, options, dtype)
    cotangent = torch.randn(case.output_like(inputs).shape, generator=torch.Generator().manual_seed(12)).to(dtype)
    with poison_empty():
        actual = _gradients(case, inputs, cotangent, lambda leaves: case.run(leaves, backend))
    same = _gradients(case, inputs, cotangent, lambda leaves: case.eager(**leaves))
    exact = _gradients(case, inputs, cotangent, case.exact)
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype
        assert_close_calibrated(gradient, same[name], exact[name], f"gradient of {name}")


def _gradients(case: OpCase, inputs: Inputs, cotangent: Tensor, run: Any) -> dict[str, Tensor]:
    names = [name for name in case.gradients if isinstance(inputs.get(name), Tensor)]
    if case.name == "embedding_projection" and inputs.get("inputs_embeds") is not None:
        names.remove("word")  # not looked up
    leaves = {**inputs, **{name: inputs[name].detach().requires_grad_() for name in names}}
    output = run(leaves)
    gradients = torch.autograd.grad(
        output, [leaves[name] for name in names], cotangent.to(output.dtype), allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, gradients, strict=True))
