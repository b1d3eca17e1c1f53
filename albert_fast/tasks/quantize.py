"""Stores a checkpoint in int8 or int16, calibrated on text once instead of at every start."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import sentence_modules
from ..checkpoints.families import FAMILIES
from ..checkpoints.saving import config_path, folder_of, missing_config
from ..checkpoints.weights import resolve
from ..models.auto import class_of, config_of
from ..models.encoder_config import EncoderConfig
from ..quantization.calibration import ENOUGH_TOKENS
from ..runtime import files
from ..text import vocabulary
from ..text.batching import TextPair, padded_batches, tokenize
from ..text.normalization import lower_first
from ..text.tokenizer import Tokenizer, load_tokenizer
from .loading import quiet_about_modules, token_limit
from .output_folder import check_output

STORABLE = ("int8", "int16")


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    precision: str,
    texts: Sequence[str | tuple[str, str]] | None = None,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
) -> int:
    """Writes the folder `output`: the model of `source` with rounded layers, its head unchanged, and its tokenizer.

    The folder appears when it is complete. `AutoModel.from_pretrained(output)` loads it in its precision. A
    sentence-transformers folder keeps its modules, so that `TextEncoder(output)` applies them.

    Args:
        source: a checkpoint's folder or its name on the hub, with a tokenizer. Its config.json names a model of any family
            that `AutoModel` knows, with or without a head; where it names no class, it is an encoder without a head.
        precision: "int8" or "int16".
        texts: the calibration texts, as the model will be given them; pairs for tasks over pairs. None: int8 is calibrated
            on random ids, int16 is rounded to the nearest numbers, as `from_pretrained` does without a calibration.
        max_length: texts are cut to this many tokens; default: as many as the model, or its sentence-transformers folder, takes.
        overwrite: replace `output`, if it holds only the files of a stored checkpoint.

    Returns:
        How many tokens of `texts` the rounding was calibrated on; 0 without texts, or with too few tokens to fit to.

    Raises:
        FileExistsError: `output` exists and `overwrite` is off, or it holds other files.
        ValueError: an unknown precision, weights that are rounded already, `texts` without a text, an unknown architecture.
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
    asked = sentence_modules.read(folder)
    if asked is not None:
        path, folder = asked.encoder if path.is_dir() else path, asked.encoder
        max_length = asked.max_length if max_length is None else max_length
    model_class, config = _model_class(folder)
    batches = None
    if texts is not None:
        tokenizer = load_tokenizer(folder)
        if asked is not None and asked.lower_case:
            lower_first(tokenizer.backend)
        batches = _batches(tokenizer, texts, token_limit(tokenizer, config, max_length), batch_size)
    else:
        vocabulary.find(folder)
    with quiet_about_modules():
        model = model_class.from_pretrained(path, precision=precision, device="cpu", calibration=batches)
    with files.replacing_folder(output) as new:
        place = new if asked is None else sentence_modules.copy(asked, new)
        for name in (*vocabulary.FILES, *vocabulary.SETTINGS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)
        model.save_pretrained(place)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches or [])
    return tokens if tokens >= ENOUGH_TOKENS else 0


def _model_class(folder: Path) -> tuple[Any, EncoderConfig]:
    """The class that config.json names (where it names none, the encoder without a head), and the configuration."""
    file = config_path(folder)
    if not file.is_file():
        raise missing_config(folder)
    config = config_of(folder)
    if config.extra.get("quantization_config") is not None:
        raise ValueError(f"{folder}: its weights are rounded already; take the checkpoint that they were made from")
    family = FAMILIES[config.model_type]
    architectures = config.extra.get("architectures") or [f"{family.hf_class_name}Model"]
    try:
        return class_of(family, str(architectures[0]).removeprefix(family.hf_class_name)), config
    except ValueError as error:
        raise ValueError(f"{file}: architectures {architectures!r} names no model of this library: {error}") from error


def _batches(
    tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Padded batches of texts of similar length."""
    pairs: list[TextPair] = [(text, None) if isinstance(text, str) else text for text in texts]
    if not pairs:
        raise ValueError("there is no text to calibrate on")
    rows = tokenize(tokenizer, pairs, max_length)
    return [batch for _, batch in padded_batches(tokenizer, rows, batch_size)]
