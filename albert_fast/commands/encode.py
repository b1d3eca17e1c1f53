"""`albert-fast encode`: a vector for each line of text."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options as options
from ._errors import UsageError, reports_errors, warn
from ._lines import InputError, Lines, given_text
from ._progress import Progress
from ._sinks import Form, JsonlForm, NpyForm, ParquetForm, ResumableFile, StandardOutput, State, output_lock, state_of

if TYPE_CHECKING:
    from ..tasks.embed import TextEncoder


# What --window counts in where there is no --batch-size.
TEXTS = 32


class Pooling(str, Enum):
    mean = "mean"
    cls = "cls"
    pooler = "pooler"
    max = "max"
    mean_sqrt_len_tokens = "mean_sqrt_len_tokens"
    weightedmean = "weightedmean"
    lasttoken = "lasttoken"


class VectorType(str, Enum):
    float32 = "float32"
    float16 = "float16"


@dataclass(frozen=True)
class Columns(options.TableColumns):
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Add the label that the table has; not in .npy.")
    ] = None


@dataclass(frozen=True)
class Vectors:
    """Which vector a text gets."""

    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="mean of all tokens; cls: the first token's vector; pooler: the trained pooler's; and others. It replaces "
            "what the modules.json of MODEL asks for.",
            show_default="what MODEL asks for, else mean",
        ),
    ] = None
    prompt_name: Annotated[
        str | None,
        typer.Option("--prompt-name", help="Put MODEL's prompt of this name, such as query, before each text."),
    ] = None
    prompt: Annotated[str | None, typer.Option("--prompt", help="Put this before each text.")] = None
    truncate_dim: Annotated[
        int | None,
        typer.Option("--truncate-dim", min=1, help="Keep this many numbers of a vector.", show_default="all"),
    ] = None

    def as_keywords(self) -> dict[str, Any]:
        """The arguments of TextEncoder."""
        if self.prompt is not None and self.prompt_name is not None:
            raise UsageError("--prompt is the text itself, --prompt-name the name of one; give one of them")
        return {
            "pooling": None if self.pooling is None else self.pooling.value,
            "prompt_name": self.prompt_name,
            "prompt": None if self.prompt is None else given_text(self.prompt, "--prompt"),
            "truncate_dim": self.truncate_dim,
        }


@dataclass(frozen=True)
class Output:
    """The file to write, and what to do with earlier work."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="FILE.npy, FILE.jsonl or FILE.parquet.", show_default="JSON lines on standard output"
        ),
    ] = None
    dtype: Annotated[VectorType, typer.Option(help="Number format of the vectors.")] = VectorType.float32
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue interrupted work, or start where there is none.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT and unfinished work.")] = False

    def check(self, label_column: str | None) -> None:
        output = self.output
        if output is None and (self.resume or self.overwrite):
            raise UsageError("--resume and --overwrite need --output")
        if self.resume and self.overwrite:
            raise UsageError("--resume continues, --overwrite starts again; give one of them")
        if output is not None and output.suffix not in (".npy", ".jsonl", ".parquet"):
            raise UsageError(f"--output {output}: expected a name that ends in .npy, .jsonl or .parquet")
        if label_column is not None and output is not None and output.suffix == ".npy":
            raise UsageError(f"--label-column: {output} has no place for labels; JSON lines and Parquet have")

    def sink(self, encoder: TextEncoder, lines: Lines, columns: Columns, window: int, state: State) -> Sink:
        if self.output is None:
            return StandardOutput(JsonlForm(self.dtype.value))
        form: Form = JsonlForm(self.dtype.value)
        if self.output.suffix != ".jsonl":
            kind = NpyForm if self.output.suffix == ".npy" else ParquetForm
            form = kind(encoder.width, self.dtype.value)
        names = columns.as_columns()
        settings = {
            **encoder.settings(),
            "window": window,
            "dtype": self.dtype.value,
            "input format": lines.format.value,
            "text column": names.text,
            "pair column": names.pair,
            "label column": names.label,
        }
        return ResumableFile(self.output, form, settings, state, is_locked=True)


Sink = StandardOutput | ResumableFile


@reports_errors
@options.expands_groups
def command(
    file: Annotated[str, typer.Argument(metavar="FILE|TEXT", help=options.INPUT_HELP)],
    model: options.Model,
    *,
    output: Output,
    vectors: Vectors,
    max_length: options.MaxLength = None,
    batch_tokens: options.BatchTokens = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "-b", min=1, help="Most texts at a time.", show_default="as many as --batch-tokens allows"
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(min=1, help=f"Save after this many batches of --batch-size texts, or of {TEXTS} without it.")
    ] = 64,
    columns: Columns,
    input: options.Input,
    compute: options.Compute,
) -> None:
    """Turn lines of text, or rows of a table, into vectors: one for each line, in order, for empty lines too.

    FILE is read by its ending, as `classify` reads it. It may be of any length: memory does not grow with it.

    A sentence-transformers folder is obeyed: its pooling, Dense and Normalize, length, prompts and truncate_dim. Any other
    MODEL gives the mean of a text's tokens.

    OUTPUT appears when it is complete; until then the rows are in OUTPUT.partial. After an interruption --resume continues
    after the last saved window and gives the same bytes as an uninterrupted run. A line that cannot be read ends the work
    with exit code 1; the lines before it are saved, and --resume continues there when you have corrected the line.

    \b
    Examples:
      albert-fast encode reviews.txt -m my-albert -o reviews.npy
      albert-fast encode reviews.txt -m my-albert -o reviews.npy --resume
      albert-fast encode questions.txt -m my-sentence-model --prompt-name query --truncate-dim 256 -o questions.npy
      albert-fast encode reviews.csv.gz -m my-albert -o reviews.jsonl --text-column body --label-column stars
      tail -f log.jsonl | albert-fast encode - --input-format jsonl -m my-albert --pooling cls > vectors.jsonl
    """
    output.check(columns.label_column)
    with output_lock(output.output) if output.output is not None else nullcontext():
        state = State.new if output.output is None else state_of(output.output, output.resume, output.overwrite)
        if state is State.complete:
            warn(f"{output.output} is complete; --overwrite replaces it")
            return
        with Lines(file, input, columns.as_columns(), may_be_text=True) as lines:
            from ..tasks.embed import TextEncoder

            options.warn_of_rounding(model, compute.precision)
            encoder = TextEncoder(
                model,
                **vectors.as_keywords(),
                max_length=max_length,
                batch_tokens=batch_tokens,
                batch_size=batch_size,
                **compute.as_keywords(),
            )
            rows = (batch_size or TEXTS) * window
            _encode(lines, encoder, output.sink(encoder, lines, columns, window, state), rows)


def _encode(lines: Lines, encoder: TextEncoder, sink: Sink, window: int) -> None:
    """Encodes all lines, and says after an interruption what is saved."""
    from ..tasks.embed import encode_rows, skip_encoded_rows

    to_file = isinstance(sink, ResumableFile)
    try:
        skip_encoded_rows(lines, sink)
        if sink.rows:
            warn(f"continuing after {sink.rows} lines")
        with Progress(lines, "encode", answers_on_stdout=not to_file) as progress:
            patience = None if to_file else 0.02  # a file is read in full windows; a reader of a pipe waits for answers
            encode_rows(encoder, lines, sink, window, patience=patience, after_window=progress.update)
        sink.finish()
    except InputError as error:
        raise ValueError(f"{error}{_saved(sink, ', --resume continues after them')}") from error
    except (OSError, RuntimeError, MemoryError):  # a full disk, a device that fails
        if _saved(sink):
            warn(f"{sink.rows} lines are saved; --resume continues after them")
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{_saved(sink, ', --resume continues')}") from None
    finally:
        sink.close()


def _saved(sink: Sink, hint: str = "") -> str:
    return f"; {sink.rows} lines are saved{hint}" if isinstance(sink, ResumableFile) and sink.rows else ""
