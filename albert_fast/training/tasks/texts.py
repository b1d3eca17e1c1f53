"""The tasks over whole texts and pairs of texts: one class, a number, or any of several labels for each."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ...models.auto import AutoModelForSequenceClassification
from ...models.encoder_config import EncoderConfig
from ...text.text_files import LABEL_COLUMN, Columns
from ..data import Examples, TextDataset, TokenRows, examples_of, read_examples, texts_of
from ..metrics import LIBRARIES, METRICS, OF_CLASSES, Metric, check_metrics, compute_metrics
from ..recipe import Recipe
from ..sources import Source, is_data_set, labelled_records, name_of
from .base import ForwardTask, Libraries, Measured, rows_options

FEW_CLASSES = 10  # up to this many are listed by name


def read_labelled(source: Source, columns: Columns, label_names: Sequence[str] | None, kind: str | None) -> Examples:
    """`read_examples` of a file, or of the rows of a data set."""
    if not is_data_set(source):
        return read_examples(
            source,
            text_column=columns.text,
            pair_column=columns.pair,
            label_column=columns.label,
            label_names=label_names,
            kind=kind,
        )
    records, places = labelled_records(source, columns)
    if not records:
        raise ValueError(f"{name_of(source)}: no examples")
    return examples_of(records, places, label_names, kind)


class _Texts(ForwardTask):
    """What the three have in common: their model and data set."""

    model = AutoModelForSequenceClassification
    architecture = "ForSequenceClassification"

    def data(
        self, examples: Examples, tokenizer: Any, max_length: int, *, types: bool, recipe: Recipe | None = None
    ) -> TokenRows:
        return TextDataset(
            examples.texts, examples.labels, tokenizer, max_length, token_types=types, **rows_options(recipe)
        )


class Classify(_Texts):
    """One class for each text or pair."""

    name = "classify"
    libraries: ClassVar[Libraries] = {name: LIBRARIES.get(name) for name in OF_CLASSES}
    weighs_classes = True

    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        return read_labelled(source, columns, label_names, "classes")

    def read_split(
        self, source: Source, columns: Columns, label_names: Sequence[str] | None, *, for_metrics: bool
    ) -> Examples:
        examples = read_labelled(source, columns, label_names, None)
        if for_metrics and holds_probabilities(examples):
            raise ValueError(
                f"{name_of(source)}: labels are probabilities; metrics need one label an example (a loss does not)"
            )
        return examples

    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """ValueError where all labels are equal, or nearly all are different words; warns of a given class without example."""
        counts, file = _counts(examples), name_of(source)
        words = given_names is None and not holds_probabilities(examples)
        if words and len(counts) > max(FEW_CLASSES, len(examples.labels) // 2):
            several = any("," in name for name in counts)
            hint = "; several labels for an example, with commas between, are --task multilabel" if several else ""
            raise ValueError(
                f"{file}: {len(counts)} different labels for {len(examples.labels)} examples; is the label column right?{hint}"
            )
        refuse_one_label(counts, file, len(examples.labels))
        if given_names is not None and not holds_probabilities(examples):
            absent = [name for name in given_names if name not in counts]
            if absent:
                warnings.warn(f"{file}: no example has the label {', '.join(map(repr, absent))}", stacklevel=4)

    def describe(self, examples: Examples) -> str:
        assert examples.label_names is not None
        total = f"{len(examples.texts)} examples"
        if holds_probabilities(examples):
            return f"{total}, labels are probabilities of {len(examples.label_names)} classes"
        return f"{total}, {describe_classes(_counts(examples), examples.label_names, 'classes')}"

    def default_metric(self, label_names: list[str] | None) -> str:
        return "accuracy"

    def check_metrics(self, wanted: Sequence[str | Metric]) -> None:
        check_metrics(wanted)

    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        assert examples.label_names is not None
        names = dict(enumerate(examples.label_names))
        return config.replace(id2label=names, label2id=None, problem_type="single_label_classification")

    def measured(
        self, loss: float, data: TokenRows, examples: Examples, rows: list[Any], metrics: Sequence[Any], model: Any
    ) -> Measured:
        found = torch.stack(rows).argmax(-1).numpy()
        values = compute_metrics(metrics, np.asarray(data.labels), found) if metrics else {}
        names = examples.label_names or []
        expected = (
            examples.labels if holds_probabilities(examples) else [names[int(label)] for label in examples.labels]
        )
        return Measured(loss, values, list(expected), [names[label] for label in found.tolist()])


class Regress(_Texts):
    """A number for each text or pair."""

    name = "regress"
    has_labels = False
    libraries: ClassVar[Libraries] = {name: LIBRARIES.get(name) for name in METRICS if name not in OF_CLASSES}
    smooths_labels = False

    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        return read_labelled(source, columns, None, "numbers")

    def read_split(
        self, source: Source, columns: Columns, label_names: Sequence[str] | None, *, for_metrics: bool
    ) -> Examples:
        examples = read_labelled(source, columns, None, None)
        if examples.label_names is None:
            return examples
        if holds_probabilities(examples):
            raise ValueError(f"{name_of(source)}: labels are probabilities, and the model predicts numbers")
        try:
            names = [float(name) for name in examples.label_names]
        except ValueError:
            found = ", ".join(map(repr, examples.label_names[:3]))
            raise ValueError(f"{name_of(source)}: labels are words ({found}), and the model predicts numbers") from None
        return Examples(examples.texts, [names[int(i)] for i in examples.labels], None)

    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """ValueError where all labels are equal."""
        refuse_one_label(_counts(examples), name_of(source), len(examples.labels))

    def describe(self, examples: Examples) -> str:
        counts = _counts(examples)
        line = f"{len(examples.texts)} examples, labels are numbers to predict, {min(counts):g} to {max(counts):g}"
        if all(float(value).is_integer() for value in counts) and len(counts) <= FEW_CLASSES:
            names = ",".join(f"{value:g}" for value in sorted(counts))
            line += f" (to make classes of them: label_names, --label-names {names})"
        return line

    def default_metric(self, label_names: list[str] | None) -> str:
        return "mse"

    def check_metrics(self, wanted: Sequence[str | Metric]) -> None:
        check_metrics(wanted, numbers=True)

    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        return config.replace(id2label=None, label2id=None, num_labels=1, problem_type="regression")

    def criterion(self, recipe: Recipe, examples: Examples) -> nn.Module:
        return nn.MSELoss()

    def measured(
        self, loss: float, data: TokenRows, examples: Examples, rows: list[Any], metrics: Sequence[Any], model: Any
    ) -> Measured:
        found = torch.stack(rows).flatten().numpy()
        values = compute_metrics(metrics, np.asarray(data.labels, dtype=np.float32), found) if metrics else {}
        return Measured(loss, values, list(examples.labels), [float(value) for value in found])


class Multilabel(_Texts):
    """Any of several labels for each text or pair: a list in JSON, words separated by commas in other tables."""

    name = "multilabel"
    libraries: ClassVar[Libraries] = {name: LIBRARIES.get(name) for name in ("f1", "precision", "recall", "accuracy")}
    smooths_labels = False

    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        records, places = labelled_records(source, columns)
        if not records:
            raise ValueError(f"{name_of(source)}: no examples")
        given = [_several(record.label, where) for record, where in zip(records, places, strict=True)]
        names = sorted({label for labels in given for label in labels}) if label_names is None else list(label_names)
        for labels, where in zip(given, places, strict=True):
            if wrong := next((label for label in labels if label not in names), None):
                raise ValueError(f"{where}: the label is {wrong!r}, expected some of {names}")
        rows = [[float(name in labels) for name in names] for labels in given]
        return Examples(texts_of(records, places), rows, names)

    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """ValueError where no example has a label, or nearly all labels are different."""
        names, file = examples.label_names or [], name_of(source)
        if not names:
            raise ValueError(f"{file}: no example has a label; is the column {LABEL_COLUMN!r} the right one?")
        if given_names is None and len(names) > max(FEW_CLASSES, len(examples.labels) // 2):
            raise ValueError(
                f"{file}: {len(names)} different labels for {len(examples.labels)} examples; is the label column right?"
            )

    def describe(self, examples: Examples) -> str:
        names = examples.label_names or []
        counts = Counter(name for row in examples.labels for name, has in zip(names, row, strict=True) if has)
        return f"{len(examples.texts)} examples, {describe_classes(counts, names, 'labels, several for an example')}"

    def default_metric(self, label_names: list[str] | None) -> str:
        return "f1"

    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        assert examples.label_names is not None
        names = dict(enumerate(examples.label_names))
        return config.replace(id2label=names, label2id=None, problem_type="multi_label_classification")

    def criterion(self, recipe: Recipe, examples: Examples) -> nn.Module:
        return nn.BCEWithLogitsLoss()

    def measured(
        self, loss: float, data: TokenRows, examples: Examples, rows: list[Any], metrics: Sequence[Any], model: Any
    ) -> Measured:
        found, truth = (torch.stack(rows) > 0).numpy(), np.asarray(examples.labels) > 0
        # accuracy: all labels of an example are right; the others count each label of each example
        exact = float((truth == found).all(axis=1).mean())
        counted = compute_metrics([name for name in metrics if name != "accuracy"], truth.ravel(), found.ravel())
        values = {name: exact if name == "accuracy" else counted[name] for name in metrics}
        names = np.asarray(examples.label_names or [], dtype=object)
        return Measured(loss, values, [list(names[row]) for row in truth], [list(names[row]) for row in found])


def _several(label: Any, where: str) -> list[str]:
    """The labels of an example: a list of strings, or a string of words separated by commas, which may be empty."""
    parts = label.split(",") if isinstance(label, str) else label
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}: expected a list of labels, or labels separated by commas, got {label!r:.80}")
    return [part.strip() for part in parts if part.strip()]


def holds_probabilities(examples: Examples) -> bool:
    return isinstance(examples.labels[0], list)


def refuse_one_label(counts: Counter[Any], file: str, total: int) -> None:
    if len(counts) == 1:
        raise ValueError(
            f"{file}: all {total} examples have the label {next(iter(counts))!r}: "
            "there is nothing to learn; is the label column right?"
        )


def describe_classes(counts: Counter[Any], names: Sequence[str], what: str) -> str:
    """The classes with their numbers of examples, or where there are many, how many."""
    if len(counts) <= FEW_CLASSES:
        return f"{len(names)} {what}: " + ", ".join(f"{name} ({counts[name]})" for name in names)
    return f"{len(names)} {what}, the rarest with {min(counts.values())} examples"


def _counts(examples: Examples) -> Counter[Any]:
    """Counts the examples of each label."""
    names = examples.label_names
    if holds_probabilities(examples):
        return Counter(tuple(row) for row in examples.labels)
    return Counter(label if names is None else names[int(label)] for label in examples.labels)


__all__ = ["Classify", "Multilabel", "Regress", "describe_classes", "holds_probabilities", "read_labelled"]
