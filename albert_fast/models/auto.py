"""AutoModel and AutoModelFor<Task>: choose the class of a checkpoint by the model_type of its config.json, without transformers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..checkpoints.families import FAMILIES, Family
from ..checkpoints.hub import near
from ..checkpoints.saving import config_path, missing_config
from ..checkpoints.weights import resolve
from ..runtime.files import read_json_object
from .config_attributes import HUB_ARGUMENTS
from .seq2seq_config import ALBERTSeq2SeqConfig


def family_of(model_type: Any, where: str) -> Family:
    """The family that config.json names.

    Raises:
        ValueError: one that this library does not have; lists those that it has.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type is {model_type!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def class_of(family: Family, task: str) -> Any:
    """This library's class for a task ("Model", "ForMaskedLM", ...) of a family.

    Raises:
        ValueError: the family has no such class; lists those that it has.
    """
    if family.model_type == "albert" and task == "Model":
        return importlib.import_module(".albert", __package__).ALBERTModel
    module = importlib.import_module(f".{family.module}", __package__)
    found = getattr(module, family.class_name + task, None)
    if found is None:
        known = [name.removeprefix(family.class_name) for name in vars(module) if name.startswith(family.class_name)]
        tasks = ", ".join(name for name in known if name == "Model" or name.startswith("For"))
        raise ValueError(f"{family.model_type} has no {task}; known: {tasks}")
    return found


def config_of(folder_or_file: Path) -> Any:
    """The configuration of a checkpoint, of the class that its model_type asks for.

    Raises:
        ValueError: as `family_of` and the configuration. OSError: config.json cannot be read.
    """
    file = config_path(folder_or_file)
    model_type = read_json_object(file).get("model_type")
    if model_type == ALBERTSeq2SeqConfig.model_type:
        return ALBERTSeq2SeqConfig.from_json_file(file)
    family = family_of(model_type, str(file))
    return class_of(family, "Model").config_class.from_json_file(file)


class _Auto:
    """Base of the AutoModel classes, which are never made: `from_pretrained`, `from_config` and `from_model` choose."""

    task: ClassVar[str]

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be constructed: call {name}.from_pretrained(path), from_config(config) or from_model(model)"
        )

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **arguments: Any) -> Any:
        """The model of a checkpoint folder, weights file or hub id, of the class that its model_type asks for.

        Args:
            path_or_hub_id, arguments: as `ALBERTModel.from_pretrained` takes them.

        Raises:
            ValueError: a model_type that this library does not have, or a family without this task. Others as
                `ALBERTModel.from_pretrained`.
        """
        config = arguments.get("config")
        if config is None or isinstance(config, (str, Path)):
            source = path_or_hub_id if config is None else config
            hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
            path = resolve(source, weights=False, **hub)
            file = config_path(path if path.is_dir() else path.parent)
            if not file.is_file():
                raise (
                    missing_config(path)
                    if path.exists()
                    else FileNotFoundError(f"{path}: no such file{near(str(path))}")
                )
            family = family_of(read_json_object(file).get("model_type"), str(file))
        else:
            family = family_of(_model_type(config), "config")
        return class_of(family, cls.task).from_pretrained(path_or_hub_id, **arguments)

    @classmethod
    def from_config(cls, config: Any, **arguments: Any) -> Any:
        """A model with random weights: from a configuration, transformers' or this library's, or a dictionary.

        Raises:
            ValueError: as `from_pretrained`.
        """
        return class_of(family_of(_model_type(config), "config"), cls.task).from_config(config, **arguments)

    @classmethod
    def from_model(cls, model: Any, **arguments: Any) -> Any:
        """A model with the configuration and the weights of `model`, which is already in memory: see
        `PretrainedMixin.from_model`.

        Raises:
            TypeError: an object without a configuration and a state_dict. ValueError: as `from_pretrained`.
        """
        config = getattr(model, "config", None)
        return class_of(family_of(_model_type(config), type(model).__name__), cls.task).from_model(model, **arguments)


def _model_type(config: Any) -> Any:
    return config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)


class AutoModel(_Auto):
    """Chooses an encoder by model_type: `AutoModel.from_pretrained(path)`."""

    task = "Model"


class AutoModelForMaskedLM(_Auto):
    """Chooses a model with a masked-language head by model_type."""

    task = "ForMaskedLM"


class AutoModelForPreTraining(_Auto):
    """Chooses a model with the heads that its family is pre-trained with by model_type."""

    task = "ForPreTraining"


class AutoModelForSequenceClassification(_Auto):
    """Chooses a classifier of texts by model_type."""

    task = "ForSequenceClassification"


class AutoModelForTokenClassification(_Auto):
    """Chooses a classifier of tokens by model_type."""

    task = "ForTokenClassification"


class AutoModelForQuestionAnswering(_Auto):
    """Chooses a model that marks answers in texts by model_type."""

    task = "ForQuestionAnswering"


class AutoModelForMultipleChoice(_Auto):
    """Chooses a model that scores choices by model_type."""

    task = "ForMultipleChoice"
