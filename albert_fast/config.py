"""Import path for users of the configuration: `from albert_fast.config import ALBERTConfig`. The code is in `models/`."""

from .models.config import ALBERTConfig as ALBERTConfig
