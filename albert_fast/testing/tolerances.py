"""The self-calibrating tolerance: a kernel may err at most twice as much as torch in the same dtype, plus a small slack."""

from __future__ import annotations

import torch
from torch import Tensor

# The slack, relative to the largest value of the reference: about four units in the last place of the dtype. It is needed for
# elements that torch happens to compute without any error.
SLACK = {torch.float32: 5e-7, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-15}


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |actual - expected| over elements that are finite in both; 0 for empty tensors."""
    finite = torch.isfinite(expected) & torch.isfinite(actual)
    difference = (actual.double() - expected.double()).abs()[finite]
    return float(difference.max()) if difference.numel() else 0.0


def assert_close_calibrated(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "output", slack: float = 0.0
) -> None:
    """Check err(actual, exact) <= 2 err(same_dtype, exact) + (SLACK + slack) * max |exact|, and the places of inf and NaN.

    Args:
        actual: the result of the kernel under test, in the tested dtype.
        same_dtype: the same computation by torch in the tested dtype.
        exact: the same computation in float32 or better on the same inputs.
        what: a name for the message.

    Raises:
        AssertionError: the shape differs, an inf or NaN is misplaced, or the error is larger.
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
