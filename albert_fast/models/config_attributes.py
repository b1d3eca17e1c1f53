"""Attributes and methods that transformers' configurations have beside their fields, for code written for them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..runtime.files import replacing

Config = TypeVar("Config", bound=type)

# Values of attributes that neither config.json nor the caller has set; transformers' defaults.
DEFAULTS: dict[str, Any] = {
    "architectures": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "finetuning_task": None,
    "is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "prefix": None,
    "task_specific_params": None, "tokenizer_class": None, "torchscript": False, "transformers_version": None,
}  # fmt: skip
# Arguments of huggingface_hub, which every from_pretrained takes.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def keeps_other_keys(cls: Config) -> Config:
    """Class decorator: a configuration's constructor takes any keyword; keywords that are not fields become attributes.

    A keyword that looks like a misspelt field is kept too, and a warning names the field.
    """
    init, names = cls.__init__, {f.name for f in dataclasses.fields(cls)}  # type: ignore[misc]

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **values: Any) -> None:
        values = {self.attribute_map.get(name, name): value for name, value in values.items()}
        others = {name: values.pop(name) for name in list(values) if name not in names}
        model_type = others.pop("model_type", self.model_type)
        self.check_model_type(model_type)
        self.__dict__["model_type"] = model_type  # of several that one class serves
        init(self, *args, **values)
        for name, value in others.items():
            if close := difflib.get_close_matches(name, names, 1, 0.85):
                warnings.warn(f"config: {name!r} is kept but not read; did you mean {close[0]!r}?", stacklevel=2)
            self.extra[name] = _plain(name, value)
        self.check_others()

    cls.__init__ = constructor  # type: ignore[misc]
    return cls


class ConfigAttributes:
    """Base of `EncoderConfig`: other keys of config.json as attributes, and the methods of transformers' PreTrainedConfig.

    model_type: as config.json states it; `other_model_types` are served by the same class. attribute_map: other names of fields,
    for reading, writing and as keywords.
    """

    model_type: ClassVar[str] = ""
    other_model_types: ClassVar[tuple[str, ...]] = ()
    attribute_map: ClassVar[dict[str, str]] = {}
    sub_configs: ClassVar[dict[str, Any]] = {}

    @classmethod
    def check_model_type(cls, model_type: Any) -> None:
        """ValueError where a configuration is of another architecture."""
        if model_type not in (cls.model_type, *cls.other_model_types):
            expected = " or ".join(map(repr, (cls.model_type, *cls.other_model_types)))
            raise ValueError(f"config: model_type is {model_type!r}, expected {expected}")

    def check_others(self) -> None:
        """ValueError for a key beside the fields that asks for what the family's models here cannot do."""

    def __getattr__(self, name: str) -> Any:  # called only for names that are not fields, methods or properties
        extra = self.__dict__.get("extra", {})
        if name in self.attribute_map:
            return getattr(self, self.attribute_map[name])
        if name in ("dtype", "torch_dtype"):
            import torch

            stated = extra.get("dtype", extra.get("torch_dtype"))
            return getattr(torch, stated, None) if isinstance(stated, str) else stated
        if name in extra:
            return extra[name]
        if name in DEFAULTS:
            return DEFAULTS[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        name = self.attribute_map.get(name, name)
        known = name == "extra" or name in self.__dataclass_fields__ or hasattr(type(self), name)
        if not known and "extra" in self.__dict__:
            self.extra["dtype" if name == "torch_dtype" else name] = _plain(name, value)
            return
        object.__setattr__(self, name, value)
        if name == "num_labels" and len(self.__dict__.get("id2label") or ()) not in (0, value):
            self._name_labels(None)
        elif name == "id2label" and "label2id" in self.__dict__:
            self._name_labels(value)

    def has_field(self, name: str) -> bool:
        return self.attribute_map.get(name, name) in self.__dataclass_fields__ and name != "extra"

    def has_key(self, name: str) -> bool:
        """Whether `name`, which is not a field, can be read and set: a key of config.json, or one with a default."""
        return name in DEFAULTS or name in ("dtype", "torch_dtype") or name in self.extra

    def _name_labels(self, names: Mapping[Any, str] | None) -> None:
        """Make id2label, label2id and num_labels agree: `names`, or for None as transformers names num_labels classes."""
        if names is None:
            names = {index: f"LABEL_{index}" for index in range(self.num_labels)}
        id2label = {int(key): str(label) for key, label in names.items()}
        values = {"id2label": id2label, "num_labels": len(id2label)}
        self.__dict__.update(values, label2id={label: key for key, label in id2label.items()})

    def replace(self, **changes: Any) -> Any:
        raise NotImplementedError

    def __copy__(self) -> Any:
        return self.replace()

    def __iter__(self) -> Iterator[str]:
        """The names in `to_dict()`."""
        return iter(self.to_dict())

    @property
    def use_return_dict(self) -> bool:
        """What a forward's `return_dict=None` means: False where config.json asks for tuples."""
        asked = self.return_dict is not False and self.extra.get("use_return_dict", True)
        return bool(asked) and not self.extra.get("torchscript", False)

    @property
    def name_or_path(self) -> str:
        """What `from_pretrained` was given; "" for a configuration made otherwise."""
        return str(self.__dict__.get("_source", self.extra.get("_name_or_path", "")))

    @name_or_path.setter
    def name_or_path(self, value: Any) -> None:
        self.__dict__["_source"] = str(value)

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """The configuration of the text model: this one."""
        return self

    def update(self, values: Mapping[str, Any]) -> None:
        """Set attributes by name.

        Raises:
            ValueError: values that do not fit together; nothing is set then.
        """
        self.replace(**{name: value for name, value in values.items() if self.has_field(name)})
        for name, value in values.items():
            setattr(self, name, value)

    def to_diff_dict(self) -> dict[str, Any]:
        """The entries of `to_dict` that differ from their defaults."""
        usual = type(self)().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "model_type" or k not in usual or usual[k] != v}

    def to_json_string(self, use_diff: bool = True) -> str:
        """config.json as text; with `use_diff` only the entries that differ from their defaults."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string`, whole or not at all."""
        with replacing(Path(json_file_path)) as file:
            file.write(self.to_json_string(use_diff).encode())

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json into a folder, which is made if need be."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.to_json_file(directory / "config.json", use_diff=False)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, return_unused_kwargs: bool = False, **changes: Any
    ) -> Any:
        """The configuration of a checkpoint folder, a config.json or a name on the hub.

        Args:
            pretrained_model_name_or_path: as for a model's `from_pretrained`.
            return_unused_kwargs: also return the keywords that are neither an argument of the hub nor an attribute.
            changes: the hub's arguments (`HUB_ARGUMENTS`), fields and attributes to override.

        Raises:
            FileNotFoundError: no such configuration. ValueError: one of another family, or does not fit together.
        """
        from ..checkpoints.saving import config_path
        from ..checkpoints.weights import resolve

        hub = {name: changes.pop(name) for name in HUB_ARGUMENTS if name in changes}
        path = resolve(pretrained_model_name_or_path, weights=False, **hub)
        file = config_path(path) if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no config.json there")
        config = cls.from_json_file(file)  # type: ignore[attr-defined]
        unused = {name: changes.pop(name) for name in list(changes) if not hasattr(config, name)}
        config = config.replace(**changes)
        config.name_or_path = pretrained_model_name_or_path
        return (config, unused) if return_unused_kwargs else config


def _plain(name: str, value: Any) -> Any:
    """`value` as config.json has it: torch.float16 as "float16"."""
    return str(value).removeprefix("torch.") if name in ("dtype", "torch_dtype") and value is not None else value
