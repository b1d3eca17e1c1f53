"""The question of what a model costs to load: seconds and memory, each engine in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import peers, sides
from shared.harness import Group, Options, Result, allowed_error, judged
from shared.model_group import dtype_name
from shared.shapes import LOAD_BATCH, Batch
from torch import Tensor

_LOADS = 3  # samples of loading; each takes seconds, and a process of its own
_SCRIPT = Path(__file__).with_name("load_engine.py")


class LoadGroup(Group):
    """Times loading, from files on disk to the first answer, each side in a fresh process; samples are seconds of loading."""

    def __init__(self, shape_name: str, names: Sequence[str], model: peers.Peers) -> None:
        self.model, self._sides = model, tuple(names)
        self.key = f"load/fwd/{dtype_name(model.dtype)}/{shape_name}"

    @cached_property
    def batch(self) -> Batch:
        return self.model.batch(LOAD_BATCH)

    def sides(self) -> tuple[str, ...]:
        return self._sides

    def why_not(self, side: str) -> str | None:
        return peers.why_not(side, self.model.model)

    def measure(self, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
        """Runs the sides in turn, A B C A B C, each in a process, and takes the medians of what they report."""
        reports: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        outputs: dict[str, Tensor] = {}
        failures: dict[str, Exception] = {}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(min(options.rounds, 1 if options.quick else _LOADS)):
                for name in [name for name in names if name not in failures]:
                    try:
                        report, outputs[name] = self._load(name, Path(folder))
                        reports[name].append(report)
                    except Exception as error:  # belongs to its own row
                        failures[name] = error
        measured = [name for name in names if name not in failures]
        samples = {name: [report["load_seconds"] for report in reports[name]] for name in measured}
        expected = (self.model.expected(self.batch),) if measured else ()
        results: dict[str, Result | Exception] = dict(failures)
        answers = {name: partial(lambda side: (self.batch.real(outputs[side]),), name) for name in measured}
        allowed = partial(allowed_error, dtype=self.model.dtype)
        for name, found in judged(samples, answers, expected, allowed, sides.ours).items():
            if isinstance(found, Exception):
                results[name] = found
                continue
            milliseconds = statistics.median(samples[name]) * 1e3
            figures: dict[str, Any] = {"id": f"{self.key}/{name}", "milliseconds": milliseconds}
            figures |= {key: statistics.median(report[key] for report in reports[name]) for key in reports[name][0]}
            results[name] = Result(samples[name], figures | found | {"threads": options.threads})
        return results

    def _load(self, side: str, folder: Path) -> tuple[dict[str, float], Tensor]:
        """What load_engine.py reports, and the answer (B, S, H)."""
        inputs, output = folder / "inputs.npz", folder / "output.npy"
        np.savez(inputs, input_ids=self.batch.ids.numpy(), attention_mask=self.batch.mask.numpy())
        path = self.model.files(side)[0]
        command = [sys.executable, _SCRIPT, side, path, inputs, output, self.model.threads]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"loading {side} failed: {done.stderr.strip()[-2000:]}")
        report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return report, torch.from_numpy(np.load(output))
