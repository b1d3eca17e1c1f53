"""Warnings that point to the user's own line, however many libraries called in between."""

from __future__ import annotations

import sys
import warnings

# Frames of these packages are not the user's.
_LIBRARIES = {"albert_fast", "peft", "sentence_transformers", "torch", "transformers"}


def warn_user(message: str) -> None:
    """Warn at the line of the nearest caller outside of this package and of the libraries that call it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
