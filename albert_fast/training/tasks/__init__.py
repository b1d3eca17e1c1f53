"""The tasks that a model is trained and measured for: one table, a file for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...models.encoder_config import EncoderConfig
from ...text.conll_files import is_conll
from ...text.squad_files import is_squad
from ...text.text_files import LABEL_COLUMN, Columns
from ..data import Examples
from ..sources import Source, columns_for, columns_of, is_data_set, rows_of
from .answer import ANSWERS, Answer
from .base import Measured, Task
from .choose import CHOICES, NUMBERED, Choose
from .tag import TAGS, WORDS, Tag
from .texts import Classify, Multilabel, Regress, read_labelled
from .translate import Translate, aligned

TASKS: dict[str, Task] = {
    task.name: task for task in (Classify(), Regress(), Multilabel(), Tag(), Answer(), Choose(), Translate())
}


def task_named(name: str) -> Task:
    """The task of a name. ValueError: there is none; lists those that there are."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def read_for(
    name: str | None, source: Source, columns: Columns, label_names: Sequence[str] | None
) -> tuple[Task, Examples]:
    """The task and the training examples of a source; without a name, the task that the source is certainly for.

    | the source | the task |
    |---|---|
    | two files, or their names with a comma between | translation |
    | .conll, .bio, .iob; lists of words and tags | tag |
    | .json; columns question, context and answer or answers | answer |
    | a list of choices, or choice0, choice1 ...; ending0, ending1 ... | choose |
    | labels that are lists of words | multilabel |
    | labels that are numbers, other than 0 to n - 1 | regress |
    | anything else | classify |

    Raises:
        ValueError: an unknown task, or a source that cannot be read for it.
    """
    name = name or _certain_task(source, columns)
    if name is not None:
        task = task_named(name)
        return task, task.read(source, columns, label_names)
    examples = read_labelled(source, columns, label_names, None)
    return TASKS["regress" if examples.label_names is None else "classify"], examples


def _certain_task(source: Source, columns: Columns) -> str | None:
    if aligned(source) is not None:
        return "translation"
    if not is_data_set(source):
        if is_conll(source):
            return "tag"
        if is_squad(source):
            return "answer"
    if columns.text is not None:
        return None
    names = set(columns_of(source))
    if names.intersection(WORDS) and names.intersection(columns_for(columns.label, *TAGS)):
        return "tag"
    if {"question", "context"} <= names and names.intersection(columns_for(columns.label, *ANSWERS)):
        return "answer"
    if CHOICES in names or any({f"{prefix}0", f"{prefix}1"} <= names for prefix in NUMBERED):
        return "choose"
    (label,) = columns_for(columns.label, LABEL_COLUMN)
    if label in names:
        first = next((values[label] for _, values in rows_of(source) if values.get(label)), None)
        if isinstance(first, (list, tuple)) and all(isinstance(part, str) for part in first):
            return "multilabel"
    return None


def task_of(config: EncoderConfig) -> Task:
    """The task that a stored model was trained for: by the class in its config.json, then by its problem type."""
    stated: Any = config.architectures
    architecture = str(stated[0]) if isinstance(stated, list) and stated else ""
    for task in TASKS.values():
        if architecture.endswith(task.architecture) and not task.architecture.endswith("SequenceClassification"):
            return task
    if config.problem_type == "multi_label_classification":
        return TASKS["multilabel"]
    numbers = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    return TASKS["regress" if numbers else "classify"]


__all__ = ["TASKS", "Measured", "Task", "aligned", "read_for", "task_named", "task_of"]
