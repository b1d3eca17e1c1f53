"""Sorts the keywords of from_pretrained: those of transformers, this library's own, and fields of the configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.saving import config_path, missing_config
from ..checkpoints.weights import weights_names
from .config_attributes import DEFAULTS, HUB_ARGUMENTS
from .encoder_config import EncoderConfig

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# These change nothing about the model, whatever their value.
_HARMLESS = {
    "attn_implementation", "experts_implementation", "use_flash_attention_2", "low_cpu_mem_usage", "trust_remote_code",
    "weights_only", "resume_download", "mirror", "user_agent", "disable_mmap", "tqdm_class", "adapter_name", "max_memory",
    "offload_folder", "offload_buffers", "offload_state_dict", "allow_all_kernels", "_fast_init", "_from_auto",
    "_from_pipeline", "_commit_hash",
}  # fmt: skip
# Refused unless None, False or empty; the text says what to do instead.
_ELSEWHERE = {
    "quantization_config": "take precision='int8', 'int16' or 'fp8'",
    "load_in_8bit": "take precision='int8'",
    "load_in_4bit": "take precision='int8'; there are no kernels for 4 bits",
    "from_tf": "convert the checkpoint first: `albert-fast convert` reads Google's",
    "from_flax": "convert the checkpoint with transformers first",
    "gguf_file": "convert the checkpoint to safetensors first",
    "adapter_kwargs": "load the adapter with peft, around the model",
    "generation_config": "this model does not generate text",
    "tp_plan": "a model runs on one device",
    "tp_size": "a model runs on one device",
    "device_mesh": "a model runs on one device",
    "distributed_config": "a model runs on one device",
    "use_kernels": "take backend='auto'",
    "kernel_config": "take backend='auto'",
    "fusion_config": "take backend='auto'",
}


@dataclass
class LoadArguments:
    """`from_pretrained`'s keywords, sorted by the code that obeys them.

    precision: None where the caller named none. hub: for `weights.resolve`. changes: fields and keys of the configuration.
    """

    precision: str | None
    device: torch.device | str | None
    from_file: bool = False  # dtype="auto"
    hub: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    add_pooling_layer: bool | None = None
    config: Any = None
    state_dict: Mapping[str, Tensor] | None = None
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    ignore_mismatched_sizes: bool = False
    output_loading_info: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def sorted(cls, bare: bool, precision: str | None, device: Any, given: dict[str, Any]) -> LoadArguments:
        """Sort the keywords `given`; `bare` says whether the model is an encoder without a head.

        Raises:
            TypeError: keywords that contradict each other or have no meaning here; says what to do instead.
            ValueError: a value that cannot be obeyed.
        """
        given = {name: value for name, value in given.items() if name not in _HARMLESS}
        for name in given.keys() & _ELSEWHERE.keys():
            if given.pop(name) not in (None, False, {}):
                raise TypeError(f"from_pretrained takes no {name!r}: {_ELSEWHERE[name]}")
        arguments = cls(precision, device)
        for name in ("dtype", "torch_dtype"):
            arguments._set_dtype(name, given.pop(name, None))
        arguments._set_device(given.pop("device_map", None))
        if (token := given.pop("use_auth_token", None)) is not None:
            given.setdefault("token", token)
        arguments.hub = {name: given.pop(name) for name in (*HUB_ARGUMENTS, "proxies") if name in given}
        arguments.names = weights_names(given.pop("use_safetensors", None), given.pop("variant", None))
        if "add_pooling_layer" in given:
            if not bare:
                raise TypeError("add_pooling_layer is for an encoder: a head decides itself whether it pools")
            arguments.add_pooling_layer = given.pop("add_pooling_layer")
        for name in ("config", "state_dict", "key_mapping", "ignore_mismatched_sizes", "output_loading_info"):
            if (value := given.pop(name, None)) is not None:
                setattr(arguments, name, value)
        arguments.changes = given
        return arguments

    def _set_dtype(self, name: str, dtype: Any) -> None:
        if dtype is None:
            return
        if dtype == "auto":
            self.from_file = self.precision is None
            return
        named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        wanted = next((precision for precision, known in FLOAT_DTYPES.items() if known == named), None)
        if wanted is None:
            known = ", ".join(f"torch.{str(known).removeprefix('torch.')}" for known in FLOAT_DTYPES.values())
            raise ValueError(f"{name}={dtype!r}: models load in {known}, 'auto', or in a precision such as 'int8'")
        if self.precision not in (None, wanted):
            raise TypeError(f"{name}={dtype!r} and precision={self.precision!r} contradict each other: give one")
        self.precision = wanted

    def _set_device(self, device_map: Any) -> None:
        if device_map is None:
            return
        device = device_map
        if isinstance(device_map, Mapping):
            places = list(dict.fromkeys(map(str, device_map.values())))
            if len(places) != 1 or places[0] == "disk":
                raise ValueError(f"device_map={device_map!r}: a model runs on one device: device_map={{'': 'cuda:0'}}")
            device = next(iter(device_map.values()))
        if device in ("auto", "balanced", "balanced_low_0", "sequential"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(device, int):
            device = torch.device("cuda", device)
        if self.device is not None and torch.device(self.device) != torch.device(device):
            raise TypeError(f"device_map={device_map!r} and device={self.device!r} contradict each other: give one")
        self.device = torch.device(device)

    def configuration(self, path: Path | None, kind: type[EncoderConfig]) -> EncoderConfig:
        """The configuration of the model, of the class `kind`: `config` if one was given, else the checkpoint's, with `changes`.

        Raises:
            FileNotFoundError: there is none. TypeError: a change that is no field; suggests the closest one.
        """
        if self.config is not None:
            config = as_config(self.config, kind)
        elif path is None:
            raise TypeError("from_pretrained(None) needs config= and state_dict=")
        else:
            file = config_path(path)
            if not file.is_file():
                raise missing_config(path)
            config = kind.from_json_file(file)
        known = {
            *_HARMLESS,
            *_ELSEWHERE,
            *HUB_ARGUMENTS,
            *DEFAULTS,
            *vars(self),
            "backend",
            "calibration",
            "device_map",
        }
        for name in self.changes:
            close = difflib.get_close_matches(name, known, 1, 0.8)
            if not config.has_field(name) and not config.has_key(name) and close:
                raise TypeError(f"from_pretrained takes no {name!r}; did you mean {close[0]!r}?")
        return config.replace(**self.changes)

    def chosen_precision(self, config: EncoderConfig, state: Mapping[str, Tensor], held: str | None) -> str:
        """The precision to load in: the one asked for, else that of a checkpoint of integers, else float32."""
        if self.precision is not None:
            return self.precision
        if held is not None:
            return held
        if not self.from_file:
            return "fp32"
        floats = (tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        dtype = config.dtype or next(floats, torch.float32)
        return next((precision for precision, known in FLOAT_DTYPES.items() if known == dtype), "fp32")


def as_config(config: Any, kind: type[EncoderConfig]) -> EncoderConfig:
    """A configuration of the class `kind` from one, from transformers', a dictionary, or the path of a folder or config.json."""
    if isinstance(config, kind):
        return config.replace()
    if isinstance(config, (str, Path)):
        loaded: EncoderConfig = kind.from_pretrained(config)
        return loaded
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be an {kind.__name__}, a dictionary or a path, got {type(config).__name__}")
    return kind.from_dict(config)
