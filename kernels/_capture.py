"""Captures of CUDA graphs, and what has to keep out of their way."""

from __future__ import annotations

import threading

import torch

# Held while a CUDA graph is captured, and by whoever waits for a whole device, which would end another thread's capture.
CAPTURE = threading.RLock()


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    # Where CUDA was never used it stays so: to ask whether there is any would begin with it.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
