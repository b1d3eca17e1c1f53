"""The error for a call whose arguments do not go together."""

from __future__ import annotations


class UsageError(ValueError):
    """Arguments that contradict each other, the model, or what is on the disk. The command line exits with code 2."""
