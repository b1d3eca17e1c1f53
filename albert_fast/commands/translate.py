"""`albert-fast translate`: a translation of each line of text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer

from ..generation.options import MAX_NEW_TOKENS
from . import _options as options
from ._errors import UsageError, reports_errors
from ._lines import Lines, Record, json_answer
from ._progress import Progress

# Batches whose texts are sorted by length together. A pipe gives fewer at a time and is answered at once.
WINDOW = 8
BEAMS = 4


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
        int | None,
        typer.Option(
            "--num-beams", "-n", min=1, help="Hypotheses of beam search; 1 is greedy search.", show_default=str(BEAMS)
        ),
    ] = None
    length_penalty: Annotated[
        float | None,
        typer.Option(
            "--length-penalty",
            help="Beam search divides a log-probability by tokens to this power; higher favours longer texts.",
            show_default="1.0",
        ),
    ] = None
    stopping: Annotated[
        Stopping | None,
        typer.Option(
            "--stopping",
            help="When beam search ends a text, once as many hypotheses as beams are finished. soon: at once. usual: when no "
            "unfinished one scores better. never: when no unfinished one could score better, however long it became.",
            show_default="usual",
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Most tokens of a translation.", show_default=str(MAX_NEW_TOKENS)),
    ] = None
    sample: Annotated[bool, typer.Option("--sample", help="Draw each token instead of searching.")] = False
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="With --sample: below 1 is safer.", show_default="1.0")
    ] = None
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="With --sample: among this many.", show_default="all")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="With --sample: among those with this probability.", show_default="1.0"),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="With --sample: repeat the same draws.")] = None

    def as_keywords(self) -> dict[str, Any]:
        """The arguments of `Translator.translate`; seeds torch's random numbers.

        Raises:
            UsageError: an option that has no effect beside the others.
        """
        import torch

        if self.sample:
            self._refuse(
                ("num_beams", "length_penalty", "stopping"), "has no effect with --sample, which draws one text"
            )
        else:
            self._refuse(("temperature", "top_k", "top_p", "seed"), "is for sampling: add --sample")
        if self.num_beams == 1:
            self._refuse(("length_penalty", "stopping"), "has no effect with --num-beams 1, which is greedy search")
        if self.seed is not None:
            torch.manual_seed(self.seed)
        early = {None: None, Stopping.soon: True, Stopping.usual: False, Stopping.never: "never"}[self.stopping]
        given = {
            "length_penalty": self.length_penalty,
            "early_stopping": early,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
        return {
            "num_beams": 1 if self.sample else self.num_beams or BEAMS,
            "do_sample": self.sample,
            **{name: value for name, value in given.items() if value is not None},
        }

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        """UsageError for the first of these options that was given."""
        for name in names:
            if getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} {reason}")


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
