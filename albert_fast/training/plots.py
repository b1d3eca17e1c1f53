"""Draws a model's confusion matrix: how often each class was taken for each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from .evaluate import Evaluation

_ENDINGS = (".png", ".svg", ".pdf")
_TASKS = ("classify", "tag")
# Up to this many classes the counts are written into the cells.
WRITTEN = 20


def check_can_draw(path: str | Path, task: str) -> None:
    """Refuses a picture that could not be drawn, before anything is computed.

    Args:
        task: the name of the task that is evaluated.

    Raises:
        ValueError: a task without one class for each example or word, another ending than .png, .svg or .pdf.
            FileNotFoundError: no such folder. ImportError: scikit-learn or matplotlib is not installed.
    """
    if task not in _TASKS:
        raise ValueError(f"{path}: a confusion matrix counts one class for each example or word; the task is {task}")
    if Path(path).suffix.lower() not in _ENDINGS:
        raise ValueError(f"{path}: a picture's name ends in {', '.join(_ENDINGS)}")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist")
    _display()


def draw_confusion_matrix(evaluation: Evaluation, path: str | Path) -> None:
    """Draws the confusion matrix of an evaluation of classes or of tags: a row for each expected class, shares in colour.

    Raises:
        ValueError: labels that are probabilities. Others: see `check_can_draw`.
    """
    check_can_draw(path, evaluation.task)
    expected, predicted = evaluation.expected, evaluation.predicted
    if evaluation.task == "tag":
        expected, predicted = list(itertools.chain(*expected)), list(itertools.chain(*predicted))
    elif any(isinstance(label, list) for label in expected):
        raise ValueError(f"{path}: a confusion matrix counts one class for each example; the labels are probabilities")
    names = sorted({*expected, *predicted})
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = max(4.0, 0.5 * min(len(names), 40) + 2)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    _display().from_predictions(
        expected,
        predicted,
        labels=names,
        normalize="true",
        include_values=len(names) <= WRITTEN,
        values_format=".2f",
        xticks_rotation="vertical",
        cmap="Blues",
        colorbar=False,
        ax=figure.add_subplot(),
    )
    figure.savefig(path, dpi=150)


def _display() -> Any:
    try:
        import matplotlib.figure  # noqa: F401
        from sklearn.metrics import ConfusionMatrixDisplay
    except ImportError as error:
        raise ImportError(
            "a confusion matrix needs matplotlib and scikit-learn: pip install 'albert-fast[train,plot]'"
        ) from error
    return ConfusionMatrixDisplay


__all__ = ["check_can_draw", "draw_confusion_matrix"]
