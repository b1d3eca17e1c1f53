"""Cuts long texts into windows that overlap, and finds the best answers to a question in the windows of its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Starts and ends that are combined in a window, and spans of all windows that share the probability.
CANDIDATES = 20


def windows(count: int, room: int, shared: int) -> list[range]:
    """The ranges of at most `room` places that cover `count` places; neighbours share `shared` places.

    Raises:
        ValueError: unless 0 <= shared < room.
    """
    if not 0 <= shared < room:
        raise ValueError(f"windows of {room} tokens cannot share {shared}")
    starts = range(0, max(count - shared, 1), room - shared)
    return [range(start, min(start + room, count)) for start in starts]


def widest_window(ranges: Sequence[range], place: int) -> int:
    """The number of the window in which `place` is farthest from both ends; the first of equals."""
    holding = [number for number, window in enumerate(ranges) if place in window]
    return max(holding, key=lambda number: min(place - ranges[number].start, ranges[number].stop - 1 - place))


@dataclass
class ContextRows:
    """The rows of tokens that questions and their contexts become: a row for each window of a context.

    Attributes:
        ids, types: the tokens of each row, special tokens included.
        example: the question of each row.
        first: the column of the first token of the context, in each row.
        offsets: (start, end) in characters of the context, of each token of it, in each row.
    """

    ids: list[list[int]]
    types: list[list[int]]
    example: list[int]
    first: list[int]
    offsets: list[list[tuple[int, int]]]


def context_rows(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int, shared: int | None = None
) -> ContextRows:
    """Tokenizes (question, context) pairs; a context that is too long for one row is cut into windows.

    Args:
        max_length: tokens of a row. A question is cut to half of them.
        shared: tokens that neighbouring windows share, at most half a window; None: a third of max_length.

    Raises:
        ValueError: max_length leaves no room for a context; half of a surrogate pair in a text.
    """
    rows = ContextRows([], [], [], [], [])
    if not pairs:
        return rows
    heads = tokenizer(
        [(question, "") for question, _ in pairs], truncation="only_first", max_length=max(3, max_length // 2)
    )
    bodies = tokenizer([context for _, context in pairs], add_special_tokens=False, return_offsets=True)
    for index, (ids, types) in enumerate(zip(heads["input_ids"], heads["token_type_ids"], strict=True)):
        room = max_length - len(ids)
        if room < 2:
            raise ValueError(
                f"max_length {max_length} leaves no room for a context beside the question's {len(ids)} tokens"
            )
        overlap = min(max_length // 3 if shared is None else shared, room // 2)
        body, offsets = bodies["input_ids"][index], bodies["offset_mapping"][index]
        for window in windows(len(body), room, overlap):
            part = slice(window.start, window.stop)
            # The template of every family ends with one special token behind the second text.
            rows.ids.append([*ids[:-1], *body[part], ids[-1]])
            rows.types.append([*types[:-1], *[types[-1]] * len(window), types[-1]])
            rows.example.append(index)
            rows.first.append(len(ids) - 1)
            rows.offsets.append([(start, end) for start, end in offsets[part]])
    return rows


def span_columns(rows: ContextRows, row: int, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last column of the tokens of characters start..end of the context; None: not whole in this row."""
    offsets = rows.offsets[row]
    inside = [column for column, (first, last) in enumerate(offsets) if first < end and last > start]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return None
    return rows.first[row] + inside[0], rows.first[row] + inside[-1]


class Span(NamedTuple):
    """An answer: characters start..end of the context, and its probability. Without an answer start and end are 0."""

    start: int
    end: int
    score: float


def best_spans(
    rows: ContextRows,
    scores: Sequence[tuple[np.ndarray, np.ndarray]],
    examples: int,
    *,
    longest: int = 30,
    may_be_absent: bool = False,
) -> list[Span]:
    """The best answer to each question.

    A span's score is the sum of its start's and its end's. The score of no answer is that of a row's first token, the
    lowest of all windows. Probabilities are the softmax over the best spans, and no answer if it is allowed (Devlin et al. 2018,
    section 4.3).

    Args:
        scores: (S,) scores of starts and of ends, for each row.
        longest: tokens of an answer, at most.
        may_be_absent: whether no answer is allowed.
    """
    found: list[list[tuple[float, int, int]]] = [[] for _ in range(examples)]
    absent = [np.inf] * examples
    for row, (starts, ends) in enumerate(scores):
        example, first, count = rows.example[row], rows.first[row], len(rows.offsets[row])
        absent[example] = min(absent[example], float(starts[0]) + float(ends[0]))
        own_starts, own_ends = starts[first : first + count], ends[first : first + count]
        for start in np.argsort(-own_starts, kind="stable")[:CANDIDATES]:
            for end in np.argsort(-own_ends, kind="stable")[:CANDIDATES]:
                if start <= end < start + longest:
                    place = rows.offsets[row][start][0], rows.offsets[row][end][1]
                    found[example].append((float(own_starts[start]) + float(own_ends[end]), *place))
    return [
        _best(sorted(set(spans), key=lambda span: -span[0])[:CANDIDATES], nothing if may_be_absent else None)
        for spans, nothing in zip(found, absent, strict=True)
    ]


def _best(spans: list[tuple[float, int, int]], absent: float | None) -> Span:
    choices = spans if absent is None else [*spans, (absent, 0, 0)]
    if not choices:
        return Span(0, 0, 1.0)  # a context without a token
    scores = np.array([score for score, _, _ in choices])
    weights = np.exp(scores - scores.max())
    best = int(scores.argmax())
    return Span(choices[best][1], choices[best][2], float(weights[best] / weights.sum()))


def trimmed(context: str, span: Span) -> Span:
    """The span without the spaces around it, which a vocabulary counts to a word."""
    text = context[span.start : span.end]
    start = span.start + len(text) - len(text.lstrip())
    return Span(start, start + len(text.strip()), span.score)


def answer_text(context: str, span: Span) -> str:
    """The characters of a span; "" without an answer."""
    return context[span.start : span.end].strip()
