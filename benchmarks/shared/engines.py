"""Each way to run the model, from files on disk to answers, with the options that its makers recommend.

`load` is what is timed as loading, and what the comparison in one process uses too. Everything is imported inside, for
`cpu/load_engine.py` measures what one engine costs in a process without the others.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import sides

Call = Callable[[], Any]
# The inputs of graphs, in the order of a Bind's arguments; those without token types take them for 0.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# (input_ids, attention_mask) and for such a graph token_type_ids, (B, S) int64, tensors or arrays -> a call that gives
# last_hidden_state (B, S, H)
Bind = Callable[..., Call]

# Tokens with padding, up to which our launches may take a GPU longer than their work, and ours replays CUDA graphs.
_SMALL = 4096
_IMPORTS = {
    "albert_fast": "albert_fast.models.albert",
    "reference": "albert_fast.models.reference",
    "hf": "transformers",
    "torch": "transformers",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}


@dataclass(frozen=True)
class Settings:
    """What a user chooses beside the files.

    `precision` is that of the sides that compute with floats. A fixed `shape` (B, S) is what OpenVINO compiles for. Of a
    batch known to be `dense` those in PyTorch are given no mask.
    """

    threads: int
    shape: tuple[int, int] | None = None
    device: str = "cpu"
    precision: str = "fp32"
    dense: bool = False


def import_engine(side: str, settings: Settings) -> None:
    """Import what `load` will need, and let torch use no other threads."""
    importlib.import_module(_IMPORTS[sides.engine(side)])
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(settings.threads)


def load(side: str, path: Path, settings: Settings) -> Bind:
    """The engine of `side` on `path`: a checkpoint folder, an ONNX graph or an IR.

    Raises:
        Whatever the engine raises where it cannot load the model.
    """
    engine = sides.engine(side)
    if engine == "onnxruntime":
        return _onnxruntime(path, settings)
    if engine == "openvino":
        return _openvino(path, settings)
    import torch

    model: Any
    if engine == "albert_fast":
        from albert_fast import ALBERTModel

        precision = settings.precision if sides.precision(side) == sides.FLOAT else sides.precision(side)
        model = ALBERTModel.from_pretrained(path, precision=precision, device=settings.device)
        graphs = sides.GRAPHS in sides.options(side)
        small = settings.shape is not None and math.prod(settings.shape) <= _SMALL
        if settings.device == "cuda" and (graphs or small):
            model.execution.warmup()  # graphs are captured on demand, in the calls that are not counted
            if graphs:
                return replayed(model, _torch(model, settings.dense))
    elif engine == "reference":
        from albert_fast.models import reference

        model = reference.ALBERTModel.from_pretrained(path, precision=settings.precision, device=settings.device)
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.precision]
        sdpa = maskless_sdpa() if settings.dense else "sdpa"
        attention = "eager" if "eager" in sides.options(side) else sdpa
        model = hugging_face(path, attention, dtype).to(settings.device)
        if engine == "torch":
            from shared.torch_encoder import TransformerEncoder

            model = TransformerEncoder(model).to(settings.device)
        elif "compile" in sides.options(side):
            model = _compiled(model, settings.device, tuned="default" not in sides.options(side))
    return _torch(model, settings.dense)


def replayed(model: Any, bind: Bind) -> Bind:
    """`bind` of a model that was warmed up, for calls that are replays of a CUDA graph.

    Raises:
        RuntimeError: when it is bound to a batch for which there is no graph, with the reason.
    """
    import torch

    from albert_fast import explain

    def bound(input_ids: Any, attention_mask: Any) -> Call:
        call = bind(input_ids, attention_mask)
        for _ in range(2):  # a graph is captured the second time
            call()
        with torch.inference_mode():
            plan = explain(model, input_ids, attention_mask).summary
        if "a replay of the CUDA graph" not in plan:
            raise RuntimeError(plan)
        return call

    return bound


def maskless_sdpa() -> str:
    """The name of transformers' sdpa without masks.

    Some versions (5.17) make a mask even where they are given none while torch compiles them, and with a mask torch's sdpa
    has no flash attention. For an attention that is registered by another name they make none.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask"


def hugging_face(path: Path, attention: str, dtype: Any) -> Any:
    """transformers' encoder, without a pooler, in eval mode."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path, attn_implementation=attention, dtype=dtype, add_pooling_layer=False)
    return model.eval()


def _compiled(model: Any, device: str, tuned: bool) -> Any:
    """For the shape that comes first; `tuned`: on CPUs with frozen weights, on GPUs with CUDA graphs and tuned products."""
    import torch

    if not tuned:
        return torch.compile(model, dynamic=False)
    if device == "cpu":
        return torch.compile(model, dynamic=False, options={"freezing": True})
    return torch.compile(model, dynamic=False, mode="max-autotune")


def _torch(model: Callable[..., Any], dense: bool) -> Bind:
    import torch

    def bind(input_ids: Any, attention_mask: Any) -> Call:
        ids, mask = torch.as_tensor(input_ids), None if dense else torch.as_tensor(attention_mask)

        @torch.inference_mode()
        def call() -> Any:
            return model(ids, attention_mask=mask).last_hidden_state

        return call

    return bind


def _onnxruntime(path: Path, settings: Settings) -> Bind:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def bind(*inputs: Any) -> Call:
        feeds = dict(zip(INPUTS, map(np.asarray, inputs), strict=False))
        return lambda: session.run(None, feeds)[0]

    return bind


def _openvino(path: Path, settings: Settings) -> Bind:
    """Compiled for `settings.shape`, or for any."""
    import numpy as np
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if settings.shape is not None:
        model.reshape({name: list(settings.shape) for name in ("input_ids", "attention_mask")})
    chosen = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # of what is not int8
        "INFERENCE_NUM_THREADS": settings.threads,
    }
    compiled = core.compile_model(model, "CPU", chosen)

    def bind(*inputs: Any) -> Call:
        # A request for each input: its output stays in the request's own memory until its next call.
        request = compiled.create_infer_request()
        feeds = dict(zip(INPUTS, map(np.asarray, inputs), strict=False))
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)[0]

    return bind
