"""Reads how much memory this process has used."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_mib() -> float:
    """Largest resident memory of this process so far.

    Linux's ru_maxrss starts from the memory of the process that forked this one; VmHWM is this program's alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
