"""`albert-fast encode`: a vector for each line of text."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..text.text_files import Columns
from . import _options as options
from ._errors import UsageError, reports_errors, warn
from ._lines import InputError, Lines
from ._progress import Progress
from ._sinks import JsonlForm, NpyForm, ResumableFile, StandardOutput, State, output_lock, state_of

if TYPE_CHECKING:
    import numpy as np
    import torch


class Pooling(str, Enum):
    mean = "mean"
    cls = "cls"
    pooler = "pooler"


class VectorType(str, Enum):
    float32 = "float32"
    float16 = "float16"


@reports_errors
def command(
    file: Annotated[str, typer.Argument(metavar="FILE|TEXT", help=options.INPUT_HELP)],
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="FILE.npy or FILE.jsonl.", show_default="JSON lines on standard output"),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="mean of all tokens; cls: the first token's vector; pooler: the trained pooler's.", show_default="mean"
        ),
    ] = None,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    window: Annotated[
        int, typer.Option(min=1, help="Batches whose texts are sorted by length together, and saved together.")
    ] = 16,
    dtype: Annotated[VectorType, typer.Option(help="Number format of the vectors.")] = VectorType.float32,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue interrupted work, or start where there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT and unfinished work.")] = False,
    text_column: options.TextColumn = None,
    pair_column: options.PairColumn = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Add the label that the table has; JSON lines only.")
    ] = None,
    input_format: options.InputFormatOption = options.InputFormat.auto,
    encoding: options.Encoding = "utf-8",
    replace_bad_bytes: options.ReplaceBadBytes = False,
    backend: options.Backend = "auto",
    precision: options.PrecisionOption = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Turn lines of text, or rows of a table, into vectors, one for each line, in order.

    FILE is read by its ending, as `classify` reads it. It may be of any length: memory does not grow with it. OUTPUT
    appears when it is complete; until then the rows are in OUTPUT.partial, and after an interruption --resume goes on after
    the last window that was saved and gives the same bytes as a run in one go. A line that cannot be read ends the work
    with exit code 1; the lines before it are saved, and --resume goes on from there when the line is mended. Empty lines
    get a vector too.

    \b
    Examples:
      albert-fast encode reviews.txt -m my-albert -o reviews.npy
      albert-fast encode reviews.txt -m my-albert -o reviews.npy --resume
      albert-fast encode reviews.csv.gz -m my-albert -o reviews.jsonl --text-column body --label-column stars
      tail -f log.jsonl | albert-fast encode - --input-format jsonl -m my-albert --pooling cls > vectors.jsonl
    """
    if output is None and (resume or overwrite):
        raise UsageError("--resume and --overwrite need --output")
    if resume and overwrite:
        raise UsageError("--resume continues, --overwrite starts again; give one of them")
    if output is not None and output.suffix not in (".npy", ".jsonl"):
        raise UsageError(f"--output {output}: expected a name that ends in .npy or .jsonl")
    if label_column is not None and output is not None and output.suffix != ".jsonl":
        raise UsageError(f"--label-column: {output} has no place for labels; JSON lines have")
    columns = Columns(options.column(text_column), options.column(pair_column), options.column(label_column))
    with output_lock(output) if output is not None else nullcontext():
        state = State.new if output is None else state_of(output, resume, overwrite)
        if state is State.complete:
            warn(f"{output} is complete; --overwrite makes it anew")
            return
        with Lines(file, input_format, encoding, replace_bad_bytes, columns, may_be_text=True) as lines:
            encoder = Encoder(model, pooling, max_length, batch_size, backend, precision, device, threads)
            sink: StandardOutput | ResumableFile
            if output is None:
                sink = StandardOutput(JsonlForm(dtype.value))
            else:
                form = NpyForm(encoder.width, dtype.value) if output.suffix == ".npy" else JsonlForm(dtype.value)
                settings = {
                    **encoder.settings(), "window": window, "dtype": dtype.value, "input format": lines.format.value,
                    "text column": columns.text, "pair column": columns.pair, "label column": columns.label,
                }  # fmt: skip
                sink = ResumableFile(output, form, settings, state, is_locked=True)
            _encode(lines, encoder, sink, batch_size * window)


def _encode(lines: Lines, encoder: Encoder, sink: StandardOutput | ResumableFile, window: int) -> None:
    to_file = isinstance(sink, ResumableFile)
    try:
        if isinstance(sink, ResumableFile) and sink.rows:
            lines.skip(sink.rows)
            if lines.digest != sink.digest:
                raise UsageError(f"the first {sink.rows} lines of {lines.name} are not those that were encoded before")
            warn(f"continuing after {sink.rows} lines")
        with Progress(lines, "encode", answers_on_stdout=not to_file) as progress:
            bad_line: InputError | None = None
            while bad_line is None:
                # Windows of a file are full, so that a resumed run has the same ones; the first one after a bad line
                # fills the one that was cut short.
                try:
                    records = (
                        lines.window(window - sink.rows % window, patience=None) if to_file else lines.window(window)
                    )
                except InputError as error:
                    records, bad_line = error.before, error
                if not records and bad_line is None:
                    break
                if records:
                    sink.append(encoder([(r.text, r.pair) for r in records]), records, lines.digest)
                progress.update()
            if bad_line is not None:
                kept = f"; {sink.rows} lines are saved, --resume continues after them" if to_file and sink.rows else ""
                raise ValueError(f"{bad_line}{kept}") from bad_line
        sink.finish()
    except (OSError, RuntimeError, MemoryError):  # a full disk, a device that fails
        if to_file and sink.rows:
            warn(f"{sink.rows} lines are saved; --resume continues after them")
        raise
    except KeyboardInterrupt:
        kept = f"; {sink.rows} lines are saved, --resume continues" if to_file and sink.rows else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    finally:
        sink.close()


class Encoder:
    """Texts, or (text, second text or None), to vectors (N, width)."""

    def __init__(
        self, model: str, pooling: Pooling | None, max_length: int | None, batch_size: int, backend: str,
        precision: options.Precision | None, device: str | None, threads: int | None,
    ) -> None:  # fmt: skip
        from ..checkpoints import sentence_modules
        from ..checkpoints.weights import resolve

        options.set_threads(threads)
        self.folder, self.pooling, self.batch_size = resolve(model), pooling or Pooling.mean, batch_size
        modules = sentence_modules.describe(self.folder if self.folder.is_dir() else self.folder.parent)
        if pooling is None and modules is not None:
            raise UsageError(
                f"{model}: a sentence-transformers folder whose modules.json asks for {modules}, which is not read: "
                "name the --pooling to use (a Dense layer or normalising is not applied)"
            )
        self.backend, self.device = backend, options.place(device)
        self.tokenizer = options.text_tokenizer(self.folder)
        self.model = options.load("ALBERTModel", self.folder, backend, precision, self.device)
        self.precision = self.model.execution.quantized or ("fp32" if precision is None else precision.value)
        self.limit = options.token_limit(self.tokenizer, self.model.config, max_length)
        if self.pooling is Pooling.pooler and self.model.pooler is None:
            raise UsageError(f"{model} has no pooler; --pooling mean or cls needs none")

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def settings(self) -> dict[str, Any]:
        """What the vectors depend on, for the note of interrupted work."""
        files = (
            sorted(path for path in self.folder.iterdir() if path.is_file()) if self.folder.is_dir() else [self.folder]
        )
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            if path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt"):
                digest.update(path.name.encode())
                with path.open("rb") as content:
                    while block := content.read(1 << 20):
                        digest.update(block)
        return {
            "model": digest.hexdigest(), "pooling": self.pooling.value, "max_length": self.limit,
            "batch_size": self.batch_size, "precision": self.precision, "backend": self.backend,
            "device": str(self.device),
        }  # fmt: skip

    def __call__(self, texts: list[tuple[str, str | None]]) -> np.ndarray:
        import numpy as np
        import torch

        rows = options.tokenize(self.tokenizer, texts, self.limit)
        out = np.empty((len(texts), self.width), dtype=np.float32)
        with torch.inference_mode():
            for chosen, batch in options.batches_by_length(self.tokenizer, rows, self.batch_size, self.device):
                out[chosen] = self._pool(batch).float().cpu().numpy()
        return out

    def _pool(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch

        if self.pooling is Pooling.pooler:
            return self.model(**batch, wanted_tokens="first").pooler_output
        mask = batch["attention_mask"]
        if self.pooling is Pooling.cls:
            first = torch.zeros_like(mask, dtype=torch.bool)
            first[:, 0] = True
            return self.model(**batch, wanted_tokens=first).last_hidden_state
        hidden = self.model(**batch).last_hidden_state.float()
        # Row by row: a sum over padded rows adds in an order that depends on the longest text of the batch.
        return torch.stack([row[:length].mean(0) for row, length in zip(hidden, mask.sum(1).tolist(), strict=True)])
