"""Turns texts into padded batches of similar length, so that little of a batch is padding; tasks and training share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .tokenizer import Tokenizer

# A text, and the second text of a pair or None.
TextPair = tuple[str, "str | None"]


def for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, set to read "[SEP]" or "<pad>" in a text as text and not as a control token: strangers write the texts."""
    tokenizer.split_special_tokens = True
    return tokenizer


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of rows in batches of similar length: the shortest rows first, equal lengths in their given order.

    Args:
        lengths: tokens of each row.
        batch_size: rows in each batch; the last batch may have fewer.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def tokenize(tokenizer: Tokenizer, texts: Sequence[TextPair], max_length: int) -> dict[str, list[list[int]]]:
    """Ids and masks of texts and pairs in any mixture, each cut to `max_length` tokens: key -> one row for each text."""
    rows: dict[str, list[list[int]]] = {}
    singles = [index for index, (_, pair) in enumerate(texts) if pair is None]
    pairs = [index for index, (_, pair) in enumerate(texts) if pair is not None]
    for chosen, inputs in (
        (singles, [texts[index][0] for index in singles]),
        (pairs, [(texts[index][0], texts[index][1] or "") for index in pairs]),
    ):
        for key, values in tokenizer(inputs, max_length=max_length).items():
            column = rows.setdefault(key, [[] for _ in texts])
            for index, value in zip(chosen, values, strict=True):
                column[index] = value
    return rows


def padded_batches(
    tokenizer: Tokenizer, rows: Mapping[str, Sequence[list[int]]], batch_size: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of rows as `tokenize` returns them: (indices of the rows, int64 tensors (B, S) by name)."""
    for chosen in batches_by_length([len(ids) for ids in rows["input_ids"]], batch_size):
        yield chosen, tokenizer.collate({key: [values[index] for index in chosen] for key, values in rows.items()})


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of unequal length -> int64 (B, S), padded on the right with `value`; for tokenizers without `collate`."""
    import torch

    width = max((len(row) for row in rows), default=0)
    padded = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), width)
