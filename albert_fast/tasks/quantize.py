"""A checkpoint in int8 or int16 made of one in floats: calibrated on text once, instead of at every start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.weights import config_path, resolve
from ..models.config import ALBERTConfig
from ..runtime import files
from ..text import vocabulary as _vocabulary

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

PRECISIONS = ("int8", "int16")
# What such a folder holds; a folder that holds anything else is not replaced.
NAMES = ("config.json", "model.safetensors", *_vocabulary.FILES, *_vocabulary.SETTINGS)


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
    """Write the folder `output`: the model of `source` with rounded layers, its head as it was, and its tokenizer.

    The folder appears when it is complete. `ALBERTModel.from_pretrained(output, precision=precision)` loads it.

    Args:
        source: a checkpoint's folder or its name on the hub, with a tokenizer; a class of this library is named in its
            config.json, or it is a bare encoder.
        precision: "int8" or "int16".
        texts: what to calibrate on, as the model will be given it; pairs for tasks over pairs.
        max_length: tokens that a text is cut to; None: what the model takes.
        overwrite: replace a folder that holds nothing but such a checkpoint.

    Returns:
        The number of tokens that the rounding was calibrated on.

    Raises:
        FileExistsError: `output` is there, and `overwrite` is off or it holds other files.
        ValueError: an unknown precision, weights that are rounded already, no text, an unknown architecture.
        FileNotFoundError: no checkpoint, or no vocabulary in it.
    """
    from ..text.tokenizer import load_tokenizer

    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: a checkpoint is stored in one of {', '.join(PRECISIONS)}")
    output = Path(output)
    _check_output(output, overwrite)
    path = resolve(source)
    folder = path if path.is_dir() else path.parent
    if output.exists() and output.resolve() == folder.resolve():
        raise ValueError(f"{output}: the output is the source; name another folder")
    model_class, config = _model_class(folder)
    tokenizer = load_tokenizer(folder)
    longest = config.max_position_embeddings
    if max_length is not None and max_length > longest:
        raise ValueError(f"max_length {max_length} is more than the model's {longest} positions")
    batches = _batches(tokenizer, texts, max_length or min(tokenizer.model_max_length, longest), batch_size)
    model = model_class.from_pretrained(path, precision=precision, device="cpu", calibration=batches)
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(output, _put_back) as scratch:
        made = scratch / "new"
        made.mkdir()
        for name in (*_vocabulary.FILES, *_vocabulary.SETTINGS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
                files.flush(made / name)
        model.save_pretrained(made)
        if output.exists():
            os.rename(output, scratch / "old")
        os.rename(made, output)
        files.flush(output.parent)
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def _put_back(scratch: Path) -> None:
    """Removes a scratch folder; what it holds of an output that was moved away, and is not there anew, goes back."""
    output = scratch.with_name(scratch.name[1:].rsplit(".", 2)[0])
    if (scratch / "old").exists() and not output.exists():
        os.rename(scratch / "old", output)
    shutil.rmtree(scratch)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{output} is a file; the output needs a folder")
    held = sorted(path.name for path in output.iterdir())
    if held and not overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite (overwrite=True) replaces it")
    foreign = [name for name in held if name not in NAMES]
    if foreign:
        raise FileExistsError(f"{output} holds {foreign[0]}, which is no part of a checkpoint; name another folder")


def _model_class(folder: Path) -> tuple[Any, ALBERTConfig]:
    """The class of this library that config.json names, the bare encoder where it names none, and the configuration."""
    import albert_fast

    file = config_path(folder)
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json there, where a checkpoint has it")
    config = ALBERTConfig.from_json_file(file)
    if config.extra.get("quantization_config") is not None:
        raise ValueError(f"{folder}: its weights are rounded already; take the checkpoint that they were made of")
    architectures = config.extra.get("architectures") or ["AlbertModel"]
    name = str(architectures[0]).replace("Albert", "ALBERT")
    if name not in albert_fast.__all__ or not name.startswith("ALBERT") or name == "ALBERTConfig":
        raise ValueError(f"{file}: architectures {architectures!r} names no model of this library")
    return getattr(albert_fast, name), config


def _batches(
    tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], limit: int, batch_size: int
) -> list[dict[str, Any]]:
    """Padded batches of texts of similar length."""
    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    rows = [tokenizer(first, second, max_length=limit) for first, second in pairs]
    rows.sort(key=lambda row: len(row["input_ids"]))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if not batches:
        raise ValueError("there is no text to calibrate on")
    return [tokenizer.collate({key: [row[key] for row in batch] for key in batch[0]}) for batch in batches]
