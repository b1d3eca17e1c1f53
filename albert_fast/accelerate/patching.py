"""Accelerates every model that transformers loads from now on.

transformers 5 can also build other classes in place of its own (`register_patch_mapping`). It finds them by a pattern in the
bare name of a class: a class for `BertEncoder` would replace MobileBERT's and BertGeneration's encoders too. So the one
function that all loading goes through is wrapped here, in every version.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import nn

from ..runtime.user_warnings import warn_user
from .api import accelerate, check_arguments, stacks_in

_LOCK = threading.Lock()


class _Patch:
    """Whether models are accelerated, how, and what stood in the place of the function that does it."""

    def __init__(self) -> None:
        self.options: dict[str, Any] | None = None
        self.original: Any = None
        self.ours: Any = None


# An object, because classmethods that are attributes of a class would be bound to it.
_PATCH = _Patch()


def patch_transformers(precision: str = "fp32", *, padding: str = "zeros") -> None:
    """Accelerate whatever `from_pretrained` builds from now on, also inside `pipeline` and `SentenceTransformer`.

    Models that hold no known encoder load as before. A second call changes the options.

    Args:
        precision, padding: as `accelerate` takes them. What is built around a model later is not known while it is loaded:
            a MultiVectorEncoder needs padding="keep".

    Raises:
        ImportError: transformers is not installed. ValueError: as `accelerate`.
    """
    from transformers import PreTrainedModel

    check_arguments(precision, padding)
    with _LOCK:
        _PATCH.options = {"precision": precision, "padding": padding}
        if PreTrainedModel.__dict__["from_pretrained"] is _PATCH.ours is not None:
            return
        _PATCH.original = PreTrainedModel.__dict__["from_pretrained"]
        _PATCH.ours = classmethod(_accelerating(_PATCH.original.__func__))
        PreTrainedModel.from_pretrained = _PATCH.ours  # type: ignore[method-assign]


def unpatch_transformers() -> None:
    """Load models as transformers does, again. Models that were accelerated stay so. Without a patch it does nothing."""
    from transformers import PreTrainedModel

    with _LOCK:
        _PATCH.options = None
        # Where something else was put around ours, ours stays inside, and does nothing.
        if PreTrainedModel.__dict__["from_pretrained"] is _PATCH.ours is not None:
            PreTrainedModel.from_pretrained = _PATCH.original  # type: ignore[method-assign]
            _PATCH.ours = _PATCH.original = None


def _accelerating(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        options = _PATCH.options
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        if options is not None and isinstance(model, nn.Module) and stacks_in(model):
            try:
                accelerate(model, **options)
            except Exception as error:  # whatever it is, the user asked for a model
                warn_user(f"albert_fast: {type(model).__name__} is loaded as it is: {error}")
        return loaded

    return from_pretrained
