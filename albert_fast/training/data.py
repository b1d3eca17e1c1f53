"""Reads labelled text, turns it into batches of tokens, and draws batches of similar length.

Example:

    dataset = TextDataset.from_file("train.tsv", tokenizer, max_length=128)
    sampler = LengthBucketSampler(dataset.lengths, batch_size=32, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..text.batching import batches_by_length, pad_rows
from ..text.text_files import LABEL_COLUMN, Columns, Record, read_table


@dataclass
class Examples:
    """What a model is trained or measured on, for each task:

    | task | texts | labels | label_names |
    |---|---|---|---|
    | classify | str or (str, str) | ids of classes, or the probabilities of all | the classes |
    | regress | str or (str, str) | numbers | None |
    | multilabel | str or (str, str) | 0.0 or 1.0 for each label | the labels |
    | tag | lists of words | lists of ids, one for each word | the tags |
    | answer | (question, context) | lists of (answer, first character), empty without one | None |
    | choose | (first text, list of choices) | the number of the right choice | None |
    | translation | str, the source | str, the target | None |
    """

    texts: Sequence[Any]
    labels: Sequence[Any]
    label_names: list[str] | None


def read_examples(
    path: str | Path,
    *,
    text_column: str | int | None = None,
    pair_column: str | int | None = None,
    label_column: str | int | None = None,
    label_names: Sequence[str] | None = None,
    kind: str | None = None,
) -> Examples:
    """Reads .tsv (tab-separated, no quoting), .csv (comma-separated, quoted) or .jsonl (an object on each line), also .gz.

    Args:
        text_column: name in the header, or number from 0 in a file without one; default: text, sentence or review.
        pair_column: the second text of each example, for tasks over pairs; default: text_pair, if there is one.
        label_column: default: label.
        label_names: the classes in the order of their ids; the file's labels are these names or their ids. Default: found
            in the file: whole numbers 0..n-1 are ids, other numbers are values to predict, words are sorted and
            numbered. In .jsonl a label may also be a list, the probability of each class.
        kind: "classes" or "numbers": what the labels are, whatever they look like.

    Raises:
        ValueError: an unknown suffix, a missing column, a row with more or fewer fields than the others, a text that is
            not a string, an empty label or one outside `label_names`, bytes that are not UTF-8, a file without examples;
            the message names the file, the line and the column. See `albert_fast.text.text_files` for the formats.
    """
    rows = list(
        read_table(path, Columns(text_column, pair_column, LABEL_COLUMN if label_column is None else label_column))
    )
    if not rows:
        raise ValueError(f"{path}: no examples")
    return examples_of(rows, [f"{path}, line {row.line}" for row in rows], label_names, kind)


def examples_of(
    rows: Sequence[Record], sources: Sequence[str], label_names: Sequence[str] | None, kind: str | None = None
) -> Examples:
    """The examples of rows with labels; see `read_examples`. `sources` name the rows in error messages."""
    return Examples(texts_of(rows, sources), *_labels([row.label for row in rows], label_names, sources, kind))


def texts_of(rows: Sequence[Record], sources: Sequence[str]) -> list[str] | list[tuple[str, str]]:
    """The texts; pairs of texts if every row has a second one."""
    single = next((source for row, source in zip(rows, sources, strict=True) if row.pair is None), None)
    if single is None:
        return [(row.text, row.pair or "") for row in rows]
    if paired := next((source for row, source in zip(rows, sources, strict=True) if row.pair is not None), None):
        raise ValueError(f"{single}: no second text, which {paired} has; all rows need one, or none")
    return [row.text for row in rows]


def _labels(
    labels: Sequence[Any], label_names: Sequence[str] | None, sources: Sequence[str], kind: str | None
) -> tuple[list[int] | list[float] | list[list[float]], list[str] | None]:
    """Returns (ids, names), (numbers, None) or (probabilities of the classes, names). `sources` are for error messages."""
    soft = [isinstance(label, list) for label in labels]
    if not any(soft):
        return encode_labels([str(label) for label in labels], label_names, sources, kind)
    if not all(soft):
        raise ValueError(
            f"{sources[soft.index(False)]}: the label is one value, but that of {sources[soft.index(True)]} is a list of "
            "probabilities; all rows need the same kind"
        )
    names = [str(i) for i in range(len(labels[0]))] if label_names is None else list(label_names)
    for source, label in zip(sources, labels, strict=True):
        if len(label) != len(names) or abs(sum(label) - 1) > 1e-2 or min(label) < 0:
            raise ValueError(f"{source}: the label is {label}, expected {len(names)} probabilities")
    return list(labels), names


def encode_labels(
    labels: Sequence[str],
    label_names: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    kind: str | None = None,
) -> tuple[list[int] | list[float], list[str] | None]:
    """Turns the labels of a file into (ids, names) or (numbers, None); see `read_examples`.

    Args:
        sources: where each label is, for error messages; default: "label 0" and so on.
    """

    def source(index: int) -> str:
        return f"label {index}" if sources is None else sources[index]

    if label_names is not None:
        index = {str(i): i for i in range(len(label_names))} | {name: i for i, name in enumerate(label_names)}
        wrong = next((i for i, label in enumerate(labels) if label not in index), None)
        if wrong is not None:
            raise ValueError(f"{source(wrong)}: the label is {labels[wrong]!r}, expected one of {list(label_names)}")
        return [index[label] for label in labels], list(label_names)
    try:
        numbers = [float(label) for label in labels]
    except ValueError as error:
        if kind == "numbers":
            wrong = next(i for i, label in enumerate(labels) if not _is_number(label))
            raise ValueError(f"{source(wrong)}: the label {labels[wrong]!r} is not a number") from error
        return numbered(labels, sorted(set(labels)))
    wrong = next((i for i, number in enumerate(numbers) if not math.isfinite(number)), None)
    if wrong is not None:
        raise ValueError(f"{source(wrong)}: the label {labels[wrong]!r} is not a finite number")
    if kind == "classes":
        return numbered(labels, sorted(set(labels), key=float))
    whole = {int(number) for number in numbers if number == int(number) >= 0}
    if kind == "numbers":
        return numbers, None
    if all(number in whole for number in numbers) and whole == set(range(len(whole))) and len(whole) > 1:
        return [int(number) for number in numbers], [str(i) for i in range(len(whole))]
    return numbers, None


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def numbered(labels: Sequence[str], names: list[str]) -> tuple[list[int], list[str]]:
    """The place of each label among the names, and the names."""
    ids = {name: i for i, name in enumerate(names)}
    return [ids[label] for label in labels], names


class TokenRows(Dataset[dict[str, Any]]):
    """A data set of rows of tokens and their labels; the base of the data sets of every task.

    left_out: a line for the user about what is not in the rows, and why; None where nothing is missing.

    Args:
        ids: N rows of tokens, special tokens included. types: their token types; None where the model takes none.
        labels: N labels, in whatever form `label_tensors` makes tensors of.
        tokenizer, piece_dropout, position_shift: as for `TextDataset`.

    Raises:
        ValueError: see `TextDataset`.
    """

    left_out: str | None = None

    def __init__(
        self,
        ids: list[list[int]],
        types: list[list[int]] | None,
        labels: Sequence[Any],
        tokenizer: Any,
        *,
        piece_dropout: float = 0.0,
        position_shift: int = 0,
    ) -> None:
        if not 0 <= piece_dropout < 1:
            raise ValueError(f"piece_dropout must lie in [0, 1), got {piece_dropout}")
        if position_shift < 0:
            raise ValueError(f"position_shift must not be negative, got {position_shift}")
        if piece_dropout and tokenizer.mask_token_id is None:
            raise ValueError("piece_dropout needs a tokenizer with a mask token")
        self.input_ids, self.token_type_ids, self.labels = ids, types, list(labels)
        self.lengths = [len(row) for row in ids]
        self.pad_id = int(tokenizer.pad_token_id)
        self.mask_id: int | None = tokenizer.mask_token_id
        self.special_ids = torch.tensor(sorted({int(i) for i in tokenizer.all_special_ids}), dtype=torch.int64)
        self.piece_dropout, self.position_shift = piece_dropout, position_shift

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        if self.token_type_ids is not None:
            item["token_type_ids"] = self.token_type_ids[index]
        return item

    def label_tensors(self, items: Sequence[Mapping[str, Any]], columns: int) -> dict[str, Tensor]:
        """The labels of a batch of `columns` columns, by the names that the model takes."""
        return {"labels": torch.tensor([item["labels"] for item in items])}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch: the labels; input_ids, attention_mask and token_type_ids (B, S), padded on the right."""
        batch = {"input_ids": pad_rows([item["input_ids"] for item in items], self.pad_id)}
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        columns = batch["input_ids"].shape[1]
        batch["attention_mask"] = (torch.arange(columns) < lengths[:, None]).long()
        if self.token_type_ids is not None:
            batch["token_type_ids"] = pad_rows([item["token_type_ids"] for item in items], 0)
        if self.position_shift:
            starts = torch.randint(self.position_shift + 1, (len(items), 1))
            batch["position_ids"] = starts + torch.arange(columns)
        batch |= self.label_tensors(items, columns)
        if self.piece_dropout:
            assert self.mask_id is not None
            dropped = torch.rand(batch["input_ids"].shape, dtype=torch.float32) < self.piece_dropout
            batch["input_ids"][dropped & ~torch.isin(batch["input_ids"], self.special_ids)] = self.mask_id
        return batch


class TextDataset(TokenRows):
    """A data set of tokenized texts (or pairs of texts) and their labels.

    Args:
        texts: N strings, or N pairs of strings.
        labels: N ints (classes), floats (values) or lists of C floats (probabilities of the classes).
        tokenizer: `albert_fast.text.tokenizer.Tokenizer`, or any callable with Hugging Face's arguments.
        max_length: longer texts are cut to this many tokens, special tokens included.
        piece_dropout: share of the ordinary tokens that `collate` replaces by the mask token: a regulariser for training
            from scratch (word dropout, Iyyer et al. 2015, section 3.1).
        position_shift: `collate` adds `position_ids` that start at a random number from 0 to this one, so that a model
            trained from scratch on short texts also learns the positions of long ones.
        token_types: whether the model takes token types: its encoder's `takes_types`.

    Raises:
        ValueError: the numbers of texts and labels differ; a piece_dropout outside [0, 1), or without a mask token; a
            negative position_shift.
    """

    def __init__(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        labels: Sequence[int] | Sequence[float] | Sequence[Sequence[float]],
        tokenizer: Any,
        max_length: int = 512,
        *,
        piece_dropout: float = 0.0,
        position_shift: int = 0,
        token_types: bool = True,
    ) -> None:
        if len(texts) != len(labels):
            raise ValueError(f"{len(texts)} texts but {len(labels)} labels")
        encoded = tokenizer(list(texts), truncation=True, max_length=max_length) if len(texts) else {"input_ids": []}
        types = encoded.get("token_type_ids") if token_types else None
        super().__init__(
            encoded["input_ids"], types, labels, tokenizer, piece_dropout=piece_dropout, position_shift=position_shift
        )
        if full := sum(length >= max_length for length in self.lengths):
            self.left_out = (
                f"{full:,} of {len(texts):,} texts fill max_length = {max_length} tokens; what they have beyond is cut"
            )

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Any, max_length: int = 512, **options: Any) -> TextDataset:
        """Reads a TSV, CSV or JSONL file; the options are those of `read_examples`, and `piece_dropout`."""
        piece_dropout = options.pop("piece_dropout", 0.0)
        examples = read_examples(path, **options)
        return cls(examples.texts, examples.labels, tokenizer, max_length, piece_dropout=piece_dropout)


class LengthBucketSampler(Sampler[list[int]]):
    """Draws batches of examples of similar length, so that little of a batch is padding; a batch_sampler for DataLoader.

    Each epoch shuffles all examples, sorts every `window` batches by length, cuts them into batches and shuffles these.
    The batches depend only on (seed, epoch): `set_epoch(epoch, first_batch)` restarts anywhere.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch; the last batch may have fewer.
        shuffle: False: sorted by length, the same in every epoch.
        window: batches that are sorted together; 1 gives plain random batches.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, shuffle: bool = True, seed: int = 0, window: int = 50
    ) -> None:
        if batch_size < 1 or window < 1:
            raise ValueError(f"batch_size and window must be positive, got {batch_size} and {window}")
        self.lengths = list(lengths)
        self.batch_size, self.shuffle, self.seed, self.window = batch_size, shuffle, seed, window
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Makes the next pass that of `epoch` (from 0), without its first `first_batch` batches."""
        if epoch < 0 or not 0 <= first_batch <= self.batches_per_epoch:
            raise ValueError(f"no batch {first_batch} of {self.batches_per_epoch} in epoch {epoch}")
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __len__(self) -> int:
        return self.batches_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            batches = batches_by_length(self.lengths, self.batch_size)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
            drawn: list[list[int]] = []
            for start in range(0, len(order), self.batch_size * self.window):
                run = order[start : start + self.batch_size * self.window]
                sorted_run = batches_by_length([self.lengths[i] for i in run], self.batch_size)
                drawn += [[run[i] for i in batch] for batch in sorted_run]
            batches = [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]
        yield from batches[self.first_batch :]


__all__ = [
    "Examples",
    "LengthBucketSampler",
    "TextDataset",
    "TokenRows",
    "encode_labels",
    "examples_of",
    "numbered",
    "read_examples",
    "texts_of",
]
