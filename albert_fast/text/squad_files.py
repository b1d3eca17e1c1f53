"""Reads questions, contexts and answers from JSON files of the form of SQuAD 1.1 and 2.0."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Question:
    """A question.

    Attributes:
        key: its id. answers: (text, first character in the context) of each right answer; none: the context has no answer.
    """

    key: Any
    question: str
    context: str
    answers: list[tuple[str, int]]


def is_squad(path: str | Path) -> bool:
    """Whether the ending of a name is that of a JSON file."""
    return str(path).lower().removesuffix(".gz").endswith(".json")


def read_squad(path: str | Path) -> list[Question]:
    """All questions of a file, also .gz: data / paragraphs / context and qas / id, question, answers / text, answer_start.

    Raises:
        ValueError: no JSON, another form, or an answer that is not in its context; the message names the question. OSError: see
            `open`.
    """
    name = str(path)
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if name.lower().endswith(".gz") else raw
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    found = []
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    found.append(_question(name, paragraph["context"], asked))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: not of SQuAD's form, data / paragraphs / context and qas / question, answers: {error!r}"
        ) from error
    return found


def _question(name: str, context: Any, asked: dict[str, Any]) -> Question:
    key, question = asked.get("id"), asked["question"]
    where = f"{name}, question {key!r}"
    if not isinstance(question, str) or not isinstance(context, str):
        raise ValueError(f"{where}: the question and the context must be strings")
    answers = [] if asked.get("is_impossible") else asked.get("answers", [])
    places = [place_of(answer["text"], context, answer.get("answer_start"), where) for answer in answers]
    return Question(key, question, context, places)


def place_of(answer: Any, context: str, start: Any, where: str) -> tuple[str, int]:
    """(answer, its first character in the context): at `start`, or where it occurs nearest to it or first.

    An answer whose words are split otherwise ("it 's" for "it's") is found too, and is returned as the context has it.

    Raises:
        ValueError: the context does not contain the answer; `where` begins the message.
    """
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{where}: an answer must be a text of the context; none is an empty list")
    if start is not None and (not isinstance(start, int) or isinstance(start, bool)):
        raise ValueError(f"{where}: the first character of the answer is {start!r}, not a whole number")
    if start is not None and start >= 0 and context.startswith(answer, start):
        return answer, start
    spaced = re.compile(r"\s*".join(re.escape(character) for character in answer if not character.isspace()))
    for pattern in (re.compile(re.escape(answer)), spaced):
        # With a lookahead, so that places that overlap are all found.
        if places := [match.start() for match in re.finditer(f"(?={pattern.pattern})", context)]:
            place = places[0] if start is None else min(places, key=lambda place: abs(place - start))
            found = pattern.match(context, place)
            assert found is not None
            return found.group(), place
    raise ValueError(f"{where}: the context does not contain the answer {answer!r:.80}")
