"""From an exception to a line on standard error and an exit code."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import typer

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
_SPEAK_FOR_THEMSELVES = (ValueError, TypeError, IndexError, RuntimeError, ImportError, OSError, NotImplementedError)

Command = TypeVar("Command", bound=Callable[..., None])


class UsageError(Exception):
    """Options or arguments that contradict each other or the situation; exit code 2."""


def warn(message: str) -> None:
    """A line on standard error, in the form of all of this program's messages."""
    print(f"albert-fast: {message}", file=sys.stderr, flush=True)


def reports_errors(command: Command) -> Command:
    """A command that ends in an exit code and one message, not a traceback (unless ALBERT_FAST_TRACEBACK is set)."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            warn(str(interrupt) or "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader, `head` for one, has what it wanted. Python would complain when it flushes at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if os.environ.get("ALBERT_FAST_TRACEBACK"):
                raise
            warn(f"error: {_describe(error)}")
            raise typer.Exit(WRONG_USAGE if isinstance(error, UsageError) else FAILED) from None

    return run  # type: ignore[return-value]


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning without the line of code that it comes from, which says nothing to a user of the command line."""
    warn(f"warning: {str(message).removeprefix('albert_fast: ')}")


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (UsageError, *_SPEAK_FOR_THEMSELVES)) and not isinstance(error, KeyError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (ALBERT_FAST_TRACEBACK=1 shows where)"
