"""The program `albert-fast`: each subcommand is a module of `albert_fast.commands`.

Heavy modules are imported when a subcommand runs, so that `--help` answers at once. The program needs the extra `cli`
(typer, tqdm); without it `main` says how to install it.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from .runtime.version import __version__

if TYPE_CHECKING:
    import typer

# Module in albert_fast.commands -> its line in `albert-fast --help`.
SUBCOMMANDS = {
    "classify": "Label each line of a text.",
    "tag": "Find entities in each line of a text.",
    "answer": "Answer questions with words of their contexts.",
    "choose": "Choose between texts that continue or answer another.",
    "encode": "Turn lines of text into vectors.",
    "rerank": "Sort lines of text by how well they answer a query.",
    "fill_mask": "Complete [MASK] in a text.",
    "translate": "Translate each line of a text.",
    "pretrain": "Pre-train a model on plain text.",
    "train": "Train a model on labelled text.",
    "evaluate": "Measure a model on labelled text.",
    "quantize": "Store a model in int8 or int16.",
    "convert": "Convert Google's TensorFlow checkpoints.",
    "demo": "Check this installation.",
    "bench": "Measure speed and error on this machine.",
    "info": "Show what runs here, and what is missing.",
}
_EPILOG = (
    "Exit codes: 0 fine; 1 the work failed; 2 wrong usage; 130 interrupted. "
    "Set ALBERT_FAST_TRACEBACK=1 to see where an error arose."
)


def build_app() -> typer.Typer:
    """Builds the typer application with every subcommand. ImportError where typer is not installed."""
    import typer

    app = typer.Typer(
        name="albert-fast",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # so that the lines of the examples stay as they are
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"albert-fast {__version__}")
            raise typer.Exit()

    version = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Show the version and exit.")

    @app.callback()
    def root(version: bool = version) -> None:
        """ALBERT with custom kernels: classify, tag, answer, choose, encode, rerank, translate, pre-train, train and measure."""

    for name, summary in SUBCOMMANDS.items():
        module = importlib.import_module(f".commands.{name}", __package__)
        app.command(name.replace("_", "-"), short_help=summary, epilog=_EPILOG)(module.command)
    return app


def main() -> None:
    """Runs the console script and exits with one of the codes that --help lists."""
    try:
        app = build_app()
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "typer":
            raise
        sys.exit("albert-fast: the command line needs typer: pip install 'albert-fast[cli,text]'")
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
