"""Stores a checkpoint in int8 or int16, calibrated on text once instead of at every start."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.families import ALBERT
from ..checkpoints.saving import config_path, folder_of, missing_config
from ..checkpoints.weights import resolve
from ..models.albert import ALBERTModel
from ..models.config import ALBERTConfig
from ..models.heads import (
    ALBERTForMaskedLM,
    ALBERTForMultipleChoice,
    ALBERTForPreTraining,
    ALBERTForQuestionAnswering,
    ALBERTForSequenceClassification,
    ALBERTForTokenClassification,
)
from ..runtime import files
from ..text import vocabulary
from ..text.batching import TextPair, padded_batches, tokenize
from ..text.tokenizer import Tokenizer, load_tokenizer
from .loading import token_limit
from .output_folder import check_output

STORABLE = ("int8", "int16")
_MODELS: tuple[Any, ...] = (
    ALBERTModel,
    ALBERTForMaskedLM,
    ALBERTForMultipleChoice,
    ALBERTForPreTraining,
    ALBERTForQuestionAnswering,
    ALBERTForSequenceClassification,
    ALBERTForTokenClassification,
)


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    precision: str,
    texts: Sequence[str | tuple[str, str]],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
) -> int:
    """Writes the folder `output`: the model of `source` with rounded layers, its head unchanged, and its tokenizer.

    The folder appears when it is complete. `ALBERTModel.from_pretrained(output)` loads it in its precision.

    Args:
        source: a checkpoint's folder or its name on the hub, with a tokenizer. Its config.json names a class of this
            library, or no class: then it is an encoder without a head.
        precision: "int8" or "int16".
        texts: the calibration texts, as the model will be given them; pairs for tasks over pairs.
        max_length: texts are cut to this many tokens; default: as many as the model takes.
        overwrite: replace `output`, if it holds only the files of a stored checkpoint.

    Returns:
        How many tokens the rounding was calibrated on.

    Raises:
        FileExistsError: `output` exists and `overwrite` is off, or it holds other files.
        ValueError: an unknown precision, weights that are rounded already, no text, an unknown architecture.
        FileNotFoundError: no checkpoint, or no vocabulary in it.
    """
    if precision not in STORABLE:
        raise ValueError(f"precision {precision!r}: a checkpoint is stored in one of {', '.join(STORABLE)}")
    output = Path(output)
    check_output(output, overwrite)
    path = resolve(source)
    folder = folder_of(path)
    if output.exists() and output.resolve() == folder.resolve():
        raise ValueError(f"{output}: the output is the source; name another folder")
    model_class, config = _model_class(folder)
    tokenizer = load_tokenizer(folder)
    batches = _batches(tokenizer, texts, token_limit(tokenizer, config, max_length), batch_size)
    model = model_class.from_pretrained(path, precision=precision, device="cpu", calibration=batches)
    with files.replacing_folder(output) as new:
        for name in (*vocabulary.FILES, *vocabulary.SETTINGS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        model.save_pretrained(new)
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def _model_class(folder: Path) -> tuple[Any, ALBERTConfig]:
    """The class that config.json names (where it names none, the encoder without a head), and the configuration."""
    file = config_path(folder)
    if not file.is_file():
        raise missing_config(folder)
    config = ALBERTConfig.from_json_file(file)
    if config.extra.get("quantization_config") is not None:
        raise ValueError(f"{folder}: its weights are rounded already; take the checkpoint that they were made from")
    architectures = config.extra.get("architectures") or [ALBERT.hf_name("ALBERTModel")]
    name = ALBERT.own_name(str(architectures[0]))
    found = next((model for model in _MODELS if model.__name__ == name), None)
    if found is None:
        raise ValueError(f"{file}: architectures {architectures!r} names no model of this library")
    return found, config


def _batches(
    tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Padded batches of texts of similar length."""
    pairs: list[TextPair] = [(text, None) if isinstance(text, str) else text for text in texts]
    if not pairs:
        raise ValueError("there is no text to calibrate on")
    rows = tokenize(tokenizer, pairs, max_length)
    return [batch for _, batch in padded_batches(tokenizer, rows, batch_size)]
