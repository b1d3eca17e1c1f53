"""albert_fast: ALBERT with custom kernels, a drop-in for the eager model with the same numbers out.

    from albert_fast import ALBERTModel
    model = ALBERTModel.from_pretrained("path/to/checkpoint")
    out = model(input_ids, attention_mask)

Names are loaded on first use, so that `import albert_fast` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .runtime.version import __version__

if TYPE_CHECKING:
    from .accelerate.api import accelerate as accelerate
    from .accelerate.api import restore as restore
    from .accelerate.patching import patch_transformers as patch_transformers
    from .accelerate.patching import unpatch_transformers as unpatch_transformers
    from .inspect.explain import explain as explain
    from .layers.packing import aligned_representation as aligned_representation
    from .layers.wanted import WantedTokens as WantedTokens
    from .models.albert import ALBERTModel as ALBERTModel
    from .models.config import ALBERTConfig as ALBERTConfig
    from .models.heads import ALBERTForMaskedLM as ALBERTForMaskedLM
    from .models.heads import ALBERTForMultipleChoice as ALBERTForMultipleChoice
    from .models.heads import ALBERTForPreTraining as ALBERTForPreTraining
    from .models.heads import ALBERTForQuestionAnswering as ALBERTForQuestionAnswering
    from .models.heads import ALBERTForSequenceClassification as ALBERTForSequenceClassification
    from .models.heads import ALBERTForTokenClassification as ALBERTForTokenClassification
    from .ops import synchronize as synchronize
    from .text.tokenizer import load_tokenizer as load_tokenizer

_HOME = {
    "accelerate": "accelerate.api",
    "restore": "accelerate.api",
    "patch_transformers": "accelerate.patching",
    "unpatch_transformers": "accelerate.patching",
    "ALBERTConfig": "models.config",
    "ALBERTModel": "models.albert",
    "ALBERTForMaskedLM": "models.heads",
    "ALBERTForPreTraining": "models.heads",
    "ALBERTForSequenceClassification": "models.heads",
    "ALBERTForTokenClassification": "models.heads",
    "ALBERTForQuestionAnswering": "models.heads",
    "ALBERTForMultipleChoice": "models.heads",
    "aligned_representation": "layers.packing",
    "WantedTokens": "layers.wanted",
    "explain": "inspect.explain",
    "load_tokenizer": "text.tokenizer",
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
