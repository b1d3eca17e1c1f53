"""On CPUs: a step of pre-training against transformers' with its padded batch, in time and in memory.

Ids are `pretraining/bwd/float32/<size>-<batch>/<side>`; pretraining.py says what a step is.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from shared import sides
from shared.harness import CallGroup, Group, Options, Result, Row, allowed_error
from shared.shapes import model_operations
from torch import Tensor

from albert_fast.inspect.timing import Side
from cpu.pretraining import SIDES, Steps

pytestmark = [
    pytest.mark.pretraining,
    pytest.mark.skipif(torch.cuda.is_available(), reason="measured on CPUs only: hide the GPU from torch"),
]


class PretrainingGroup(CallGroup):
    """One model on one batch, by ours and by transformers'."""

    bytes_moved = None
    pause = True
    flushes = 1
    warmup = 1
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, steps: Steps, threads: int) -> None:
        self.steps, self.threads = steps, threads
        self.key = f"pretraining/bwd/float32/{steps.size}-{steps.batch}"

    @property
    def operations(self) -> float:
        """Of the encoder on real tokens, a backward counted as two forwards; the scores of hidden words come on top."""
        return 3 * model_operations(self.steps.config, self.steps.tokens)

    def sides(self) -> tuple[str, ...]:
        return SIDES

    def why_not(self, side: str) -> str | None:
        if importlib.util.find_spec("transformers") is None:  # ours starts from its weights
            return "transformers not installed: pip install 'albert-fast[bench]'"
        return None

    def ours(self, side: str) -> str:
        return sides.FAST

    def allowed(self, side: str) -> float:
        return allowed_error(side, self.dtype)

    def build(self, side: str) -> Side:
        return Side(self.steps.call(side))

    def expected(self) -> tuple[Tensor, ...]:
        return tuple(self.steps.call("hf")())

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        return tuple(output)

    def close(self) -> None:
        pass

    def measure(self, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
        """Beside the times, the memory that the steps take."""
        results = super().measure(names, options)
        for name, result in results.items():
            if not isinstance(result, Exception):
                try:
                    result.extra_info.update(self.steps.memory(name, self.threads))
                except RuntimeError as error:  # the times stand without it
                    warnings.warn(f"{self.key}/{name}: memory not measured: {error}", stacklevel=1)
        return results


def groups(options: Options) -> Iterator[Group]:
    batches = (
        [("quick", "sst2-32")] if options.quick else [(s, b) for s in ("small", "base") for b in ("sst2-32", "imdb-32")]
    )
    for size, batch in batches:
        yield PretrainingGroup(Steps(size, batch), options.threads)


def test_pretraining(row: Row, record: Any) -> None:
    record(row)
