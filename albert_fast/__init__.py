"""albert_fast: ALBERT with custom kernels, a drop-in for the eager model with the same numbers out.

    from albert_fast import ALBERTModel
    model = ALBERTModel.from_pretrained("path/to/checkpoint")
    out = model(input_ids, attention_mask)

Names are loaded on first use, so that `import albert_fast` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import ALBERTConfig as ALBERTConfig
    from .heads import ALBERTForMaskedLM as ALBERTForMaskedLM
    from .heads import ALBERTForMultipleChoice as ALBERTForMultipleChoice
    from .heads import ALBERTForPreTraining as ALBERTForPreTraining
    from .heads import ALBERTForQuestionAnswering as ALBERTForQuestionAnswering
    from .heads import ALBERTForSequenceClassification as ALBERTForSequenceClassification
    from .heads import ALBERTForTokenClassification as ALBERTForTokenClassification
    from .modeling import ALBERTModel as ALBERTModel
    from .ops import synchronize as synchronize
    from .packing import aligned_representation as aligned_representation
    from .plan import explain as explain

_HOME = {
    "ALBERTConfig": "config",
    "ALBERTModel": "modeling",
    "ALBERTForMaskedLM": "heads",
    "ALBERTForPreTraining": "heads",
    "ALBERTForSequenceClassification": "heads",
    "ALBERTForTokenClassification": "heads",
    "ALBERTForQuestionAnswering": "heads",
    "ALBERTForMultipleChoice": "heads",
    "aligned_representation": "packing",
    "explain": "plan",
    "synchronize": "ops",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
