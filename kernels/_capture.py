"""Captures of CUDA graphs, and what has to keep out of their way."""

from __future__ import annotations

import threading

import torch

# Held while a CUDA graph is captured, and by whoever waits for a whole device, which would end another thread's capture.
CAPTURE = threading.RLock()


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
