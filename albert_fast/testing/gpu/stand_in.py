"""A stand-in for captures on a GPU: a "graph" that runs what it remembers, so that all around it can be tested without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...execution.graphs import GraphCache
from ...models.albert import ALBERTModel, Encoded
from ...models.config import ALBERTConfig
from ...ops import Describe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the kernel that graphs read from can run
CONFIG = ALBERTConfig(
    vocab_size=61, embedding_size=12, hidden_size=40, num_attention_heads=4, intermediate_size=56, num_hidden_layers=3,
    max_position_embeddings=64,
)  # fmt: skip


class Remembered:
    """Every replay runs the captured function again, which writes where the capture's results stand."""

    def __init__(self, run: Callable[[], Encoded]) -> None:
        self._run, self.result = run, run()

    def replay(self, describe: Describe) -> None:
        assert callable(describe)
        with _disable_current_modes():  # the graph is one launch, whatever stands in for it
            self._run()


class Capture:
    """Counts captures and waits, and sees that replays take turns."""

    device_type = DEVICE.type

    def __init__(self) -> None:
        self.captured, self.inside, self.waits = 0, 0, 0

    def why_not(self, model: ALBERTModel) -> str | None:
        return None

    def begin(self, device: torch.device) -> None:
        self.inside += 1
        assert self.inside == 1, "replays of one model never overlap"

    def end(self, device: torch.device) -> None:
        self.inside -= 1

    def wait(self) -> None:
        self.waits += 1

    def forget(self) -> None:
        assert self.waits > 0

    def __call__(self, run: Callable[[], Encoded], device: torch.device) -> Remembered:
        self.captured += 1
        return Remembered(run)


def graphed(capture: Capture, kind: Any = ALBERTModel, **options: Any) -> Any:
    """A model whose graphs are captured by `capture`. The reference takes rows that are in no sequence, as the GPU's kernels."""
    made = kind(CONFIG, backend="reference").eval().to(DEVICE)
    made.base_model.execution_state.graphs = GraphCache(capture, **options)
    return made


def plain(model: Any) -> Any:
    """The same model without graphs."""
    other = copy.deepcopy(model)
    other.base_model.execution_state.graphs = None
    return other


def batch(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids and a mask with holes, (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (rows, columns), generator=generator)
    return ids.to(DEVICE), (torch.rand(rows, columns, generator=generator) < 0.7).long().to(DEVICE)


def in_threads(*works: Callable[[], Any]) -> list[BaseException]:
    """Run all at once, each in a thread of its own; their exceptions."""
    with ThreadPoolExecutor(len(works)) as pool:
        done = [pool.submit(work) for work in works]
    return [error for future in done if (error := future.exception()) is not None]
