"""What a host is: a library's object around an encoder, with the encoder of every engine put into it.

`accelerate` changes that object in place, and ONNX Runtime and OpenVINO take the place of its encoder's forward, as the
library's own backends for them do. So tokenising, sorting, padding and pooling are the host's for every side, and count.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from shared import artifacts, engines, sides
from torch import Tensor


class Host:
    """A library's object around an encoder, and a call of it.

    name: in ids. line: what a user adds to run it on our kernels. needs: modules. engines: the sides that can run it.
    """

    name: str
    line = "albert_fast.accelerate(model)"
    needs: tuple[str, ...] = ("transformers",)
    engines: tuple[str, ...] = (
        *("hf", "hf-bf16"),
        *("albert_fast", "albert_fast-bf16", "albert_fast-int16", "albert_fast-int8"),
        *("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"),
    )
    token_types = False  # whether the encoder is given token types that are not all 0

    def missing(self) -> str | None:
        """Why the host cannot be measured here; None where it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: pip install 'albert-fast[bench]'" if absent else None

    def make(self) -> Any:
        """The library's object, newly loaded."""
        raise NotImplementedError

    def call(self, model: Any) -> Callable[[], Any]:
        """What is timed."""
        raise NotImplementedError

    def calibration(self) -> Any:
        """What `accelerate` calibrates int16 and int8 on."""
        raise NotImplementedError

    def answer(self, output: Any) -> tuple[Tensor, ...]:
        """A call's output as tensors to compare."""
        return (torch.as_tensor(output),)

    def tokens(self) -> Sequence[int]:
        """Real tokens of each sequence of a call."""
        raise NotImplementedError

    def encoder(self, model: Any) -> Any:
        """transformers' module whose forward gives last_hidden_state."""
        raise NotImplementedError

    def module(self, model: Any) -> torch.nn.Module:
        """The module with all of the library's weights."""
        raise NotImplementedError

    def output(self, encoder: Any, hidden: Tensor) -> Any:
        """What the encoder returns, of an engine's last_hidden_state."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooler, pooled = getattr(encoder, "pooler", None), None
        if pooler is not None:  # BERT's takes all positions, ALBERT's the first
            bert = hasattr(pooler, "activation")
            pooled = pooler(hidden) if bert else encoder.pooler_activation(pooler(hidden[:, 0]))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def folder(self) -> Path:
        """The model as sentence-transformers reads it; only of hosts that have sides in other environments."""
        raise NotImplementedError

    def inputs(self) -> Sequence[Any]:
        """What a call embeds or scores; only of such hosts."""
        raise NotImplementedError

    @cached_property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder(self.make()).config

    def model(self, side: str, threads: int) -> Any:
        """The library's object with the encoder of `side`."""
        model = self.make()
        if sides.engine(side) == sides.FAST:
            import albert_fast

            precision = sides.precision(side)
            if precision in (sides.FLOAT, sides.BF16):
                albert_fast.accelerate(model, precision="bf16" if precision == sides.BF16 else "fp32")
            else:
                calibration = None if "uncalibrated" in sides.options(side) else self.calibration()
                albert_fast.accelerate(model, precision=precision, calibration=calibration)
        elif side == "hf-bf16":
            self.module(model).bfloat16()
        elif sides.engine(side) != "hf":
            self._replace(self.encoder(model), side, threads)
        return model

    def _replace(self, encoder: Any, side: str, threads: int) -> None:
        """Let an engine compute the encoder's forward."""
        bind = engines.load(side, self._graph(encoder, side), engines.Settings(threads))

        def forward(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Any = None, **_: Any) -> Any:
            inputs = (input_ids, attention_mask, *([token_type_ids] if self.token_types else []))
            return self.output(encoder, torch.as_tensor(bind(*inputs)()))

        encoder.forward = forward

    def _graph(self, encoder: Any, side: str) -> Path:
        exported = artifacts.export(artifacts.saved(encoder), self.token_types)
        int8 = sides.precision(side) == sides.INT8
        if sides.engine(side) == "openvino":
            ir = artifacts.openvino_ir(exported)
            return artifacts.quantize_openvino(ir, self._batches()) if int8 else ir
        fused = artifacts.fuse(exported, encoder.config)
        return artifacts.quantize_onnx(fused) if int8 else fused

    def _batches(self) -> list[tuple[Tensor, ...]]:
        """Inputs that OpenVINO calibrates on, one sequence each."""
        raise NotImplementedError


def one_by_one(encoded: Mapping[str, Sequence[list[int]]], token_types: bool = False) -> list[tuple[Tensor, ...]]:
    """A tokenizer's rows as inputs of one sequence each: no padding takes part in any range."""
    batches: list[tuple[Tensor, ...]] = []
    for place, row in enumerate(encoded["input_ids"]):
        ids = torch.tensor([row])
        types = (torch.tensor([encoded["token_type_ids"][place]]),) if token_types else ()
        batches.append((ids, torch.ones_like(ids), *types))
    return batches
