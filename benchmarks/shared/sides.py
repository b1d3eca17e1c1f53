"""What a side's name says: `<engine>-<option>-...`, as in hf-sdpa, albert_fast-int8 or openvino-int8-sorted.

A side without int16, int8 or fp8 in its name computes with floats. What a figure means depends on that alone, so it is
read from the name in one place.
"""

from __future__ import annotations

from collections.abc import Sequence

FAST = "albert_fast"
FLOAT, INT16, INT8, FP8 = "float", "int16", "int8", "fp8"
PRECISIONS = (FLOAT, INT16, INT8, FP8)
# CUDA graphs on a batch of any size that they take, not on small ones alone.
GRAPHS = "graphs"
# The numbers of the GPU's kernels, computed by the reference on a CPU.
EMULATED = "emulated"


def options(side: str) -> tuple[str, ...]:
    """What follows the engine: ("int8", "sorted") of openvino-int8-sorted."""
    return tuple(side.split("-")[1:])


def engine(side: str) -> str:
    return side.partition("-")[0]


def precision(side: str) -> str:
    """One of PRECISIONS."""
    return next((option for option in options(side) if option in PRECISIONS), FLOAT)


def ours(side: str) -> str:
    """Our own side in the precision of `side`."""
    return FAST if precision(side) == FLOAT else f"{FAST}-{precision(side)}"


def rivals(side: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that `side` is held against: its own precision; no engine has int16, so there the others' floats.

    Ours with and without CUDA graphs are not each other's.
    """
    if precision(side) == INT16:
        return [name for name in names if precision(name) == FLOAT and engine(name) != FAST]
    others = [name for name in names if name != side and precision(name) == precision(side)]
    return [name for name in others if not engine(name) == engine(side) == FAST]
