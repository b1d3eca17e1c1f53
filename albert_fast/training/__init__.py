"""Training and testing: `train` and `test` for one epoch, `fit` for a whole run, and the data sets for them."""

from __future__ import annotations

from .data import LengthBucketSampler, TextDataset, read_examples
from .evaluate import Evaluation, evaluate
from .fit import FitResult, fit, small_config
from .loop import test, train
from .masking import MaskedTextDataset
from .metrics import compute_metrics
from .plots import draw_confusion_matrix
from .recipe import Recipe

__all__ = [
    "Evaluation",
    "FitResult",
    "LengthBucketSampler",
    "MaskedTextDataset",
    "Recipe",
    "TextDataset",
    "compute_metrics",
    "draw_confusion_matrix",
    "evaluate",
    "fit",
    "read_examples",
    "small_config",
    "test",
    "train",
]
