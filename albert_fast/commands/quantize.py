"""`albert-fast quantize`: store a checkpoint in int8 or int16."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import _options as options
from ._errors import UsageError, reports_errors
from ._lines import Lines, Record


class StoredPrecision(str, Enum):
    int8 = "int8"
    int16 = "int16"


@reports_errors
@options.expands_groups
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its name on the hub.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    precision: Annotated[
        StoredPrecision, typer.Option("--precision", help="int8: least memory; int16: nearest to float32.")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Lines of text, or JSON lines, as the model will be given them.",
            show_default="int8: random ids; int16: none",
        ),
    ] = None,
    *,
    max_lines: Annotated[int, typer.Option("--max-lines", min=1, help="Read at most this many lines of FILE.")] = 1000,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    input: options.Input,
    threads: options.Threads = None,
) -> None:
    """Store MODEL with its layers rounded to integers, once instead of at every start.

    FILE decides how the weights are rounded: a few hundred lines of the text that the model will work on are enough,
    without labels. Without FILE int8 errs about half as much again. OUT gets the weights, the configuration, the tokenizer
    and the modules of a sentence-transformers folder; it appears when it is complete. Other commands take it as --model and
    read its precision from it.

    \b
    Examples:
      albert-fast quantize my-classifier my-classifier-int8 --precision int8 --calibration reviews.txt
      albert-fast classify reviews.txt -m my-classifier-int8
      albert-fast quantize my-encoder my-encoder-int16 --precision int16
    """
    from ..tasks.quantize import quantize_checkpoint

    options.set_threads(threads)
    texts = None if calibration is None else _texts(calibration, input, max_lines)
    tokens = quantize_checkpoint(
        model, output, precision.value, texts, max_length=max_length, batch_size=batch_size, overwrite=overwrite
    )
    if texts is not None and tokens:
        how = f"calibrated on {tokens} tokens of {len(texts)} line{'s' * (len(texts) != 1)}"
    else:
        how = "calibrated on random ids" if precision is StoredPrecision.int8 else "rounded without a calibration"
    typer.echo(f"{output}: {precision.value}, {how}")


def _texts(calibration: str, input: options.Input, max_lines: int) -> list[str | tuple[str, str]]:
    """The texts, or pairs of texts, of at most `max_lines` lines of FILE; empty lines are left out."""
    with Lines(calibration, input) as lines:
        records: list[Record] = []
        while len(records) < max_lines and (some := lines.window(max_lines - len(records), patience=None)):
            records += some
    given = [record.text if record.pair is None else (record.text, record.pair) for record in records]
    texts = [text for text in given if "".join(text).strip()]
    if not texts:
        raise UsageError(f"--calibration {calibration} holds no text")
    return texts
