"""One model as every engine's files: a checkpoint folder, ONNX graphs, OpenVINO's IR, and both engines' int8.

Each is made once for given weights, calibration data and versions, then kept in the temporary folder. No option is left
out that the makers recommend for a transformer on a CPU.
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from albert_fast import ALBERTConfig
from albert_fast.models import reference
from shared.engines import INPUTS, hugging_face

_OUTPUTS = ["last_hidden_state"]
_OPSET = 17


class _LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        hidden_states: Tensor = self.model(**dict(zip(INPUTS, inputs, strict=False))).last_hidden_state
        return hidden_states


def checkpoint(config: ALBERTConfig, state: Mapping[str, Tensor]) -> Path:
    """The folder of config.json and model.safetensors that albert_fast and transformers read."""

    def write(folder: Path) -> None:
        model = reference.ALBERTModel(config, add_pooling_layer=False)
        model.load_state_dict(state)
        model.save_pretrained(folder)

    digest = hashlib.sha256(repr(config).encode())
    for key, tensor in state.items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    return made_once(f"{digest.hexdigest()[:16]}-checkpoint", write)


def saved(encoder: nn.Module) -> Path:
    """The folder of an encoder of transformers, as its save_pretrained writes it."""

    def write(folder: Path) -> None:
        encoder.save_pretrained(folder)  # type: ignore[operator]

    digest = hashlib.sha256(encoder.config.to_json_string().encode())  # type: ignore[union-attr,operator]
    for key, tensor in encoder.state_dict().items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    return made_once(f"{digest.hexdigest()[:16]}-saved", write)


def export(folder: Path, token_types: bool = False) -> Path:
    """Hugging Face's model with eager attention as an ONNX graph, batch and length left open; token types as an input or 0.

    By torch's TorchScript exporter: the graph that its successor makes is not recognised by the fusions below.
    """

    def write(target: Path) -> None:
        ids = torch.full((2, 8), 5)
        inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))[: 3 if token_types else 2]
        names = list(INPUTS[: len(inputs)])
        model = _LastHiddenState(hugging_face(folder, "eager", torch.float32)).eval()
        path = target / "model.onnx"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's; a wrong trace shows in the comparison of outputs
            torch.onnx.export(
                model,
                inputs,
                path,
                input_names=names,
                output_names=_OUTPUTS,
                dynamic_axes={name: {0: "batch", 1: "sequence"} for name in [*names, *_OUTPUTS]},
                opset_version=_OPSET,
                dynamo=False,
            )
        share_initializers(path)

    kind = "onnx_types" if token_types else "onnx"
    return made_once(_name(folder, kind, "torch", "transformers", "onnx"), write) / "model.onnx"


def share_initializers(path: Path) -> None:
    """Let every layer read the shared weights themselves.

    The exporter gives all layers but the first an Identity of them, which quantisation does not take for a weight: only
    the first layer's products would become int8.
    """
    import onnx

    model = onnx.load(path)
    weights = {initializer.name for initializer in model.graph.initializer}
    copies = [node for node in model.graph.node if node.op_type == "Identity" and node.input[0] in weights]
    source = {node.output[0]: node.input[0] for node in copies}
    for node in copies:
        model.graph.node.remove(node)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = source.get(name, name)
    onnx.save(model, path)


def fuse(graph: Path, config: Any) -> Path:
    """The exported graph after ONNX Runtime's transformer optimizer: Attention, SkipLayerNormalization, FastGelu."""

    def write(target: Path) -> None:
        from onnxruntime.transformers.optimizer import optimize_model

        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        optimized = optimize_model(str(graph), model_type="bert", opt_level=0, **sizes)
        optimized.save_model_to_file(str(target / "model.onnx"))

    return made_once(_name(graph.parent, "fused", "onnxruntime"), write) / "model.onnx"


def quantize_onnx(graph: Path) -> Path:
    """ONNX Runtime's dynamic int8: weights per output channel, activations as they come."""

    def write(target: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            graph,
            target / "model.onnx",
            per_channel=True,
            reduce_range=False,
            weight_type=QuantType.QInt8,
            # Shape inference does not see through the optimizer's own operators.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )

    return made_once(_name(graph.parent, "int8", "onnxruntime"), write) / "model.onnx"


def openvino_ir(graph: Path) -> Path:
    """The exported graph in OpenVINO's own format, weights kept in float32."""

    def write(target: Path) -> None:
        import openvino

        openvino.save_model(openvino.Core().read_model(graph), target / "model.xml", compress_to_fp16=False)

    return made_once(_name(graph.parent, "ir", "openvino"), write) / "model.xml"


def quantize_openvino(ir: Path, calibration: Sequence[tuple[Tensor, ...]]) -> Path:
    """NNCF's int8 of a transformer: SmoothQuant, then ranges and bias correction from the calibration batches.

    Raises:
        RuntimeError: fewer products were quantised than the model has weights.
    """
    digest = hashlib.sha256()
    for tensor in (tensor for batch in calibration for tensor in batch):
        digest.update(tensor.numpy().tobytes())

    def write(target: Path) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(ir)
        feeds = [dict(zip(INPUTS, (tensor.numpy() for tensor in batch), strict=False)) for batch in calibration]
        quantized = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations, which GELU's output wants
            subset_size=len(feeds),
        )
        _require_int8(quantized)
        openvino.save_model(quantized, target / "model.xml", compress_to_fp16=False)

    return made_once(_name(ir.parent, f"nncf-{digest.hexdigest()[:8]}", "openvino", "nncf"), write) / "model.xml"


def _require_int8(model: Any) -> None:
    """Every product with a weight has a FakeQuantize or int8 constants on both sides."""
    wide = []
    for product in (node for node in model.get_ops() if node.get_type_name() == "MatMul"):
        weight = product.input_value(1).get_node()
        while weight.get_type_name() in ("Multiply", "Subtract", "Convert"):  # int8 constant, zero point and scale
            weight = weight.input_value(0).get_node()
        is_weight = weight.get_type_name() == "Constant"
        if is_weight and weight.get_element_type().size > 1:
            wide.append(product.get_friendly_name())
    if wide:
        raise RuntimeError(f"NNCF left {len(wide)} products with weights of more than 8 bits: {', '.join(wide[:3])}")


def _name(parent: Path, kind: str, *libraries: str) -> str:
    """A folder's name from its parent, its kind and the versions of the libraries that make it."""
    return "-".join([parent.name, kind, *map(importlib.metadata.version, libraries)])


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in our temporary folder, written aside and renamed, so that a kill leaves no half of it."""
    parent = Path(tempfile.gettempdir()) / f"albert_fast-benchmarks-{getpass.getuser()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    path = parent / name
    if not path.exists():
        aside = Path(tempfile.mkdtemp(prefix=".", dir=parent))
        try:
            write(aside)
            if not path.exists():  # another process may have made it meanwhile
                aside.rename(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return path
