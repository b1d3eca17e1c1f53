"""Splits texts into words, finds the tokens of each word, and reads entities from the tags of words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .spans import widest_window, windows

OUTSIDE = "O"
# Chinese, Japanese and Korean characters that are words of their own.
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_WORD = re.compile(
    rf"""https?://\S+                      # an address
    | [@\#]\w+                             # a name or a topic of a tweet
    | [{_SINGLE}]
    | ['\u2019][^\W{_SINGLE}]+             # 's, 've
    | [^\W{_SINGLE}]+(?:[.,]\d+)*          # letters and digits; 3.5 and 1,000 are one word
    | [^\w\s]                              # a punctuation mark""",
    re.VERBOSE,
)


def words_of(text: str) -> list[tuple[int, int]]:
    """(start, end) of every word, number and punctuation mark of a text."""
    return [match.span() for match in _WORD.finditer(text)]


@dataclass
class WordRows:
    """The rows of tokens that sentences of words become: one row, or several windows where a sentence is long.

    Attributes:
        ids: the tokens of each row, special tokens included.
        sentence: the sentence of each row.
        words: the words that each row answers for; every word with a token is in one row's list.
        columns: the column of the first token of each of these words.
    """

    ids: list[list[int]]
    sentence: list[int]
    words: list[list[int]]
    columns: list[list[int]]


def word_rows(tokenizer: Any, sentences: Sequence[Sequence[str]], max_length: int) -> WordRows:
    """Tokenizes sentences of words, joined by spaces.

    A sentence of more than max_length tokens is cut into windows that share half of their tokens; a word belongs to the
    window in which it is farthest from both ends. A word without a token, such as an invisible mark, belongs to none.

    Raises:
        ValueError: max_length leaves no room for a word; half of a surrogate pair in a word.
    """
    rows = WordRows([], [], [], [])
    if not sentences:
        return rows
    around = tokenizer("")["input_ids"]
    room = max_length - len(around)
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for a word beside {len(around)} special tokens")
    encoded = tokenizer([" ".join(words) for words in sentences], add_special_tokens=False, return_offsets=True)
    for number, words in enumerate(sentences):
        ids, firsts = encoded["input_ids"][number], _first_tokens(words, encoded["offset_mapping"][number])
        ranges = windows(len(ids), room, room // 2)
        homes = {word: widest_window(ranges, token) for word, token in firsts.items()}
        for index, window in enumerate(ranges):
            own = [word for word, home in homes.items() if home == index]
            rows.ids.append([*around[:-1], *ids[window.start : window.stop], around[-1]])
            rows.sentence.append(number)
            rows.words.append(own)
            rows.columns.append([firsts[word] - window.start + len(around) - 1 for word in own])
    return rows


def _first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Word -> its first token, for words that have one."""
    owner: dict[int, int] = {}  # character of the joined text -> word
    begin = 0
    for number, word in enumerate(words):
        owner.update(dict.fromkeys(range(begin, begin + len(word)), number))
        begin += len(word) + 1
    found: dict[int, int] = {}
    for token, (start, end) in enumerate(offsets):
        # By its last character: a token may begin with the space before its word.
        if end > start and (word_number := owner.get(end - 1)) is not None:
            found.setdefault(word_number, token)
    return found


def marks_entities(labels: Sequence[str]) -> bool:
    """Whether labels are those of entities: B- at the begin of one, I- inside, O outside."""
    kinds = [label for label in labels if label != OUTSIDE]
    return bool(kinds) and all(re.match(r"[BI]-.", label) for label in kinds)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities (kind, first word, word behind the last) of the tags of a sentence.

    An entity begins at B-, and at I- where the word before it has another kind, as conlleval and seqeval count.
    """
    found: list[tuple[str, int, int]] = []
    for place, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark not in ("B", "I"):
            continue
        if mark == "I" and found and found[-1][0] == kind and found[-1][2] == place:
            found[-1] = kind, found[-1][1], place + 1
        else:
            found.append((kind, place, place + 1))
    return found
