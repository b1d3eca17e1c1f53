"""Turns an exception into one line on standard error and an exit code."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from ..tasks.errors import UsageError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
# Errors whose message is enough; for others the type is shown too.
_CLEAR = (ValueError, TypeError, IndexError, RuntimeError, ImportError, OSError, NotImplementedError)

Command = TypeVar("Command", bound=Callable[..., None])


def warn(message: str) -> None:
    """Writes a line to standard error, in the form of all messages of this program."""
    print(f"albert-fast: {message}", file=sys.stderr, flush=True)


def reports_errors(command: Command) -> Command:
    """Ends a command with one message and an exit code, not a traceback (unless ALBERT_FAST_TRACEBACK is set)."""

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
            # The reader, such as `head`, has what it wanted. Python would complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if os.environ.get("ALBERT_FAST_TRACEBACK"):
                raise
            warn(f"error: {_describe(error)}")
            raise typer.Exit(WRONG_USAGE if isinstance(error, UsageError) else FAILED) from None

    return run  # type: ignore[return-value]


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Shows a warning without the line of code that it comes from."""
    warn(f"warning: {str(message).removeprefix('albert_fast: ')}")


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, _CLEAR) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (ALBERT_FAST_TRACEBACK=1 shows where)"


__all__ = ["UsageError", "reports_errors", "warn"]
