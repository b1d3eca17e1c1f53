"""Training and testing: `train` and `test` for one epoch, `fit` and `pretrain` for a whole run, and the data sets for them."""

from __future__ import annotations

from .data import LengthBucketSampler, TextDataset, read_examples
from .evaluate import Evaluation, evaluate
from .fit import FitResult, fit, small_config
from .loop import test, train
from .masking import MaskedTextDataset
from .metrics import compute_metrics
from .plots import draw_confusion_matrix
from .pretrain import PretrainResult, pretrain
from .pretrain_config import DataConfig, OptimizerConfig, PretrainConfig, VocabularyConfig, load_config
from .recipe import Recipe

__all__ = [
    "DataConfig",
    "Evaluation",
    "FitResult",
    "LengthBucketSampler",
    "MaskedTextDataset",
    "OptimizerConfig",
    "PretrainConfig",
    "PretrainResult",
    "Recipe",
    "TextDataset",
    "VocabularyConfig",
    "compute_metrics",
    "draw_confusion_matrix",
    "evaluate",
    "fit",
    "load_config",
    "pretrain",
    "read_examples",
    "small_config",
    "test",
    "train",
]
