"""Options that several subcommands share, alone and in groups that a command takes as one record."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..text.text_files import Columns
from ._errors import warn


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
    parquet = "parquet"


class AnswerFormat(str, Enum):
    tsv = "tsv"
    jsonl = "jsonl"


INPUT_HELP = (
    "Lines of text, or a table (.csv, .tsv, .jsonl, also as .gz; .parquet); - is standard input; or the text itself."
)
EXAMPLES_HELP = (
    "A table (.tsv, .csv, .jsonl, .parquet), CoNLL (.conll, .bio), SQuAD's JSON, or a saved data set's folder."
)
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
BatchTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        min=1,
        help="Tokens computed at a time, without padding.",
        show_default="what suits the device",
    ),
]
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


@dataclass(frozen=True)
class Input:
    """How the bytes of FILE become rows."""

    input_format: Annotated[
        InputFormat,
        typer.Option(
            "--input-format",
            help='jsonl: {"text": ..., "text_pair": ...} on each line; auto: by the ending of FILE, else text.',
        ),
    ] = InputFormat.auto
    encoding: Annotated[str, typer.Option("--encoding", help="Character encoding of the input, such as latin-1.")] = (
        "utf-8"
    )
    replace_bad_bytes: Annotated[
        bool, typer.Option("--replace-bad-bytes", help="Read bytes that are not text in this encoding as U+FFFD.")
    ] = False


@dataclass(frozen=True)
class TextColumn:
    """Which column of a table to read."""

    text_column: Annotated[
        str | None,
        typer.Option(
            "--text-column",
            help="Name, or number from 0 where there is no header.",
            show_default="text, sentence, review",
        ),
    ] = None

    def as_columns(self) -> Columns:
        return Columns(_column(self.text_column))


@dataclass(frozen=True)
class TableColumns(TextColumn):
    """Which columns of a table to read."""

    pair_column: Annotated[str | None, typer.Option("--pair-column", help="Second text, for tasks over pairs.")] = None
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Name, or number.", show_default="label")
    ] = None

    def as_columns(self) -> Columns:
        return Columns(_column(self.text_column), _column(self.pair_column), _column(self.label_column))

    def as_keywords(self) -> dict[str, Any]:
        """The arguments of `read_examples`, `evaluate` and `fit`."""
        columns = self.as_columns()
        return {"text_column": columns.text, "pair_column": columns.pair, "label_column": columns.label}


def _column(name: str | None) -> str | int | None:
    """The name of a column in a header, or the number of a column in a table without one."""
    return int(name) if name is not None and name.isdigit() else name


@dataclass(frozen=True)
class Compute:
    """Where a model computes and in which numbers."""

    backend: Backend = "auto"
    precision: PrecisionOption = None
    device: Device = None
    threads: Threads = None

    def as_keywords(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` and of the tasks; sets the threads."""
        set_threads(self.threads)
        chosen = None if self.precision is None else self.precision.value
        return {"backend": self.backend, "precision": chosen, "device": self.device}


def expands_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Gives typer a command whose parameters may be dataclasses: every field becomes an option of its own, in its place."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    # Not by get_type_hints: Python 3.10's wraps the hint of a default None in Optional, which hides typer's options.
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        hint = parameter.annotation
        if not dataclasses.is_dataclass(hint):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))
            continue
        options = get_type_hints(hint, include_extras=True)
        fields = dataclasses.fields(hint)
        groups[parameter.name] = hint, [field.name for field in fields]
        parameters += [
            inspect.Parameter(field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=options[field.name])
            for field in fields
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (group, fields) in groups.items():
            given[name] = group(**{field: given.pop(field) for field in fields})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def warn_of_rounding(model: str | Path, precision: Precision | None) -> None:
    """Says that int8 from float weights is rounded at every start, and which command does it once."""
    if precision is not Precision.int8:
        return
    from ..checkpoints.weights import resolve
    from ..tasks.loading import holds_floats

    if holds_floats(folder := resolve(model)):
        warn(
            f"{folder} holds floats: they are rounded to int8, calibrated on random ids, at every start; "
            f"`albert-fast quantize {folder} OUT --precision int8 --calibration FILE` stores a more exact rounding once"
        )
