"""The self-calibrating tolerance: a kernel may err as much as torch errs in the same dtype, twice over, and hardly more."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond twice torch's own error, relative to the largest value of the reference: about four units in the last place of
# the dtype, for elements where torch happens to round without any error.
SLACK = {torch.float32: 5e-7, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-15}


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |actual - expected| over elements that are finite in both; 0 for empty tensors."""
    finite = torch.isfinite(expected) & torch.isfinite(actual)
    difference = (actual.double() - expected.double()).abs()[finite]
    return float(difference.max()) if difference.numel() else 0.0


def assert_close_calibrated(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "output", slack: float = 0.0
) -> None:
    """err(actual, exact) <= 2 err(same_dtype, exact) + (SLACK + slack) * max |exact|; inf and NaN stand where they should.

    Args:
        actual: what the kernel under test gave, in the tested dtype.
        same_dtype: the same computation by torch in the tested dtype.
        exact: the same computation in float32 or better on the same inputs.
        what: a name for the message.

    Raises:
        AssertionError: another shape, a misplaced inf or NaN, a larger error.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    for name, of in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        misplaced = of(actual) != of(exact.to(actual.dtype))
        assert not misplaced.any(), f"{what}: {name} misplaced at {misplaced.nonzero()[:5].tolist()}"
    finite = exact[torch.isfinite(exact)]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    allowed = 2 * largest_error(same_dtype, exact) + (SLACK[actual.dtype] + slack) * size
    error = largest_error(actual, exact)
    assert error <= allowed, f"{what}: error {error:.3g} exceeds {allowed:.3g} (torch's own, doubled, and rounding)"
