"""Reads a side's name, `<engine>-<option>-...`, as in hf-sdpa, albert_fast-int8 or openvino-int8-sorted.

A side without bf16, int16, int8 or fp8 in its name computes in float32, or in the floats that its question names. What a
figure means depends on that alone, so it is read from the name in one place.
"""

from __future__ import annotations

from collections.abc import Sequence

FAST = "albert_fast"
FLOAT, BF16, INT16, INT8, FP8 = "float", "bf16", "int16", "int8", "fp8"
PRECISIONS = (FLOAT, BF16, INT16, INT8, FP8)
# CUDA graphs on batches of every size that they take, not only on small ones.
GRAPHS = "graphs"
# The GPU kernels' arithmetic, computed by the reference on a CPU.
EMULATED = "emulated"


def options(side: str) -> tuple[str, ...]:
    """The options after the engine: ("int8", "sorted") of openvino-int8-sorted."""
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
    """Those of `names` that `side` is compared with: its own precision; for int16, which no engine has, the others' floats.

    Ours with and without CUDA graphs are not each other's.
    """
    if precision(side) == INT16:
        return [name for name in names if precision(name) == FLOAT and engine(name) != FAST]
    others = [name for name in names if name != side and precision(name) == precision(side)]
    return [name for name in others if not engine(name) == engine(side) == FAST]
