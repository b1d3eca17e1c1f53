"""from_pretrained and save_pretrained, for every model of this library."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoints import sentence_modules
from ..checkpoints.saving import config_path, folder_of, save_checkpoint
from ..checkpoints.weights import load_checkpoint, load_into, rename_old_names, resolve, tied
from ..layers.packed import packed_in
from ..quantization.calibration import Calibration
from ..runtime import dispatch
from .encoder_config import EncoderConfig
from .execution import EagerExecution
from .load_arguments import LoadArguments, as_config
from .model_methods import ModelMethods

# How config.json names checkpoints with integer layers, which only this library reads.
QUANT_METHOD = "albert_fast"
_QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int16": {"bits": 16},
    "fp8": {"bits": 8, "format": "float8_e4m3fn"},
}


def config_contents(model: PretrainedMixin) -> dict[str, Any]:
    """The contents of config.json as transformers expects them; dtype is that of the weights file."""
    values = model.config.to_dict()
    values.pop("torch_dtype", None)
    values.pop("quantization_config", None)
    if (quantized := model.execution.quantized) is not None:
        values["quantization_config"] = {"quant_method": QUANT_METHOD, **_QUANTIZED[quantized]}
    values["vocab_size"] = model.get_input_embeddings().weight.shape[0]  # of a table that was replaced by hand
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {**values, "architectures": [model.own_family.hf_name(type(model).__name__)], "dtype": dtype}


def held_precision(config: EncoderConfig, path: Path) -> str | None:
    """The precision of a checkpoint whose weights this library rounded; None for another checkpoint."""
    values = config.extra.get("quantization_config")
    if values is None:
        return None
    for precision, how in _QUANTIZED.items():
        if values == {"quant_method": QUANT_METHOD, **how}:
            return precision
    raise ValueError(f"{path}: quantization_config {values!r} is not one of this library's")


Model = TypeVar("Model", bound="PretrainedMixin")


class Undrawn(TorchFunctionMode):
    """Inside, modules draw no random weights, because a checkpoint is about to fill them: their memory stays untouched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class PretrainedMixin(ModelMethods):
    """Loads and saves every model of this library, fast or reference, in Hugging Face's layout.

    The encoder's parameters are named `prefix` + their name. A bare model (prefix "") takes `add_pooling_layer` as its second
    argument.
    """

    prefix: ClassVar[str] = ModelMethods.family.prefix
    execution_class: ClassVar[type[EagerExecution]] = EagerExecution

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        wanted = self.config_class.__name__
        if not isinstance(config, self.config_class):
            kind = type(config).__name__
            raise TypeError(f"config must be an {wanted}, got {kind}: {wanted}.from_dict(config.to_dict()) is one")
        self.config = config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in every Module; but a model that cannot move, see `execution.drop_float`, refuses before any part has moved."""
        for packed in packed_in(self):
            packed.check_stays(fn)
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **options: Any) -> Any:
        """As in every Module, but a parameter with two names, such as a tied decoder's, is a copy under its second name.

        Other libraries write state_dicts to files: safetensors refuses tensors that share memory, accelerate drops one of them.
        """
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **options)
        for alias, _ in tied(self):
            if not keep_vars and prefix + alias in state:
                state[prefix + alias] = state[prefix + alias].clone()
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """A file may hold either of a parameter's two names."""
        for alias, first in tied(self):
            for there, absent in ((first, alias), (alias, first)):
                if prefix + there in state_dict:
                    state_dict.setdefault(prefix + absent, state_dict[prefix + there])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def execution(self) -> Any:
        """How the model runs: backend, precision, CUDA graphs, recomputation. See `models/execution.py`."""
        return self.execution_class(self)

    def warmup(self, shapes: Iterable[tuple[int, int]] = ()) -> None:
        """Do the work of first calls ahead, for batches of `shapes` (B, S): see `execution.warmup`."""
        self.execution.warmup(shapes)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_hub_id: str | Path | None,
        *,
        backend: str = "auto",
        precision: str | None = None,
        device: str | torch.device | None = None,
        allow_missing_head: bool = False,
        calibration: Calibration | None = None,
        keep_float: bool = True,
        **arguments: Any,
    ) -> Any:
        """The model of a checkpoint folder, weights file or hub id, in eval mode.

        Without `precision` a checkpoint of integers loads as it is, and any other as float32. A bare model has a pooler if
        the checkpoint has one, or as `add_pooling_layer` says. `allow_missing_head` starts a new task: see `load_into`.

        "int8", "int16" (on a CPU) and "fp8" (on a GPU from the H100 on) round the layers' weights while loading.
        `calibration`, a list of (input_ids, attention_mask) (B, S) or of a tokenizer's results, should look like the model's
        future input; the rounding is fitted to it where that errs less. Without it int8 is fitted to random ids, the others to
        nothing.
        `albert_fast.tasks.quantize.quantize_checkpoint` stores the result. On a GPU the rest of a rounded
        model is bfloat16. A checkpoint that `save_pretrained` wrote loads again in its precision, unchanged, on any device
        that has it.

        `keep_float=False` keeps one copy of the layers' weights instead of two, see `execution.drop_float`.

        `arguments` are transformers' own:
            config, state_dict: in place of the checkpoint's; with both, path_or_hub_id may be None.
            dtype or torch_dtype: another way to say `precision`; "auto" is the checkpoint's. device_map: one device.
            revision, cache_dir, token, local_files_only, force_download, subfolder, variant, use_safetensors: which files.
            ignore_mismatched_sizes: tensors of other shapes start from random weights, with a warning.
            key_mapping: pattern -> replacement, for the names in the checkpoint.
            output_loading_info: return (model, {"missing_keys": ..., "unexpected_keys": ..., "mismatched_keys": ...}).
            fields of the configuration, such as num_labels, id2label and output_hidden_states.
        attn_implementation, low_cpu_mem_usage, trust_remote_code and the like change nothing here.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: a checkpoint that does not fit, a calibration where nothing is rounded.
            BackendUnavailableError: a device, backend or precision that cannot run here; says why, and what can.
            TypeError: an argument that is unknown, or means nothing here; says what to do.
        """
        read = LoadArguments.sorted(not cls.prefix, precision, device, arguments)
        cls.execution_class.check(backend, read.precision or "fp32")
        dispatch.check_device(read.device)
        path = None if path_or_hub_id is None else resolve(path_or_hub_id, names=read.names, **read.hub)
        config = read.configuration(path, cls.config_class)
        config.name_or_path = "" if path_or_hub_id is None else path_or_hub_id
        held = held_precision(config, path or Path("config"))
        if path is None and read.state_dict is None:
            raise TypeError("from_pretrained(None) needs config= and state_dict=")
        found = read.state_dict if read.state_dict is not None else load_checkpoint(path or "", read.names)
        state = cls.own_tensors(rename_old_names(found, cls.family, cls.prefix, read.key_mapping), config)
        precision = read.chosen_precision(config, state, held)
        if held is not None and precision != held:
            raise ValueError(f"{path}: holds {held} weights: load it with precision={held!r}, not {precision!r}")
        if calibration is not None and precision not in _QUANTIZED:
            raise ValueError(f"calibration is for precision='int8', 'int16' and 'fp8', not for {precision!r}")
        if held is not None and calibration is not None:
            raise ValueError(f"{path}: holds {held} weights, which were rounded already: there is nothing to calibrate")
        pools = cls.family.pooler in state if read.add_pooling_layer is None else read.add_pooling_layer
        # Tensors that the checkpoint may lack start from random weights; so all of the model is drawn at first.
        partial = allow_missing_head or read.ignore_mismatched_sizes
        with contextlib.nullcontext() if partial else Undrawn():
            try:
                # Float32, whatever torch.set_default_dtype says.
                model = cls(config, *(() if cls.prefix else (pools,))).float()
            except (RuntimeError, MemoryError, TypeError) as error:  # torch cannot allocate it, or count its elements
                where = "config" if path is None else config_path(path)
                raise ValueError(f"{where}: a model of these sizes cannot be made here: {error}") from error
        if held is not None:
            model.execution.expect_quantized(held)
        info = load_into(
            model,
            state,
            cls.family,
            allow_missing_head=allow_missing_head,
            ignore_mismatched_sizes=read.ignore_mismatched_sizes,
            check=model.execution.wrong_with,
        )
        model.to(read.device)
        model.execution.use(backend, precision, calibration)
        if not keep_float:
            model.execution.drop_float()
        if not cls.prefix and path is not None:
            _warn_of_pooling(path)
        return (model.eval(), info) if read.output_loading_info else model.eval()

    @classmethod
    def own_tensors(cls, state: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
        """The tensors of a checkpoint under the model's names, where a file may hold them otherwise.

        Raises:
            ValueError: tensors that contradict the configuration.
        """
        return state

    @classmethod
    def from_model(
        cls: type[Model],
        model: Any,
        *,
        share: bool = False,
        backend: str = "auto",
        precision: str | None = None,
        device: str | torch.device | None = None,
        **arguments: Any,
    ) -> Any:
        """A model with the configuration and the weights of `model`, which is already in memory, in eval mode.

        Args:
            model: a model of transformers, or of this library, of the same family, with a head or without.
            share: False copies the weights. True takes the very Parameters of `model`, so that nothing is copied and training one
                model trains both; `precision`, `device` and `calibration` are then as they are, and cannot be given.
            backend, precision, device, arguments: as `from_pretrained` takes them; precision and device are by default the
                model's own.

        Raises:
            TypeError: an object that has no configuration or no state_dict; an argument that `share` has no use for.
            ValueError: a model of another family, or whose tensors do not fit.
        """
        if getattr(model, "config", None) is None or not isinstance(model, nn.Module):
            raise TypeError(f"expected a model with a configuration, got {type(model).__name__}")
        if not share:
            if precision is None and "dtype" not in arguments and "torch_dtype" not in arguments:
                arguments["dtype"] = next(p.dtype for p in model.parameters() if p.is_floating_point())
            where = next(model.parameters()).device if device is None else device
            state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
            loading = {"backend": backend, "precision": precision, "device": where, **arguments}
            return cls.from_pretrained(None, config=model.config, state_dict=state, **loading)
        for name in ("precision", "device"):
            if {"precision": precision, "device": device}[name] is not None:
                raise TypeError(f"share=True keeps the weights as they are: leave {name} out, or share")
        if arguments:
            raise TypeError(f"share=True takes no {next(iter(arguments))!r}")
        config = as_config(model.config, cls.config_class)
        state = rename_old_names(model.state_dict(keep_vars=True), cls.family, cls.prefix)
        with torch.device("meta"), Undrawn():
            made = cls(config, *(() if cls.prefix else (cls.family.pooler in state,)))
        for name, parameter in made.named_parameters():  # frozen ones stay frozen
            parameter.requires_grad_(name not in state or state[name].requires_grad)
        load_into(made, state, cls.family, share=True)
        made.execution.set_backend(backend)
        return made.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        save_function: Any = None,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write config.json and model.safetensors: see `save_checkpoint`. transformers reads them, unless layers are integers.

        Args:
            save_directory: the folder, made if need be.
            is_main_process: False writes nothing, for all processes but one of a distributed run.
            state_dict: tensors to write in place of the model's own.
            push_to_hub: upload as well, to `repo_id` (the folder's name if not given) with `hub` arguments of `push_to_hub`.
            max_shard_size, save_function: accepted; one file is written at any size.

        Raises:
            ValueError: safe_serialization=False or a variant, which are not written; tensors of other names in state_dict.
            TypeError: an argument that `push_to_hub` does not take either.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("only model.safetensors is written: leave safe_serialization and variant out")
        if hub and not push_to_hub:
            raise TypeError(f"save_pretrained() got an unexpected argument {next(iter(hub))!r}")
        if not is_main_process:
            return
        save_checkpoint(self, config_contents(self), save_directory, state_dict)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **hub)


def _warn_of_pooling(path: Path) -> None:
    modules = sentence_modules.describe(folder_of(path))
    if modules is not None:
        warnings.warn(
            f"{path}: a sentence-transformers folder: {modules} of its modules.json are not applied; last_hidden_state is "
            "the encoder's alone, and pooler_output is not the sentence's vector; albert_fast.TextEncoder applies them",
            stacklevel=3,
        )
