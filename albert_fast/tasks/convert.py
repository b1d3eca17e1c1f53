"""Converts Google's ALBERT and BERT checkpoints from TensorFlow's format to Hugging Face's layout."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import tensorflow_names
from ..checkpoints.families import ALBERT, Family
from ..checkpoints.saving import save_checkpoint
from ..checkpoints.tensorflow_files import (
    Reader,
    TensorFlowReader,
    find_config,
    find_prefix,
    find_vocabulary,
    read_tensors,
)
from ..models.auto import class_of
from ..models.encoder_config import EncoderConfig
from ..models.pretrained import Undrawn, config_contents
from ..runtime import files
from .output_folder import check_output

# The class that is written for the heads of a checkpoint.
_TASKS = {
    (): "Model",
    ("predictions",): "ForMaskedLM",
    ("predictions", "order"): "ForPreTraining",
    ("classifier",): "ForSequenceClassification",
    ("answers",): "ForQuestionAnswering",
}
_MAPPING = "encoder.embedding_hidden_mapping_in"
# A piece of letters, one of which is a capital. `[CLS]`, and `<S>` of the Chinese vocabulary, are in lower case ones too.
_CAPITAL = re.compile(r"(##)?[A-Za-z]*[A-Z][A-Za-z]*")


@dataclass(frozen=True)
class Converted:
    """What was written: the class that config.json names, the number of weights, the vocabulary or None."""

    class_name: str
    weights: int
    vocabulary: str | None


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    vocab: str | Path | None = None,
    lower_case: bool | None = None,
    hidden_act: str | None = None,
    overwrite: bool = False,
    reader: Callable[[Path], Reader] = TensorFlowReader,
) -> Converted:
    """Writes the folder `output` from a checkpoint of Google's ALBERT or BERT: all of its weights, heads as well.

    The folder appears when it is complete; this library and transformers load it. Optimizer slots and counters are left
    out. `hidden_act` "gelu" of an ALBERT becomes "gelu_new", because Google's code computes gelu with tanh (modeling.gelu).
    BERT's stays "gelu" with erf, as BERT was released and as Hugging Face converts it.

    Args:
        source: the folder of a release or of a module of TensorFlow Hub, or a checkpoint's prefix such as model.ckpt-best.
        config: albert_config.json or bert_config.json, where it is not beside the checkpoint.
        vocab: a SentencePiece model (.model) or a list of pieces (.txt), where it is not beside the checkpoint.
        lower_case: whether the tokenizer lower-cases; default: yes, unless a list of pieces has capitals.
        hidden_act: the activation, instead of the configuration's: "gelu_new" for a BERT that was trained with the tanh form,
            which google-research/bert computes since 2019.
        overwrite: replace `output`, if it holds only the files of a checkpoint.
        reader: opens a checkpoint by its prefix.

    Raises:
        FileNotFoundError: no checkpoint, configuration or vocabulary of this name.
        FileExistsError: `output` exists and `overwrite` is off, or it holds other files.
        ImportError: TensorFlow is not installed.
        ValueError: a file that cannot be read; variables that are missing, misshapen or unknown; a configuration that this
            library does not compute.
    """
    output = Path(output)
    check_output(output, overwrite)
    prefix = find_prefix(source)
    settings = Path(config) if config is not None else find_config(prefix)
    pieces = Path(vocab) if vocab is not None else find_vocabulary(prefix)
    if pieces is not None and (pieces.suffix not in (".model", ".txt") or not pieces.is_file()):
        raise FileNotFoundError(f"{pieces}: no vocabulary: a file that ends in .model or .txt")
    values = files.read_json_object(settings)
    if hidden_act is not None:
        values["hidden_act"] = hidden_act
    with reader(prefix) as variables:
        family = tensorflow_names.family_of(variables.shapes)
        if family is None:
            raise ValueError(_unknown(prefix, variables.shapes))
        model, tensors = _converted(variables, family, values, prefix, settings)
    own = {key: tensors.pop(key) for key in model.state_dict() if key in tensors}
    with files.replacing_folder(output) as new:
        if pieces is not None:
            _write_vocabulary(pieces, new, lower_case, model.config.max_position_embeddings)
        save_checkpoint(model, config_contents(model), new, own, others=tensors)
    if pieces is None:
        warnings.warn(f"{prefix.parent}: no vocabulary there; --vocab (vocab=) names one", stacklevel=2)
    count = sum(tensor.numel() for tensor in (*own.values(), *tensors.values()))
    return Converted(family.hf_name(type(model).__name__), count, None if pieces is None else str(pieces))


def _converted(
    reader: Reader, family: Family, values: dict[str, Any], prefix: Path, settings: Path
) -> tuple[Any, dict[str, Tensor]]:
    """The model that config.json will describe, without memory for its weights, and all tensors of the checkpoint."""
    known = tensorflow_names.head_variables(family)
    heads = {head: names for head, names in known.items() if not names.keys().isdisjoint(reader.shapes)}
    if tuple(heads) == ("order",):  # it is trained with the other one only, whose variables are then missing
        heads = {"predictions": known["predictions"], **heads}
    if tuple(heads) not in _TASKS:
        first = ", ".join(next(name for name in names if name in reader.shapes) for names in heads.values())
        raise ValueError(f"{prefix}: holds heads of several tasks: {first}")
    values = {**values, "tie_word_embeddings": True}  # Google's code knows nothing else
    if family is ALBERT and values.get("hidden_act", "gelu") == "gelu":
        values["hidden_act"] = "gelu_new"
    if "classifier" in heads:
        shape = reader.shapes.get("output_weights", ())
        values["num_labels"] = shape[0] if shape else 1
    task = _TASKS[tuple(heads)]
    encoder_class, model_class = (class_of(family, name) for name in ("Model", task))
    try:
        config: EncoderConfig = encoder_class.config_class.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{settings}: {error}") from error
    if family is ALBERT:
        _check_groups(config, settings)
    has_pooler = any(name.startswith("bert/pooler/") for name in reader.shapes)
    with torch.device("meta"), Undrawn():
        encoder = encoder_class(config, has_pooler)
        model = encoder if task == "Model" else model_class(config)
    start = model_class.prefix
    shapes = {start + key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    shapes |= {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    pooler = has_pooler or f"{start}{family.pooler}" in shapes
    wanted = {name: start + key for name, key in tensorflow_names.encoder_variables(family, config, pooler).items()}
    for names in heads.values():
        wanted |= names
    tensors = read_tensors(reader, wanted, shapes, prefix)
    if f"{start}{_MAPPING}.weight" in shapes.keys() - tensors.keys():
        width: int = config.hidden_size  # Google's code maps embeddings of this width to themselves
        tensors |= {f"{start}{_MAPPING}.weight": torch.eye(width), f"{start}{_MAPPING}.bias": torch.zeros(width)}
    return model, tensors


def _check_groups(config: Any, settings: Path) -> None:
    """ValueError where Google's code (modeling.transformer_model) runs the groups of layers in another order than Hugging Face's.

    Both round a quotient of floats; they differ for some numbers of layers and groups.
    """
    layers, groups = config.num_hidden_layers, config.num_hidden_groups
    for layer, ours in enumerate(config.group_indices()):
        theirs = int(layer / layers * groups)
        if theirs != ours:
            raise ValueError(
                f"{settings}: with {layers} layers in {groups} groups Google's code runs group {theirs} as layer {layer}, "
                f"Hugging Face's layout group {ours}: the model would compute something else"
            )


def _unknown(prefix: Path, names: Iterable[str]) -> str:
    """What to say of a checkpoint that has no variables of an ALBERT or BERT encoder."""
    first = next(iter(sorted(names)), "nothing")
    why = "; TensorFlow 2 wrote it for an object, not by name" if first.startswith("_CHECKPOINTABLE") else ""
    return f"{prefix}: no variable begins as Google's ALBERT or BERT names its layers; the first is {first}{why}"


def _write_vocabulary(pieces: Path, folder: Path, lower_case: bool | None, longest: int) -> None:
    """Copies the vocabulary under the name that tokenizers look for, and writes tokenizer_config.json."""
    unigram = pieces.suffix == ".model"
    shutil.copyfile(pieces, folder / ("spiece.model" if unigram else "vocab.txt"))
    if lower_case is None:
        lower_case = unigram or not _has_capitals(pieces)
    settings = {
        "do_lower_case": lower_case,
        "model_max_length": longest,
        "tokenizer_class": "AlbertTokenizer" if unigram else "BertTokenizer",
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _has_capitals(pieces: Path) -> bool:
    with pieces.open(encoding="utf-8", errors="replace") as lines:
        return any(_CAPITAL.fullmatch(line.strip()) for line in lines)
