"""`albert-fast pretrain`: the command line of `albert_fast.training.pretrain`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import _options as options
from ._errors import reports_errors, warn


@reports_errors
def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file with the settings of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="Settings that replace those of CONFIG.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder; the number of steps may change.")
    ] = False,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="A bar on a terminal, else a line for each record.")
    ] = True,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Pre-train an ALBERT on plain text: hidden words and sentence order.

    The least that CONFIG holds is two lines:

    \b
      output: my-albert
      data: {files: [corpus.txt.gz]}

    Text comes from files of plain text (documents apart by blank lines), .jsonl, .csv, .tsv, also .gz, .parquet, and folders
    that `datasets` saved. It is tokenised once, into the output folder. A killed run continues with --resume, with the same
    losses as without the kill. docs/pretraining.md lists the settings.

    \b
    Examples:
      albert-fast pretrain config.yaml
      albert-fast pretrain config.yaml steps=20000 model.size=base optimizer.learning_rate=1e-3
      albert-fast pretrain config.yaml --resume
      torchrun --nproc-per-node 8 -m albert_fast.cli pretrain config.yaml precision=bfloat16
    """
    from ..training import load_config, pretrain

    options.set_threads(threads)
    settings = load_config(config, overrides or ())
    try:
        result = pretrain(settings, resume=resume, device=device, progress=progress, report=warn)
    except KeyboardInterrupt as interrupt:
        where = f"interrupted {interrupt}".strip()
        raise KeyboardInterrupt(f"{where}; the same command with --resume continues") from None
    if result.rank:
        return
    sys.stdout.write(json.dumps({"output": str(result.output_dir), "steps": result.steps, **result.figures}) + "\n")


__all__ = ["command"]
