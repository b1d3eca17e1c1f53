"""Import path for users of checkpoint files: `from albert_fast.weights import load_checkpoint`. The code is in `checkpoints/`."""

from .checkpoints.weights import load_checkpoint as load_checkpoint
from .checkpoints.weights import resolve as resolve
from .checkpoints.weights import shipped_model as shipped_model
