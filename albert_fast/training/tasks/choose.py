"""The task of choosing one of several texts that continue or answer a first one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...models.auto import AutoModelForMultipleChoice
from ...models.encoder_config import EncoderConfig
from ...text.text_files import LABEL_COLUMN, TEXT_COLUMNS, Columns
from ..data import Examples, TokenRows
from ..metrics import compute_metrics
from ..recipe import Recipe
from ..sources import Source, columns_for, name_of, rows_of, text_value, value_of
from .base import ForwardTask, Libraries, Measured, rows_options
from .texts import refuse_one_label

CHOICES = "choices"
NUMBERED = ("choice", "ending")  # choice0, choice1 ... or ending0, ending1 ...
FIRST = (*TEXT_COLUMNS, "question", "sent1")


class ChoiceDataset(TokenRows):
    """Rows of a first text with each of its choices.

    Args:
        texts: N (first text, choices), each with as many choices. labels: N numbers of the right choice.
        tokenizer: see `TextDataset`. max_length: longer pairs are cut. types: whether the model takes token types.
        options: piece_dropout and position_shift, see `TextDataset`.
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, Sequence[str]]],
        labels: Sequence[int],
        tokenizer: Any,
        max_length: int,
        *,
        types: bool = True,
        **options: Any,
    ) -> None:
        self.choices = len(texts[0][1])
        pairs = [(first, choice) for first, choices in texts for choice in choices]
        encoded = tokenizer(pairs, truncation=True, max_length=max_length)
        super().__init__(
            encoded["input_ids"], encoded["token_type_ids"] if types else None, labels, tokenizer, **options
        )
        lengths = self.lengths
        self.lengths = [max(lengths[start : start + self.choices]) for start in range(0, len(pairs), self.choices)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = slice(index * self.choices, (index + 1) * self.choices)
        item = {"input_ids": self.input_ids[rows], "labels": self.labels[index]}
        if self.token_type_ids is not None:
            item["token_type_ids"] = self.token_type_ids[rows]
        return item

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch: labels (B,); input_ids, attention_mask and token_type_ids (B, choices, S)."""
        keys = ("input_ids", "token_type_ids")
        flat = [
            {key: item[key][choice] for key in keys if key in item} | {"labels": 0}
            for item in items
            for choice in range(self.choices)
        ]
        batch = super().collate(flat)
        batch = {key: value.view(len(items), self.choices, -1) for key, value in batch.items() if key != "labels"}
        return batch | {"labels": torch.tensor([item["labels"] for item in items])}


class Choose(ForwardTask):
    """The right one of several choices, from tables with a first text, choice0, choice1 ... (or a list) and the label."""

    name = "choose"
    has_labels = False
    model = AutoModelForMultipleChoice
    architecture = "ForMultipleChoice"
    libraries: ClassVar[Libraries] = {"accuracy": None}

    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        if label_names is not None:
            raise ValueError("label_names: choices are texts, and have no names")
        texts: list[tuple[str, list[str]]] = []
        labels: list[int] = []
        for where, values, first, choices in choice_rows(source, columns):
            if texts and len(choices) != len(texts[0][1]):
                raise ValueError(f"{where}: {len(choices)} choices, but the first row has {len(texts[0][1])}")
            given = value_of(values, columns_for(columns.label, LABEL_COLUMN), where, "the label")
            texts.append((first, choices))
            labels.append(_number(given, choices, where))
        if not texts:
            raise ValueError(f"{name_of(source)}: no examples")
        return Examples(texts, labels, None)

    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """ValueError where the right choice is always the same one."""
        refuse_one_label(Counter(examples.labels), name_of(source), len(examples.labels))

    def describe(self, examples: Examples) -> str:
        return f"{len(examples.texts)} examples with {len(examples.texts[0][1])} choices"

    def lines(self, examples: Examples) -> list[str]:
        return [line for first, choices in examples.texts for line in (first, *choices)]

    def documents(self, examples: Examples) -> list[str]:
        right = zip(examples.texts, examples.labels, strict=True)
        return [f"{first} {choices[label]}" for (first, choices), label in right]

    def default_metric(self, label_names: list[str] | None) -> str:
        return "accuracy"

    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        return config.replace(id2label=None, label2id=None, num_labels=2, problem_type=None)

    def data(
        self, examples: Examples, tokenizer: Any, max_length: int, *, types: bool, recipe: Recipe | None = None
    ) -> TokenRows:
        return ChoiceDataset(
            examples.texts, examples.labels, tokenizer, max_length, types=types, **rows_options(recipe)
        )

    def measured(
        self, loss: float, data: TokenRows, examples: Examples, rows: list[Any], metrics: Sequence[Any], model: Any
    ) -> Measured:
        found = torch.stack(rows).argmax(-1).numpy()
        values = compute_metrics(metrics, torch.tensor(data.labels).numpy(), found) if metrics else {}
        return Measured(loss, values, list(examples.labels), found.tolist())


class ChoiceRow(NamedTuple):
    """A row of a table: its place for error messages, all values by name, the first text and its choices."""

    where: str
    values: dict[str, Any]
    first: str
    choices: list[str]


def choice_rows(source: Source, columns: Columns) -> Iterator[ChoiceRow]:
    """Yields the rows of a source, with or without labels.

    Args:
        columns: the first text; as the pair, the list of choices, or what comes before their numbers.

    Raises:
        ValueError: numbers of columns; a row without a text or choices; the message names the place.
    """
    for name in (columns.text, columns.pair, columns.label):
        if isinstance(name, int):
            raise ValueError(f"{name_of(source)}: column {name} is a number; columns of choices have names")
    for where, values in rows_of(source):
        first = text_value(values, columns_for(columns.text, *FIRST), where, "the first text")
        yield ChoiceRow(where, values, first, _choices(values, columns.pair, where))


def _choices(values: Mapping[str, Any], column: str | int | None, where: str) -> list[str]:
    """The choices of a row: the list in a column, or the texts of choice0, choice1 ..."""
    listed = values.get(CHOICES if column is None else str(column))
    if listed is None:
        for prefix in NUMBERED if column is None else (str(column),):
            names = list(
                itertools.takewhile(values.__contains__, (f"{prefix}{number}" for number in itertools.count()))
            )
            if len(names) > 1:
                return [text_value(values, (name,), where, "a choice") for name in names]
        raise ValueError(
            f"{where}: no choices: expected a list {CHOICES!r}, or texts {NUMBERED[0]}0, {NUMBERED[0]}1 ..."
        )
    texts = listed.get("text") if isinstance(listed, Mapping) else listed
    if not isinstance(texts, (list, tuple)) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: the choices must be a list of at least two texts, got {listed!r:.80}")
    return list(texts)


def _number(label: Any, choices: Sequence[str], where: str) -> int:
    """The number of the right choice, from 0. The label is this number, also as a text, or the text of the choice.

    Raises:
        ValueError: no choice fits, or several do: "1" means the second of the choices "1" and "2", and the first.
    """
    given = label.strip() if isinstance(label, str) else label
    fitting = {number for number, choice in enumerate(choices) if given in (number, str(number), choice.strip())}
    if len(fitting) > 1:
        raise ValueError(
            f"{where}: the label {label!r} fits several choices, by number (from 0) or by text: {choices}; "
            "a number in JSON lines or Parquet is never the text of a choice"
        )
    if not fitting:
        raise ValueError(f"{where}: the label is {label!r}, expected the number of a choice, 0 to {len(choices) - 1}")
    return fitting.pop()


__all__ = ["ChoiceDataset", "ChoiceRow", "Choose", "choice_rows"]
