"""from_pretrained and save_pretrained: what every model of `reference.py` and `modeling.py` inherits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import dispatch
from .config import ALBERTConfig
from .weights import config_path, load_checkpoint, load_into, rename_old_names, resolve, save_checkpoint

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What transformers' from_pretrained takes under another name, or not at all.
_ELSEWHERE = {
    "dtype": "take precision='bf16' or the like",
    "torch_dtype": "take precision='bf16' or the like",
    "device_map": "take device='cuda'",
    "attn_implementation": "take backend='reference' for plain attention",
    "output_attentions": "it is an argument of forward",
    "output_hidden_states": "it is an argument of forward",
}
# How config.json names checkpoints with integer layers, which only this library reads.
QUANT_METHOD = "albert_fast"
_QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8}, "int16": {"bits": 16}, "fp8": {"bits": 8, "format": "float8_e4m3fn"}
}  # fmt: skip


def _config_dict(model: PretrainedMixin) -> dict[str, Any]:
    """What transformers expects in config.json; the dtype is that of the file beside it."""
    values = model.config.to_dict()
    values.pop("torch_dtype", None)
    values.pop("quantization_config", None)
    if model.quantized is not None:
        values["quantization_config"] = {"quant_method": QUANT_METHOD, **_QUANTIZED[model.quantized]}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {**values, "architectures": [type(model).__name__.replace("ALBERT", "Albert")], "dtype": dtype}


def _quantized(config: ALBERTConfig, path: Path) -> str | None:
    """The precision of the weights beside a config.json, where they were rounded by us."""
    values = config.extra.get("quantization_config")
    if values is None:
        return None
    for precision, how in _QUANTIZED.items():
        if values == {"quant_method": QUANT_METHOD, **how}:
            return precision
    raise ValueError(f"{path}: quantization_config {values!r} is not one of this library's")


Model = TypeVar("Model", bound="PretrainedMixin")
# Batches as a model takes them: (input_ids, attention_mask), (B, S) each, a tokenizer's mapping of both, or input_ids alone.
Calibration = Iterable[tuple[Tensor, Tensor | None] | Mapping[str, Tensor] | Tensor]


class _Undrawn(TorchFunctionMode):
    """Inside, modules draw no random weights: those that a checkpoint is about to fill stay as memory comes, untouched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class PretrainedMixin(nn.Module):
    """from_pretrained and save_pretrained, for every model of `reference.py` and `modeling.py`.

    `prefix` is what the encoder's names begin with. A bare model (prefix "") takes `add_pooling_layer` as its second
    argument.
    """

    prefix: ClassVar[str] = "albert."

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        if not isinstance(config, ALBERTConfig):
            kind = type(config).__name__
            raise TypeError(
                f"config must be an ALBERTConfig, got {kind}: ALBERTConfig.from_dict(config.to_dict()) is one"
            )
        self.config = config

    def init_weights(self) -> None:
        """Linear and Embedding weights from N(0, initializer_range), zero biases, a zero row for the pad token."""
        done = set[int]()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and id(module.weight) not in done:
                done.add(id(module.weight))  # a decoder is tied to the embeddings, which come first
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])
                elif isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def check_backend(cls, backend: str, precision: str) -> None:
        """Raises ValueError, with the reason, for what this class cannot run; called before anything is read."""
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend {backend!r}: this model is plain PyTorch; it takes 'auto' or 'reference'")
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision {precision!r}: this model is plain PyTorch; it takes one of {', '.join(PRECISIONS)}"
            )

    def use_backend(self, backend: str, precision: str, calibration: Calibration | None = None) -> None:
        """Called by from_pretrained once the weights are in place, on their device: float32, or integers already."""
        self.to(PRECISIONS[precision])

    @property
    def quantized(self) -> str | None:
        """The precision that the layers' weights were rounded to, "int8" say; None where they are floats."""
        return None

    def expect_quantized(self, precision: str) -> None:
        """Make room for the rounded weights of a checkpoint."""
        raise ValueError(f"{type(self).__name__} is plain PyTorch and does not run {precision} weights")

    def wrong_with(self, key: str, tensor: Tensor) -> str | None:
        """What is wrong with a checkpoint's tensor of the right name, shape and dtype; None where nothing is."""
        return None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_hub_id: str | Path,
        *,
        backend: str = "auto",
        precision: str = "fp32",
        device: str | torch.device | None = None,
        allow_missing_head: bool = False,
        calibration: Calibration | None = None,
        **config_overrides: Any,
    ) -> Model:
        """The model of a checkpoint folder, weights file or hub id, in eval mode.

        Float16 and bfloat16 checkpoints become float32 parameters unless `precision` says otherwise. A bare model has a
        pooler if the checkpoint has one. `allow_missing_head` starts a new task: see `load_into`. `config_overrides`
        are fields of ALBERTConfig.

        "int8", "int16" (on a CPU) and "fp8" (on a GPU from the H100 on) round the layers' weights on the way in.
        `calibration`, a list of (input_ids, attention_mask) (B, S) or of what a tokenizer returns, as the model will see
        them, decides how, where that errs less; without it int8 is calibrated on random ids, the others not at all.
        `albert_fast.quantized_checkpoint.quantize_checkpoint` stores the result. On a GPU the rest of such a
        model is bfloat16. What `save_pretrained` makes of it loads again in the same precision, as it is, on any device
        that has it.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: a checkpoint that does not fit, a calibration where nothing is rounded.
            BackendUnavailableError: a device, backend or precision that cannot run here; says why, and what can.
            TypeError: an override that is no field of the configuration.
        """
        cls.check_backend(backend, precision)
        dispatch.check_device(device)
        for name in config_overrides.keys() & _ELSEWHERE:
            raise TypeError(f"from_pretrained takes no {name!r}: {_ELSEWHERE[name]}")
        if calibration is not None and precision not in _QUANTIZED:
            raise ValueError(f"calibration is for precision='int8', 'int16' and 'fp8', not for {precision!r}")
        path = resolve(path_or_hub_id)
        config_file = config_path(path if path.is_dir() else path.parent)
        if not config_file.is_file():
            raise FileNotFoundError(
                f"{path}: no config.json in {config_file.parent.resolve()}, where a checkpoint has it"
            )
        config = ALBERTConfig.from_json_file(config_file).replace(**config_overrides)
        held = _quantized(config, config_file)
        if held is not None and precision != held:
            raise ValueError(f"{path}: holds {held} weights: load it with precision={held!r}, not {precision!r}")
        if held is not None and calibration is not None:
            raise ValueError(f"{path}: holds {held} weights, which were rounded already: there is nothing to calibrate")
        state = rename_old_names(load_checkpoint(path), cls.prefix)
        arguments = () if cls.prefix else ("pooler.weight" in state,)
        # A head that the checkpoint may lack starts from random weights, and so does all of such a model at first.
        with contextlib.nullcontext() if allow_missing_head else _Undrawn():
            try:
                model = cls(config, *arguments).float()  # whatever torch.set_default_dtype says
            except (RuntimeError, MemoryError, TypeError) as error:  # torch cannot allocate it, or count its elements
                raise ValueError(f"{config_file}: a model of these sizes cannot be made here: {error}") from error
        if held is not None:
            model.expect_quantized(held)
        load_into(model, state, allow_missing_head=allow_missing_head, check=model.wrong_with)
        model.to(device)
        model.use_backend(backend, precision, calibration)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors: see `save_checkpoint`. transformers reads them, unless layers are integers."""
        save_checkpoint(self, _config_dict(self), directory)
