"""The lock for captures of CUDA graphs, and the question whether one is running."""

from __future__ import annotations

import threading

import torch

# Held while a CUDA graph is captured, and by code that waits for a whole device, which would end another thread's capture.
CAPTURE = threading.RLock()


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    # Asking CUDA would initialise it, so a process that has not used CUDA does not ask.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
