"""On CPUs: libraries that people run BERT's family with, as they are, accelerated by one line, and on their other engines.

Ids are `hosts/fwd/float32/<host>-<texts>/<side>`: `hf` is the library on PyTorch, as it is; hosts.py says what a host is.
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
from cpu import peer_sides
from cpu.host import Host
from cpu.hosts import all_hosts, sizes_of
from cpu.trainer import TrainerSteps

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(torch.cuda.is_available(), reason="measured on CPUs only: hide the GPU from torch"),
]

_NEEDS = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


class HostGroup(CallGroup):
    """One host on its texts, by every engine that it can run on."""

    bytes_moved = None
    pause = True
    flushes = 1
    warmup = 1
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, host: Host, options: Options) -> None:
        self.host, self.threads, self.pythons = host, options.threads, options.peer_pythons
        self._peers: list[peer_sides.PeerCall] = []
        direction = "bwd" if isinstance(host, TrainerSteps) else "fwd"
        self.key = f"hosts/{direction}/float32/{host.name}"

    @property
    def operations(self) -> float:
        """Counts those of the forward, also where training is measured."""
        return model_operations(sizes_of(self.host.config), self.host.tokens())

    def sides(self) -> tuple[str, ...]:
        return self.host.engines

    def why_not(self, side: str) -> str | None:
        needs = _NEEDS.get(sides.engine(side), ())
        if side == "openvino-int8":
            needs = (*needs, "nncf")
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install 'albert-fast[bench]'"
        return self.host.missing() or peer_sides.why_not(side, self.pythons)

    def ours(self, side: str) -> str:
        return sides.ours(side)

    def allowed(self, side: str) -> float:
        return peer_sides.ALLOWED.get(side, allowed_error(side, self.dtype))

    def build(self, side: str) -> Side:
        if side in peer_sides.EMBEDDERS:
            host = self.host
            peer = peer_sides.PeerCall(
                side, self.pythons, host.folder(), host.inputs(), host.calibration(), self.threads
            )
            self._peers.append(peer)
            return Side(peer)
        return Side(self.host.call(self.host.model(side, self.threads)))

    def expected(self) -> tuple[Tensor, ...]:
        """The library's own answer."""
        return self.host.answer(self.build("hf").call())

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        return self.host.answer(output.answer() if isinstance(output, peer_sides.PeerCall) else output)

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self._peers.clear()

    def measure(self, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
        """Beside the times: the line that a user adds, the versions that a peer ran with, the memory that training took."""
        results = super().measure(names, options)
        for name, result in results.items():
            if isinstance(result, Exception):
                continue
            if name == sides.FAST:
                result.extra_info["line"] = self.host.line
            versions = peer_sides.version_text(name, self.pythons)
            if versions:
                result.extra_info["environment"] = versions
            if isinstance(self.host, TrainerSteps):
                try:
                    result.extra_info.update(self.host.memory(name, self.threads))
                except RuntimeError as error:  # the times stand without it
                    warnings.warn(f"{self.key}/{name}: memory not measured: {error}", stacklevel=1)
        return results


def groups(options: Options) -> Iterator[Group]:
    for host in all_hosts(options.quick):
        yield HostGroup(host, options)


def test_hosts(row: Row, record: Any) -> None:
    record(row)
