"""Turns any number of texts into batches of about as many tokens each: tokenising runs ahead of the model, memory is bounded.

Texts are taken in windows. Within a window texts of similar length come together, so that a batch's tokens are shared out
evenly among threads; nothing is padded. A background thread tokenises the next window while the model computes: the
tokenizers library releases the interpreter's lock.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..text.batching import TextPair, tokenize
from ..text.tokenizer import Tokenizer

# Characters of a window for each token of a batch. A window is then some batches: English has 4 characters to a token.
_CHARACTERS = 16
# What an empty text counts for, so that a window of empty texts ends too: its special tokens.
_LEAST = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


def default_batch_tokens(device: torch.device) -> int:
    """Tokens of a batch where the caller does not say: enough to keep the device busy, few enough for a CPU's caches."""
    return 16384 if device.type == "cuda" else 4096


@dataclass(frozen=True)
class TokenBatch:
    """Texts without padding: T tokens of B texts, one text after another.

    indices: which texts of the list these are. ids, types: (T,) int64; types None where the model takes none.
    lengths: the B numbers of tokens. cu_seqlens: (B + 1,) int32, each text's first token, and T at the end.
    """

    indices: list[int]
    ids: Tensor
    types: Tensor | None
    lengths: list[int]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)

    def packed(self, device: torch.device) -> dict[str, Any]:
        """The arguments of a model's `forward_packed` on `device`."""
        types = None if self.types is None else self.types.to(device)
        return {
            "input_ids": self.ids.to(device),
            "cu_seqlens": self.cu_seqlens,  # checked on the CPU
            "max_seqlen": max(self.lengths, default=0),
            "token_type_ids": types,
        }


@dataclass(frozen=True)
class Batching:
    """How texts become batches.

    max_length: tokens that a text is cut to. batch_tokens: a batch ends before it has more; a longer text is a batch of its
    own. batch_size: the same for its texts; None: no limit. types: whether the model takes token types. before: what stands
    before every text.
    """

    tokenizer: Tokenizer
    max_length: int
    batch_tokens: int
    batch_size: int | None = None
    types: bool = True
    before: str = ""

    def batches(self, texts: Sequence[str | TextPair]) -> Iterator[TokenBatch]:
        """The batches of all texts, window by window."""
        for batches in _ahead(lambda window: self._window(texts, window), self._windows(texts)):
            yield from batches

    def _windows(self, texts: Sequence[str | TextPair]) -> Iterator[range]:
        begin, size = 0, 0
        for index, text in enumerate(texts):
            first, second = _pair(text)
            size += len(self.before) + len(first) + len(second or "") + _LEAST
            if size >= _CHARACTERS * self.batch_tokens:
                yield range(begin, index + 1)
                begin, size = index + 1, 0
        if begin < len(texts):
            yield range(begin, len(texts))

    def _window(self, texts: Sequence[str | TextPair], window: range) -> list[TokenBatch]:
        pairs = [_pair(texts[index]) for index in window]
        try:
            rows = tokenize(self.tokenizer, [(self.before + first, second) for first, second in pairs], self.max_length)
        except ValueError:
            _find_surrogate(pairs, window.start)
            raise
        types = rows["token_type_ids"] if self.types else None
        batches = batches_of_rows(rows["input_ids"], types, self.batch_tokens, self.batch_size)
        return [replace(batch, indices=[window[row] for row in batch.indices]) for batch in batches]


def batches_of_rows(
    ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, batch_tokens: int, batch_size: int | None
) -> Iterator[TokenBatch]:
    """Batches of rows of tokens that are made already, rows of similar length together; their indices are those of the rows."""
    for chosen in _by_tokens([len(row) for row in ids], batch_tokens, batch_size):
        flat_types = None if types is None else _flat([types[row] for row in chosen])
        yield TokenBatch(chosen, _flat([ids[row] for row in chosen]), flat_types, [len(ids[row]) for row in chosen])


def _pair(text: str | TextPair) -> TextPair:
    return (text, None) if isinstance(text, str) else (text[0], text[1])


def _find_surrogate(pairs: Sequence[TextPair], first: int) -> None:
    """ValueError for the first text with half of a surrogate pair; the tokenizer would count from the window's begin."""
    for index, pair in enumerate(pairs, first):
        try:
            "".join(text for text in pair if text is not None).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ValueError(f"text {index} holds half a surrogate pair, U+{code:04X}, which is no character") from None


def _by_tokens(lengths: Sequence[int], most: int, size: int | None) -> Iterator[list[int]]:
    """Rows in batches of similar length: the shortest first, equal lengths in their given order."""
    batch: list[int] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (tokens + lengths[row] > most or len(batch) == size):
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += lengths[row]
    if batch:
        yield batch


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)


def _ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """work(item) for each item in order, where the next item's runs in a background thread meanwhile."""
    left = iter(items)
    first = list(itertools.islice(left, 2))
    if len(first) < 2:  # a thread would only cost time
        yield from map(work, first)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="albert_fast-tokenize") as pool:
        coming = pool.submit(work, first[0])
        for item in itertools.chain(first[1:], left):
            done, coming = coming.result(), pool.submit(work, item)
            yield done
        yield coming.result()
