"""`albert-fast translate`: a translation of each line of text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer

from . import _options as options
from ._errors import UsageError, reports_errors
from ._lines import Lines, Record, json_answer
from ._progress import Progress

# Batches whose texts are sorted by length together. A pipe gives fewer at a time and is answered at once.
WINDOW = 8


class Format(str, Enum):
    text = "text"
    jsonl = "jsonl"


class Stopping(str, Enum):
    soon = "soon"
    usual = "usual"
    never = "never"


@dataclass(frozen=True)
class Search:
    """How each translation is searched for."""

    num_beams: Annotated[
        int, typer.Option("--num-beams", "-n", min=1, help="Hypotheses of beam search; 1 is greedy search.")
    ] = 4
    length_penalty: Annotated[
        float, typer.Option("--length-penalty", help="Divide log-probabilities by tokens to this power.")
    ] = 1.0
    stopping: Annotated[
        Stopping,
        typer.Option(
            "--stopping",
            help="With enough hypotheses finished, stop soon, when no running one is better now, or never before none can be.",
        ),
    ] = Stopping.usual
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Most tokens of a translation.", show_default="256"),
    ] = None
    sample: Annotated[bool, typer.Option("--sample", help="Draw each token instead of searching.")] = False
    temperature: Annotated[float, typer.Option("--temperature", help="With --sample: below 1 is safer.")] = 1.0
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="With --sample: among this many.", show_default="all")
    ] = None
    top_p: Annotated[float, typer.Option("--top-p", help="With --sample: among those with this probability.")] = 1.0
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="With --sample: repeat the same draws.")] = None

    def as_keywords(self) -> dict[str, Any]:
        """The arguments of `Translator.translate`; seeds torch's random numbers."""
        import torch

        usual = Search()
        for name in ("temperature", "top_k", "top_p", "seed"):
            if not self.sample and getattr(self, name) != getattr(usual, name):
                raise UsageError(f"--{name.replace('_', '-')} is for sampling: add --sample")
        if self.seed is not None:
            torch.manual_seed(self.seed)
        early: bool | str = "never" if self.stopping is Stopping.never else self.stopping is Stopping.soon
        return {
            "num_beams": 1 if self.sample else self.num_beams,
            "length_penalty": self.length_penalty,
            "early_stopping": early,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.sample,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


@reports_errors
@options.expands_groups
def command(
    file: Annotated[str, typer.Argument(metavar="FILE|TEXT", help=options.INPUT_HELP)],
    model: options.Model,
    *,
    search: Search,
    format: Annotated[Format, typer.Option("--format", "-f", help="Form of the answers.")] = Format.text,
    column: options.TextColumn,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    input: options.Input,
    compute: options.Compute,
) -> None:
    """Translate each line of a text, or each row of a table: one line for each line, in order, for empty lines too.

    FILE is read as `classify` reads it. If no file has that name and the argument looks like text, the argument itself is
    translated. jsonl: {"text": ..., "translation": ...}; an "id" of the input is repeated.

    A line that cannot be read ends the work with exit code 1, after the lines before it are translated. On a pipe each line
    is answered as it comes.

    \b
    Examples:
      albert-fast translate "Two dogs play in the snow." -m my-translator
      albert-fast translate lines.en -m my-translator > lines.de
      albert-fast translate lines.en.gz -m my-translator --num-beams 1 --format jsonl
    """
    with Lines(file, input, column.as_columns(), may_be_text=True) as lines:
        from ..tasks.translate import Translator

        translator = Translator(model, max_length=max_length, batch_size=batch_size, **compute.as_keywords())
        how = search.as_keywords()
        translator.options(**how)  # its errors come before the first line is read
        with Progress(lines, "translate", answers_on_stdout=True) as progress:
            for records in lines.windows(batch_size * WINDOW):
                written = translator.translate([record.text for record in records], **how)
                for record, text in zip(records, written, strict=True):
                    sys.stdout.write(_line(record, text, format) + "\n")
                sys.stdout.flush()
                progress.update()


def _line(record: Record, translation: str, format: Format) -> str:
    if format is Format.text:
        return " ".join(translation.splitlines())
    return json_answer(record, text=record.text, translation=translation)
