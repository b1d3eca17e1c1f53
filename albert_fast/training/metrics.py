"""Makes predictions from a model's outputs, and computes metrics over a whole data set.

Accuracy and the mean squared error need no library. The others come from scikit-learn, SciPy, seqeval and torchmetrics, which
are imported when they are needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..ops.linear_cross_entropy import IGNORED

Metric = Callable[[np.ndarray, np.ndarray], float]
# An answer (start, end) is one number: start * SPAN_STRIDE + end. The stride is longer than any sequence.
SPAN_STRIDE = 1 << 20
_Z = 1.959964  # between -z and z are 95 % of a normal distribution


def predictions_of(pairs: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """The labels and predictions of one batch, each (N,).

    | outputs and labels | prediction |
    |---|---|
    | logits of classes, one label each | the class of the largest logit; items labelled -100 are left out |
    | one logit, a float label | the logit |
    | several labels for an example, (B, C) | whether each logit is above 0, flattened |
    | start and end of a span (two pairs of one length) | one number for both; equal only if both ends are |
    | a pre-training head (two pairs) | that of the first pair, the masked tokens |

    Raises:
        ValueError: outputs of another kind.
    """
    if len(pairs) == 2 and pairs[0][0].shape == pairs[1][0].shape:
        (start, start_label), (end, end_label) = pairs
        return start_label * SPAN_STRIDE + end_label, start.argmax(-1) * SPAN_STRIDE + end.argmax(-1)
    outputs, labels = pairs[0]
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        kinds = f"{type(outputs).__name__}, {type(labels).__name__}"
        raise ValueError(f"metrics need logits and labels as tensors, got {kinds}")
    if labels.shape == outputs.shape:
        if labels.dim() == 1:
            return labels, outputs
        return labels.flatten().long(), (outputs > 0).flatten().long()
    if outputs.dim() == labels.dim() + 1 and labels.shape == outputs.shape[:-1]:
        kept = labels != IGNORED
        return labels[kept], outputs.argmax(-1)[kept]
    raise ValueError(f"cannot make predictions from outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)}")


def _average(labels: np.ndarray, predictions: np.ndarray) -> str:
    """How scikit-learn averages: for two classes 0 and 1 the figures of class 1, else the mean over classes."""
    return "binary" if set(np.unique(labels)) | set(np.unique(predictions)) <= {0, 1} else "macro"


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.dtype.kind == "f":
            raise ValueError(f"accuracy counts classes, but the {name} are {values.dtype} numbers; take mse or pearson")
    return float(np.mean(labels == predictions))


def _mean_squared_error(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(np.mean((labels.astype(np.float64) - predictions.astype(np.float64)) ** 2))


def _sklearn(name: str, averaged: bool = False) -> Metric:
    def metric(labels: np.ndarray, predictions: np.ndarray) -> float:
        from sklearn import metrics

        options = {"average": _average(labels, predictions), "zero_division": 0} if averaged else {}
        return float(getattr(metrics, name)(labels, predictions, **options))

    return metric


def _correlation(name: str) -> Metric:
    def metric(labels: np.ndarray, predictions: np.ndarray) -> float:
        from scipy import stats

        return float(getattr(stats, name)(labels, predictions).statistic)

    return metric


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _sklearn("f1_score", averaged=True),
    "precision": _sklearn("precision_score", averaged=True),
    "recall": _sklearn("recall_score", averaged=True),
    "matthews": _sklearn("matthews_corrcoef"),
    "mse": _mean_squared_error,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
OF_CLASSES = ("accuracy", "f1", "precision", "recall", "matthews")
# Metric -> (module to import, name of the library); the others need none.
LIBRARIES: dict[str, tuple[str, str]] = dict.fromkeys(
    ("f1", "precision", "recall", "matthews"), ("sklearn.metrics", "scikit-learn")
) | dict.fromkeys(("pearson", "spearman"), ("scipy.stats", "SciPy"))


# Of sentences of tagged words, and of answers to questions.
TAG_METRICS = dict.fromkeys(("f1", "precision", "recall", "accuracy"), ("seqeval.metrics", "seqeval"))
ANSWER_METRICS = dict.fromkeys(("f1", "exact_match"), ("torchmetrics.functional.text", "torchmetrics"))
TRANSLATION_METRICS = dict.fromkeys(("bleu", "chrf"), ("sacrebleu", "sacrebleu"))


def check_metrics(wanted: Sequence[str | Metric], *, numbers: bool = False) -> None:
    """Refuses metrics that could not be computed, before a run.

    Args:
        wanted: names; functions are not checked.
        numbers: the labels are numbers to predict, not classes.

    Raises:
        ValueError: an unknown name, or a metric of classes for numbers. ImportError: its library is not installed.
    """
    for metric in [wanted] if isinstance(wanted, str) else wanted:
        if not isinstance(metric, str):
            continue
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        if numbers and metric in OF_CLASSES:
            known = ", ".join(name for name in METRICS if name not in OF_CLASSES)
            raise ValueError(
                f"the metric {metric!r} counts classes, but the labels are numbers to predict; take {known}"
            )
        if metric in LIBRARIES:
            require_library(metric, *LIBRARIES[metric])


def require_library(metric: str, module: str, library: str) -> None:
    """ImportError where the library of a metric is not installed; the message says how to get it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the metric {metric!r} needs {library}: pip install 'albert-fast[train]' (accuracy and mse do not)"
        ) from error


def compute_metrics(wanted: Sequence[str | Metric], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Computes metrics, names or functions (labels, predictions) -> float: {name: value}. Errors: see `check_metrics`."""
    check_metrics(wanted)
    result = {}
    for metric in [wanted] if isinstance(wanted, str) else wanted:
        if isinstance(metric, str):
            result[metric] = METRICS[metric](labels, predictions)
        else:
            result[getattr(metric, "__name__", type(metric).__name__)] = float(metric(labels, predictions))
    return result


def tag_metrics(
    wanted: Sequence[str], expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Metrics of the tags of sentences: accuracy over words; f1, precision and recall over entities, by seqeval.

    Args:
        wanted: some of TAG_METRICS.
        expected, predicted: the tags of the words of each sentence.
    """
    values = {}
    for name in wanted:
        from seqeval import metrics

        options = {} if name == "accuracy" else {"zero_division": 0}
        values[name] = float(getattr(metrics, f"{name}_score")(list(expected), list(predicted), **options))
    return values


def answer_metrics(
    wanted: Sequence[str], expected: Sequence[Sequence[str]], predicted: Sequence[str]
) -> dict[str, float]:
    """Exact match and F1 of answers from 0 to 1, by SQuAD's rules (case, punctuation and articles do not count), by torchmetrics.

    Args:
        wanted: some of ANSWER_METRICS.
        expected: the right answers to each question; none: there is no answer, and "" is right.
        predicted: the answer to each question.
    """
    from torchmetrics.functional.text import squad

    truth: list[Any] = [
        {"id": str(i), "answers": {"text": list(texts) or [""], "answer_start": [0] * max(1, len(texts))}}
        for i, texts in enumerate(expected)
    ]
    found = squad([{"id": str(i), "prediction_text": text} for i, text in enumerate(predicted)], truth)
    return {name: float(found[name]) / 100 for name in wanted}


def translation_metrics(wanted: Sequence[str], expected: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF from 0 to 100, of texts with their case, by sacrebleu with its own settings.

    Args:
        wanted: some of TRANSLATION_METRICS. expected, written: a text for each source.
    """
    values = {}
    for name in wanted:
        from sacrebleu import metrics

        values[name] = float(
            getattr(metrics, {"bleu": "BLEU", "chrf": "CHRF"}[name])()
            .corpus_score(list(written), [list(expected)])
            .score
        )
    return values


def confidence_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion, at 95 %. ValueError unless 0 <= correct <= total > 0."""
    if not 0 <= correct <= total or total <= 0:
        raise ValueError(f"cannot take a proportion of {correct} in {total}")
    p, n, z = correct / total, total, _Z
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    return centre - half, centre + half


__all__ = [
    "ANSWER_METRICS",
    "METRICS",
    "TAG_METRICS",
    "TRANSLATION_METRICS",
    "Metric",
    "answer_metrics",
    "check_metrics",
    "compute_metrics",
    "confidence_interval",
    "predictions_of",
    "require_library",
    "tag_metrics",
    "translation_metrics",
]
