"""Chooses which launches the short compile check compiles for which chips: few of them, and every kind of code at least once.

Every launch on every chip would be about 1300 compilations; the choice is about a sixth. It covers

- every tile on one chip at least, of kernels that multiply matrices for the types of TILE_NUMBERS: float32 and TF32 share the
  code, and have other tiles, of which the largest is covered;
- every type of operands of every kernel on one chip at least, where kernels that do not multiply have one 16-bit type;
- every kernel on every chip;
- every value of every flag (an activation, dropout, padding, an absent operand), and every pair of such values of a kernel, on
  one chip at least;
- of kernels that multiply, the largest tile of every type of operands, with dropout if there is any, since such tiles have
  spilled registers most often: on every chip for the types of TILE_NUMBERS, on one chip at least for the others;
- launches at the released models' sizes (launches.py), on every chip.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from ..covering import cover
from .recording import Launch

# Types of operands for which every tile of a product is compiled: those that models are run in for speed.
TILE_NUMBERS = ("bf16", "int8", "fp8")
# A launch and the compute capability of the chip that it is compiled for.
Compilation = tuple[Launch, int]


def covering(launches: Sequence[Launch], capabilities: Iterable[int]) -> set[Compilation]:
    """A small set of compilations that meets every requirement above; the same set for the same launches."""
    largest = _largest(launches)
    wanted = {
        (launch, capability): _requirements(launch, capability, largest)
        for capability in capabilities
        for launch in launches
        if launch.is_for(capability)
    }

    def least_loaded(one: Compilation, chosen: Sequence[Compilation]) -> float:
        return -sum(capability == one[1] for _, capability in chosen)

    return set(cover(wanted, least_loaded))


def _requirements(launch: Launch, capability: int, largest: set[Launch]) -> set[Hashable]:
    """What a compilation covers."""
    function, numbers = launch.function, launch.numbers
    # Kernels that multiply nothing differ between the 16-bit types only in how they convert to float32.
    kind = numbers if launch.multiplies else numbers.replace("bf16", "f16")
    found: set[Hashable] = {(function, "numbers", kind), (function, "chip", capability)}
    if not launch.multiplies or numbers in TILE_NUMBERS:
        found.add((function, "tile", launch.tiles, numbers if launch.multiplies else None))
    found |= {(function, "flags", *pair) for pair in itertools.combinations_with_replacement(launch.flags, 2)}
    if launch in largest:
        found.add((launch, capability if numbers in TILE_NUMBERS else None))
    if launch.every_chip:
        found.add((launch, capability))
    return found


def _largest(launches: Sequence[Launch]) -> set[Launch]:
    """A launch of the largest tile, with dropout if there is any, for every kernel that multiplies and type of operands.

    float16 is left out: its tiles are those of bfloat16.
    """
    groups: dict[tuple[str, str], list[Launch]] = defaultdict(list)
    for launch in launches:
        if launch.multiplies and launch.numbers != "f16":
            groups[launch.function, launch.numbers].append(launch)
    return {max(group, key=lambda launch: (_area(launch), _has_dropout(launch))) for group in groups.values()}


def _area(launch: Launch) -> int:
    """Elements of the tile: 8192 for "D64 M128 N64 C64"."""
    sizes = {word[0]: int(word[1:]) for word in launch.tiles.split() if word[1:].isdigit()}
    return sizes["M"] * sizes["N"]


def _has_dropout(launch: Launch) -> bool:
    return ("seed_lo is absent", False) in launch.flags
