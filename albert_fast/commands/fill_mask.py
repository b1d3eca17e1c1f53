"""`albert-fast fill-mask`: the likeliest words for [MASK] in a text."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from . import _options as options
from ._errors import reports_errors
from ._lines import Lines, given_text


@reports_errors
@options.expands_groups
def command(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT", help="Text with one [MASK] or more; - reads lines of standard input."),
    ],
    model: options.Model,
    *,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Candidates for each mask.")] = 5,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="A JSON object for each text.")] = False,
    compute: options.Compute,
) -> None:
    """Show the likeliest pieces for each [MASK] of a text, with their probabilities.

    Each line of the answer: number of the mask, probability, piece, text with that piece in place. The model needs a
    masked-language head. With --jsonl: {"text": ..., "masks": [[{"token": ..., "score": ...}, ...], ...]}.

    \b
    Examples:
      albert-fast fill-mask "The film was [MASK]." -m my-albert
      albert-fast fill-mask - -m my-albert --top-k 10 --jsonl < lines.txt
    """
    from ..tasks.fill_mask import MaskFiller

    options.warn_of_rounding(model, compute.precision)
    filler = MaskFiller(model, **compute.as_keywords())

    def answer(text: str, name: str) -> None:
        masks = filler(text, top_k, name)
        if jsonl:
            plain = [[{"token": found.piece, "score": round(found.score, 6)} for found in row] for row in masks]
            sys.stdout.write(json.dumps({"text": text, "masks": plain}, ensure_ascii=False) + "\n")
        else:
            for number, row in enumerate(masks, 1):
                for found in row:
                    sys.stdout.write(f"{number}\t{found.score:.6f}\t{found.piece}\t{found.filled}\n")
        sys.stdout.flush()

    if texts != ["-"]:
        for position, text in enumerate(texts, 1):
            answer(given_text(text, f"text {position}"), f"text {position}")
        return
    with Lines("-", options.Input(options.InputFormat.text)) as lines:
        for (record,) in lines.windows(1):
            answer(record.text, f"standard input, line {record.line}")
