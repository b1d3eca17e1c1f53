"""The other ways to run the same ALBERT on the same weights, each with the options that its makers recommend.

`Peers(...).bind(side, batch)` gives a callable without arguments whose result is last_hidden_state (B, S, H), a tensor
or an array. Engines are built once and shared by all shapes, except where a fixed shape makes them faster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_export
import torch
from shapes import FAST, Batch
from torch import Tensor, nn

from albert_fast import ALBERTConfig, ALBERTModel, reference
from albert_fast.testing.timing import Side, interleaved

Call = Callable[[], Any]
# What a side needs beside torch: module -> how to get it.
_NEEDS = {
    "hf-eager": ("transformers",),
    "hf-sdpa": ("transformers",),
    "hf-compile": ("transformers",),
    "onnxruntime": ("transformers", "onnx", "onnxruntime"),
    "openvino": ("transformers", "onnx", "openvino"),
}
_CPU_ONLY = ("onnxruntime", "openvino")


def why_not(side: str, device: torch.device) -> str | None:
    """Why `side` cannot take part on this machine; None where it can."""
    missing = [module for module in _NEEDS.get(side, ()) if importlib.util.find_spec(module) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'albert-fast[bench]'"
    if side in _CPU_ONLY and device.type != "cpu":
        return f"{side} is measured on CPUs only"
    return None


@dataclass
class Peers:
    """One set of random weights, and every engine that runs it.

    Every parameter is drawn, biases and LayerNorms too, so that an engine which dropped one would be found out.
    """

    config: ALBERTConfig
    device: torch.device
    dtype: torch.dtype
    threads: int

    @cached_property
    def state(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        state = reference.ALBERTModel(self.config, add_pooling_layer=False).state_dict()
        return {key: t + 0.02 * torch.randn(t.shape, generator=generator) for key, t in state.items()}

    def bind(self, side: str, batch: Batch) -> Call:
        """`side` with `batch` as its input, ready to be called again and again.

        Raises:
            Whatever the engine raises where it cannot load the model.
        """
        return _BINDERS[side](self, batch)

    def expected(self, batch: Batch) -> Tensor:
        """The float32 reference's last_hidden_state of the real tokens (T, H), one unpadded sequence after another."""
        model = self._ours(reference.ALBERTModel, torch.float32)
        with torch.inference_mode():
            rows = [model(ids[None, :n]).last_hidden_state[0] for ids, n in zip(batch.ids, batch.lengths, strict=True)]
        return torch.cat(rows)

    def fast(self, batch: Batch) -> Call:
        return _torch_call(self._fast, batch)

    def reference(self, batch: Batch) -> Call:
        return _torch_call(self._reference, batch)

    def hf_eager(self, batch: Batch) -> Call:
        return _torch_call(self._hf_eager, batch)

    def hf_sdpa(self, batch: Batch) -> Call:
        return _torch_call(self._hf_sdpa, batch)

    def hf_compile(self, batch: Batch) -> Call:
        """Compiled for this very shape; on CPUs with frozen weights, on GPUs with CUDA graphs and tuned products."""
        if self.device.type == "cuda":
            compiled = torch.compile(self._hf_sdpa, dynamic=False, mode="max-autotune")
        else:
            compiled = torch.compile(self._hf_sdpa, dynamic=False, options={"freezing": True})
        return _torch_call(compiled, batch)

    def onnxruntime(self, batch: Batch) -> Call:
        """The faster of two graphs: as exported, or fused by ONNX Runtime's transformer optimizer.

        The fused one merges query, key and value, but holds a copy of the shared layer's weights for every layer.
        """
        feeds = {"input_ids": batch.ids.numpy(), "attention_mask": batch.mask.numpy()}

        def call_of(session: Any) -> Call:
            return lambda: session.run(None, feeds)[0]

        calls = [call_of(session) for session in self._onnxruntime_sessions]
        trial = interleaved({str(i): Side(call) for i, call in enumerate(calls)}, rounds=1, warmup=1)
        return calls[min(range(len(calls)), key=lambda i: trial[str(i)][0])]

    def openvino(self, batch: Batch) -> Call:
        """The exported graph, reshaped to this batch before it is compiled."""
        import openvino

        core = openvino.Core()
        model = core.read_model(self._exported)
        model.reshape({"input_ids": list(batch.ids.shape), "attention_mask": list(batch.ids.shape)})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        feeds = {"input_ids": batch.ids.numpy(), "attention_mask": batch.mask.numpy()}
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)[0]

    @cached_property
    def _fast(self) -> nn.Module:
        return self._ours(ALBERTModel, self.dtype)

    @cached_property
    def _reference(self) -> nn.Module:
        return self._ours(reference.ALBERTModel, self.dtype)

    @cached_property
    def _hf_eager(self) -> nn.Module:
        return self._hugging_face("eager")

    @cached_property
    def _hf_sdpa(self) -> nn.Module:
        return self._hugging_face("sdpa")

    @cached_property
    def _exported(self) -> Path:
        return onnx_export.export(self._hugging_face("eager"), self.state)

    @cached_property
    def _onnxruntime_sessions(self) -> list[Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        files = (self._exported, onnx_export.fuse(self._exported, self.config))
        return [onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files]

    def _ours(self, model_class: Any, dtype: torch.dtype) -> nn.Module:
        model: nn.Module = model_class(self.config, add_pooling_layer=False)
        model.load_state_dict(self.state)
        return model.to(self.device, dtype).eval()

    def _hugging_face(self, attention: str) -> nn.Module:
        from transformers import AlbertConfig, AutoModel

        config = AlbertConfig(**self.config.to_dict())
        model: nn.Module = AutoModel.from_config(config, attn_implementation=attention, add_pooling_layer=False)
        model.load_state_dict(self.state)
        return model.to(self.device, self.dtype).eval()


def _torch_call(model: Callable[..., Any], batch: Batch) -> Call:
    @torch.inference_mode()
    def call() -> Tensor:
        hidden_states: Tensor = model(batch.ids, attention_mask=batch.mask).last_hidden_state
        return hidden_states

    return call


_BINDERS: Mapping[str, Callable[[Peers, Batch], Call]] = {
    FAST: Peers.fast,
    "reference": Peers.reference,
    "hf-eager": Peers.hf_eager,
    "hf-sdpa": Peers.hf_sdpa,
    "hf-compile": Peers.hf_compile,
    "onnxruntime": Peers.onnxruntime,
    "openvino": Peers.openvino,
}
