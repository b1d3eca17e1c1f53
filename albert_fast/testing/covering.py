"""Chooses a small part of many cases that still meets every requirement, such as every pair of two parameters' values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

Case = TypeVar("Case", bound=Hashable)


def cover(
    requirements: Mapping[Case, set[Any]], prefer: Callable[[Case, Sequence[Case]], float] = lambda case, chosen: 0.0
) -> list[Case]:
    """Cases that together meet all requirements that any case meets; the same choice for the same cases.

    Greedy: the case that meets most of what is missing comes next, among equals the one that `prefer(case, chosen)` puts
    highest, then the earliest.

    Args:
        requirements: case -> what it meets.
    """
    cases, met = list(requirements), list(requirements.values())
    meeting: dict[Any, list[int]] = {}  # what is missing -> the places of the cases that meet it
    for place, own in enumerate(met):
        for one in own:
            meeting.setdefault(one, []).append(place)
    gains, chosen = list(map(len, met)), list[Case]()
    while meeting:
        most = max(gains)
        best = max((at for at, gain in enumerate(gains) if gain == most), key=lambda at: prefer(cases[at], chosen))
        for one in met[best]:
            for place in meeting.pop(one, ()):
                gains[place] -= 1
        chosen.append(cases[best])
    return chosen


def pairwise(rows: Sequence[Sequence[Any]]) -> list[int]:
    """The indices of rows that together hold every pair of two columns' values that stands in one row; in order.

    Most faults need the values of one parameter or of two together (Kuhn, Wallace and Gallo, "Software fault interactions and
    implications for software testing", 2004), and pairs need far fewer rows than all combinations.
    """
    named = [[(column, repr(value)) for column, value in enumerate(row)] for row in rows]
    return sorted(cover({at: set(itertools.combinations(row, 2)) for at, row in enumerate(named)}))
