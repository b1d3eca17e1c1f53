"""Runs one library as its users call it, in that library's own environment; peer_sides.py starts it and asks.

Nothing of this environment but shared/workers.py is imported. Requests are the methods of `Peer`.
"""

from __future__ import annotations

import asyncio
import csv
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

os.environ["HF_HUB_OFFLINE"] = "1"  # every file is in a local folder
os.environ["DO_NOT_TRACK"] = "1"

from shared.workers import serve

_BATCH_SIZE = 32
_O3 = "model_O3.onnx"


class Peer:
    """A library, a model and its inputs. Inputs are texts, or for a cross-encoder pairs of texts."""

    def __init__(self) -> None:
        self._call: Callable[[], Any] | None = None
        self._answer: Any = None

    def versions(self, packages: list[str]) -> dict[str, str | None]:
        """The installed version of each package; None where it is missing."""
        found: dict[str, str | None] = dict.fromkeys(packages)
        for package in packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def make(self, files: str, source: str, target: str, pairs: bool, calibration: list[str]) -> None:
        """Copy the model's folder `source` to `target`, with an engine's files: "onnx" or "openvino", int8 too."""
        with tempfile.TemporaryDirectory() as aside:
            self._export(files, source, aside, pairs, calibration)
            shutil.copytree(source, target, dirs_exist_ok=True)
            shutil.copytree(Path(aside, files), Path(target, files))
        if not pairs:
            _limit_length(Path(target))

    def _export(self, files: str, source: str, target: str, pairs: bool, calibration: list[str]) -> None:
        import sentence_transformers as st

        model = _sentence_transformer(source, pairs, files, {"export": True})
        model.save_pretrained(target)
        if files == "onnx":
            st.export_optimized_onnx_model(model, "O3", target)
            st.export_dynamic_quantized_onnx_model(model, _int8_instructions(), target)
            return
        from optimum.intel import OVQuantizationConfig

        texts = Path(target, "calibration")
        texts.mkdir()
        with open(texts / "train.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in calibration)])
        st.export_static_quantized_openvino_model(
            model,
            OVQuantizationConfig(num_samples=len(calibration)),
            target,
            dataset_name=str(texts),
            dataset_config_name="default",
            dataset_split="train",
            column_name="text",
        )

    def load(self, side: str, folder: str, inputs: list[Any], pairs: bool, threads: int) -> None:
        """Load the model for `side`; calls then embed or score `inputs`."""
        import torch

        torch.set_num_threads(threads)
        engine, _, option = side.partition("-")
        if engine == "fastembed":
            self._call = _fastembed(folder, inputs, threads)
        elif engine == "infinity":
            self._call = _infinity(folder, inputs)
        else:
            model = _sentence_transformer(folder, pairs, *_backend(option, Path(folder), threads))
            run = model.predict if pairs else model.encode
            self._call = lambda: run(inputs, batch_size=_BATCH_SIZE, show_progress_bar=False)

    def call(self) -> None:
        """What is timed."""
        assert self._call is not None
        self._answer = self._call()

    def save(self, path: str) -> None:
        """Write the last call's answer, (N, D) or (N,), as .npy."""
        import numpy as np

        np.save(path, np.asarray(self._answer, np.float32))


def _sentence_transformer(folder: str, pairs: bool, backend: str, model_kwargs: dict[str, Any]) -> Any:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    more = {"provider": "CPUExecutionProvider"} if backend == "onnx" else {}
    kind = CrossEncoder if pairs else SentenceTransformer
    return kind(folder, device="cpu", backend=backend, model_kwargs={**model_kwargs, **more})


def _backend(option: str, folder: Path, threads: int) -> tuple[str, dict[str, Any]]:
    """The backend and model_kwargs of onnx-o3, onnx-int8, openvino, openvino-bf16 or openvino-int8."""
    backend, _, kind = option.partition("-")
    if backend == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        name = _O3 if kind == "o3" else next(folder.glob("onnx/model_q*int8*.onnx")).name
        return backend, {"file_name": f"onnx/{name}", "session_options": options}
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if kind != "int8":
        # By itself OpenVINO takes bfloat16 where the CPU has instructions for it, and float32 elsewhere.
        config["INFERENCE_PRECISION_HINT"] = "bf16" if kind == "bf16" else "f32"
    name = "openvino_model_qint8_quantized.xml" if kind == "int8" else "openvino_model.xml"
    return backend, {"file_name": f"openvino/{name}", "ov_config": config}


def _fastembed(folder: str, texts: list[str], threads: int) -> Callable[[], Any]:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    size = json.loads(Path(folder, "config.json").read_text())["hidden_size"]
    TextEmbedding.add_custom_model(
        model="local/model",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/model"),
        dim=size,
        model_file=f"onnx/{_O3}",
    )
    model = TextEmbedding("local/model", specific_model_path=folder, threads=threads)
    return lambda: list(model.embed(texts, batch_size=_BATCH_SIZE))


def _infinity(folder: str, texts: list[str]) -> Callable[[], Any]:
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    loop = asyncio.new_event_loop()
    arguments = EngineArgs(
        model_name_or_path=folder, engine="torch", device="cpu", batch_size=_BATCH_SIZE, model_warmup=False
    )
    engine = AsyncEmbeddingEngine.from_args(arguments)
    loop.run_until_complete(engine.astart())
    return lambda: loop.run_until_complete(engine.embed(sentences=texts))[0]


def _int8_instructions() -> str:
    """The int8 configuration that sentence-transformers' documentation names for this CPU."""
    cpu = Path("/proc/cpuinfo")
    return "avx512_vnni" if cpu.exists() and "avx512_vnni" in cpu.read_text() else "avx2"


def _limit_length(folder: Path) -> None:
    """Let fastembed cut texts where sentence-transformers does; it reads the tokenizer's limit alone."""
    path = folder / "tokenizer_config.json"
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))


if __name__ == "__main__":
    peer = Peer()
    serve(lambda do, **arguments: getattr(peer, do)(**arguments))
