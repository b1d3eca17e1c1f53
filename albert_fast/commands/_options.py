"""Options that several subcommands share, and the model and tokenizer that they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import warn

if TYPE_CHECKING:
    import torch

    from ..text.tokenizer import Tokenizer


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int16 = "int16"
    int8 = "int8"
    fp8 = "fp8"


class InputFormat(str, Enum):
    auto = "auto"
    text = "text"
    csv = "csv"
    tsv = "tsv"
    jsonl = "jsonl"


INPUT_HELP = "Text, one a line, or a table (.csv, .tsv, .jsonl), also as .gz; - is standard input; or a text itself."
Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder of a checkpoint, or its name on the Hugging Face hub.")
]
ClassifierModel = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder of a checkpoint, or its name on the hub.", show_default="the shipped model"
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Texts computed at a time.")]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=3, help="Cut texts to this many tokens.", show_default="what the model takes"),
]
Backend = Annotated[str, typer.Option("--backend", help="auto, reference, or the name of a backend (see `info`).")]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        "--precision", help="Number format of the computation.", show_default="fp32, or the integers that MODEL holds"
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one"),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.", show_default="as PyTorch chooses"),
]
InputFormatOption = Annotated[
    InputFormat,
    typer.Option(
        "--input-format", help='jsonl: {"text": ..., "text_pair": ...} a line; auto: by the ending of FILE, else text.'
    ),
]
Encoding = Annotated[str, typer.Option("--encoding", help="Character encoding of the input, such as latin-1.")]
ReplaceBadBytes = Annotated[
    bool, typer.Option("--replace-bad-bytes", help="Read bytes that are not text in this encoding as U+FFFD.")
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column", help="Name, or number from 0 where there is no header.", show_default="text, sentence, review"
    ),
]
PairColumn = Annotated[str | None, typer.Option("--pair-column", help="Second text, for tasks over pairs.")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Name, or number.", show_default="label")]


def column(name: str | None) -> str | int | None:
    """A column of a header by its name; one of a file without a header by its number."""
    return int(name) if name is not None and name.isdigit() else name


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def place(device: str | None) -> torch.device:
    """The device that was asked for, or a GPU if there is one. RuntimeError where it does not exist."""
    import torch

    from ..runtime.dispatch import check_device

    check_device(device)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def shipped_model() -> Path:
    """Folder of the sentiment classifier that comes with the package."""
    from ..checkpoints.weights import shipped_model

    return shipped_model()


def load(
    model_class: str, folder: Path, backend: str, precision: Precision | None, device: torch.device, **overrides: Any
) -> Any:
    """Model of a class of `albert_fast`, by its name, in evaluation mode; it returns outputs with fields, and no more."""
    import albert_fast

    if precision is Precision.int8 and not _is_rounded(folder):
        warn(
            f"{folder} holds floats: they are rounded to int8, calibrated on random ids, at every start; "
            f"`albert-fast quantize {folder} OUT --precision int8 --calibration FILE` stores a more exact rounding once"
        )
    loader = getattr(albert_fast, model_class)
    chosen = None if precision is None else precision.value
    overrides = {"return_dict": True, "output_hidden_states": False, "output_attentions": False, **overrides}
    return loader.from_pretrained(folder, backend=backend, precision=chosen, device=device, **overrides)


def stated_precision(folder: Path, precision: Precision | None) -> Precision:
    """The precision that was asked for, or the one that a checkpoint's config.json states, or float32."""
    from ..models.config import ALBERTConfig
    from ..models.pretrained import held_precision

    held = None if precision is not None else held_precision(ALBERTConfig.from_pretrained(folder), folder)
    return precision or Precision(held or "fp32")


def _is_rounded(path: Path) -> bool:
    """Whether a checkpoint's configuration speaks of integers; also where it cannot be read, which loading reports."""
    from ..checkpoints.weights import config_path
    from ..models.config import ALBERTConfig

    try:
        config = ALBERTConfig.from_json_file(config_path(path if path.is_dir() else path.parent))
    except (OSError, ValueError):
        return True
    return config.extra.get("quantization_config") is not None


def text_tokenizer(folder: Path) -> Tokenizer:
    """Tokenizer of a folder for texts of strangers: a "[SEP]" or "<pad>" in one is text, not a control token."""
    from ..text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.split_special_tokens = True
    return tokenizer


def token_limit(tokenizer: Tokenizer, config: Any, wanted: int | None) -> int:
    """Tokens that a text is cut to; ValueError where more are wanted than the model has positions."""
    if wanted is not None and wanted > config.max_position_embeddings:
        raise ValueError(f"--max-length {wanted} is more than the model's {config.max_position_embeddings} positions")
    return wanted or min(tokenizer.model_max_length, config.max_position_embeddings)


def tokenize(tokenizer: Tokenizer, texts: Sequence[tuple[str, str | None]], limit: int) -> dict[str, list[list[int]]]:
    """Ids and masks of texts and of pairs of texts, mixed as they come, each cut to `limit` tokens."""
    rows: dict[str, list[list[int]]] = {}
    alone = [index for index, (_, pair) in enumerate(texts) if pair is None]
    paired = [index for index, (_, pair) in enumerate(texts) if pair is not None]
    for chosen, inputs in (
        (alone, [texts[index][0] for index in alone]),
        (paired, [(texts[index][0], texts[index][1] or "") for index in paired]),
    ):
        for key, values in tokenizer(inputs, max_length=limit).items():
            column = rows.setdefault(key, [[] for _ in texts])
            for index, value in zip(chosen, values, strict=True):
                column[index] = value
    return rows


def batches_by_length(
    tokenizer: Tokenizer, rows: Mapping[str, Sequence[list[int]]], batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """(indices of the rows, padded tensors) of batches of rows of similar length, the shortest first."""
    order = sorted(range(len(rows["input_ids"])), key=lambda index: len(rows["input_ids"][index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.collate({key: [values[index] for index in chosen] for key, values in rows.items()})
        yield chosen, {key: tensor.to(device) for key, tensor in batch.items()}
