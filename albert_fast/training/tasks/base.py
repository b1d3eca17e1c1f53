"""What a task is: how its examples are read, prepared and measured; the base class of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from ...models.encoder_config import EncoderConfig
from ...text.text_files import Columns
from ..data import Examples, LengthBucketSampler, TokenRows
from ..loop import test
from ..metrics import Metric, require_library
from ..recipe import Recipe
from ..sources import Source

# Metric -> (module to import, name of the library); None: it needs no library.
Libraries = Mapping[str, tuple[str, str] | None]


@dataclass(frozen=True)
class Measured:
    """A model's figures on a data set.

    Attributes:
        loss: the mean over the examples; over the words for tags, over the targets' tokens for translations, and over the windows
            of the contexts for answers.
        metrics: by name.
        expected, predicted: of each example, in their order and as users write them: names of classes, numbers, lists of labels
            or tags, answers, numbers of choices.
    """

    loss: float
    metrics: dict[str, float]
    expected: list[Any] = field(repr=False)
    predicted: list[Any] = field(repr=False)


class Task(ABC):
    """How examples of one kind are read, prepared and measured.

    name: as `--task` takes it. model: the AutoModel class. architecture: the end of the names of its classes. libraries: each
    metric, with what it needs. has_labels: whether its labels have names. smooths_labels,
    weighs_classes: whether label_smoothing and class_weights of a recipe apply. encoder_alone: whether pre-training, piece_dropout
    and position_shift do. vocabulary: arguments of `train_tokenizer` for a new vocabulary.
    """

    name: ClassVar[str]
    model: ClassVar[Any]
    architecture: ClassVar[str]
    libraries: ClassVar[Libraries]
    has_labels: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True
    weighs_classes: ClassVar[bool] = False
    encoder_alone: ClassVar[bool] = True
    vocabulary: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        """Reads the examples of a file or data set.

        Args:
            columns: names of columns that are not the usual ones.
            label_names: the labels in the order of their ids; None: found in the source.

        Raises:
            ValueError: a source that cannot be read, or that has no examples; the message names the place.
        """

    def read_split(
        self, source: Source, columns: Columns, label_names: Sequence[str] | None, *, for_metrics: bool
    ) -> Examples:
        """`read` for a set to measure a model on. ValueError: labels that the model does not have."""
        return self.read(source, columns, label_names)

    @abstractmethod
    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """Refuses training examples that teach nothing. ValueError: see the task."""

    @abstractmethod
    def describe(self, examples: Examples) -> str:
        """One line about the number of examples and their labels."""

    def lines(self, examples: Examples) -> list[str]:
        """All texts of the examples, for a vocabulary."""
        return [line for text in examples.texts for line in ([text] if isinstance(text, str) else text)]

    def documents(self, examples: Examples) -> list[str]:
        """One text for each example, for masked language modelling."""
        return [text if isinstance(text, str) else " ".join(text) for text in examples.texts]

    @abstractmethod
    def default_metric(self, label_names: list[str] | None) -> str:
        """The metric that chooses the best epoch if the recipe names none."""

    def check_metrics(self, wanted: Sequence[str | Metric]) -> None:
        """Refuses metrics that could not be computed, before a run.

        Raises:
            ValueError: a name that the task does not know. ImportError: its library is not installed.
        """
        for metric in [wanted] if isinstance(wanted, str) else wanted:
            if metric not in self.libraries:
                raise ValueError(f"the task {self.name} has no metric {metric!r}; known: {', '.join(self.libraries)}")
            if (needed := self.libraries[str(metric)]) is not None:
                require_library(str(metric), *needed)

    def new_config(self, max_length: int, **sizes: Any) -> EncoderConfig | None:
        """The configuration of a new model for texts of `max_length` tokens, with some fields given; None: any encoder's."""
        return None

    @abstractmethod
    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        """A configuration with the task's labels."""

    @abstractmethod
    def data(
        self, examples: Examples, tokenizer: Any, max_length: int, *, types: bool, recipe: Recipe | None = None
    ) -> TokenRows:
        """The data set of the examples.

        Args:
            types: whether the model takes token types.
            recipe: of the training set, whose tokens it drops and moves; None: to measure a model.
        """

    def criterion(self, recipe: Recipe, examples: Examples) -> nn.Module | None:
        """The loss to train with; None: the model's own."""
        weight = class_weights(examples, recipe) if self.weighs_classes else None
        return nn.CrossEntropyLoss(weight=weight, label_smoothing=recipe.label_smoothing)

    @abstractmethod
    def measure(
        self,
        model: nn.Module,
        data: TokenRows,
        examples: Examples,
        *,
        metrics: Sequence[str | Metric],
        batch_size: int,
        device: torch.device | str,
        progress: bool,
    ) -> Measured:
        """The figures of a model on the data set of `examples`."""


class ForwardTask(Task):
    """A task whose figures come from what a forward gives for each row."""

    def measure(
        self,
        model: nn.Module,
        data: TokenRows,
        examples: Examples,
        *,
        metrics: Sequence[str | Metric],
        batch_size: int,
        device: torch.device | str,
        progress: bool,
    ) -> Measured:
        sampler = LengthBucketSampler(data.lengths, batch_size, shuffle=False)
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate)
        batches, rows = iter(sampler), [None] * len(data)

        def keep(outputs: Any) -> None:
            chosen = next(batches)
            for index, row in zip(chosen, self.rows(outputs, data, chosen), strict=True):
                rows[index] = row

        loss = test(model, loader, None, device, after_batch=keep, progress=progress)
        return self.measured(loss, data, examples, rows, metrics, model)

    def rows(self, outputs: Any, data: TokenRows, chosen: list[int]) -> Sequence[Any]:
        """What is kept of a model's outputs for each row of a batch, on the CPU."""
        logits: torch.Tensor = outputs.logits if hasattr(outputs, "logits") else outputs
        return list(logits.float().cpu())

    @abstractmethod
    def measured(
        self, loss: float, data: TokenRows, examples: Examples, rows: list[Any], metrics: Sequence[Any], model: Any
    ) -> Measured:
        """The figures of what `rows` kept of each row of the data set."""


def class_weights(examples: Examples, recipe: Recipe) -> torch.Tensor | None:
    """The weight (C,) of each class in the loss: so that all classes weigh the same in sum, or None.

    Raises:
        ImportError: scikit-learn is not installed. ValueError: labels that are probabilities.
    """
    if recipe.class_weights is None:
        return None
    try:
        from sklearn.utils.class_weight import compute_class_weight
    except ImportError as error:
        raise ImportError("class_weights needs scikit-learn: pip install 'albert-fast[train]'") from error
    assert examples.label_names is not None
    labels = torch.tensor(
        [one for label in examples.labels for one in (label if isinstance(label, (list, tuple)) else [label])]
    )
    if labels.is_floating_point():
        raise ValueError("class_weights needs one class an example, and the labels are probabilities")
    present = labels.unique()
    weights = torch.ones(len(examples.label_names), dtype=torch.float32)
    balanced = compute_class_weight(recipe.class_weights, classes=present.numpy(), y=labels.numpy())
    weights[present] = torch.from_numpy(balanced).float()
    return weights


def rows_options(recipe: Recipe | None) -> dict[str, Any]:
    """The arguments of `TokenRows` for a training set."""
    if recipe is None:
        return {}
    return {"piece_dropout": recipe.piece_dropout, "position_shift": recipe.position_shift}


__all__ = ["ForwardTask", "Libraries", "Measured", "Task", "class_weights", "rows_options"]
