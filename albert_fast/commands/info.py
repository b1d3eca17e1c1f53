"""`albert-fast info`: operators, backends and what is missing, as `python -m albert_fast.info` shows it."""

from __future__ import annotations

from typing import Annotated

import typer

from ._errors import reports_errors


@reports_errors
def command(
    json: Annotated[bool, typer.Option("--json", help="Machine, operators and advice as JSON.")] = False,
) -> None:
    """Show what runs on this machine, and what is missing and why.

    \b
    Examples:
      albert-fast info
      albert-fast info --json
    """
    from ..inspect import info

    info.main(["--json"] if json else [])
