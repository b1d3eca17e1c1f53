"""Replaces the capture of CUDA graphs by a fake, so that the code around graphs can be tested without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...execution.graphs import GraphCache
from ...layers.encoded import Encoded
from ...models.albert import ALBERTModel
from ...models.config import ALBERTConfig
from ...ops import Describe

# The device where the kernel that writes a graph's inputs can run.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ALBERTConfig(
    vocab_size=61,
    embedding_size=12,
    hidden_size=40,
    num_attention_heads=4,
    intermediate_size=56,
    num_hidden_layers=3,
    max_position_embeddings=64,
)


class FakeGraph:
    """A graph whose replay runs the captured function again; it writes into the tensors that the capture returned."""

    def __init__(self, run: Callable[[], Encoded]) -> None:
        self._run, self.result = run, run()

    def replay(self, describe: Describe) -> None:
        assert callable(describe)
        with _disable_current_modes():  # a real replay is one launch, which no mode sees
            self._run()


class Capture:
    """A capture that makes fake graphs, counts captures and waits, and checks that replays do not overlap."""

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

    def __call__(self, run: Callable[[], Encoded], device: torch.device) -> FakeGraph:
        self.captured += 1
        return FakeGraph(run)


def graphed(capture: Capture, kind: Any = ALBERTModel, **options: Any) -> Any:
    """A model whose graphs are captured by `capture`. Its reference backend, as GPU kernels, accepts rows outside all sequences."""
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


def in_threads(*functions: Callable[[], Any]) -> list[BaseException]:
    """Run all functions at once, each in a thread of its own, and return their exceptions."""
    with ThreadPoolExecutor(len(functions)) as pool:
        done = [pool.submit(function) for function in functions]
    return [error for future in done if (error := future.exception()) is not None]
