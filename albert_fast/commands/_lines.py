"""Lines of a file, of standard input or of a pipe, in windows: in constant memory, and a pipe is not waited for."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import select
import stat
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, BinaryIO

from ._errors import UsageError, warn
from ._options import InputFormat

CHUNK = 1 << 16
# More than any model reads of one text; the rest of a longer line is dropped unread, so that memory stays bounded.
LONGEST_LINE = 1 << 20


@dataclass
class Record:
    """One line of the input."""

    line: int  # from 1
    text: str
    pair: str | None = None
    key: Any = None  # the field "id" of a JSON line, given back with the answer


class InputError(ValueError):
    """A line that cannot be read; `before` holds the records of the same window that could."""

    def __init__(self, message: str, before: list[Record]) -> None:
        super().__init__(message)
        self.before = before


class Lines:
    """Reads windows of records from a path, or from standard input for "-".

    A line ends at a line feed, a carriage return before it is dropped; the last one may lack it. `digest` covers the
    bytes of all lines that were given out, `consumed` counts them.
    """

    def __init__(self, path: str, format: InputFormat, encoding: str, replace_bad_bytes: bool) -> None:
        self.name = "standard input" if path == "-" else path
        self.jsonl = format is InputFormat.jsonl or (
            format is InputFormat.auto and path.endswith((".jsonl", ".ndjson"))
        )
        self.encoding, self.errors = _checked_encoding(encoding), "replace" if replace_bad_bytes else "strict"
        self._stream: BinaryIO = sys.stdin.buffer if path == "-" else open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._fd: int | None = self._stream.fileno()
        except (OSError, io.UnsupportedOperation):
            self._fd = None  # a stand-in for standard input in a test
        regular = self._fd is None or stat.S_ISREG(os.fstat(self._fd).st_mode)
        self.size = os.fstat(self._fd).st_size if regular and self._fd is not None else None
        self._waits = not regular and os.name == "posix"
        self._lines: deque[tuple[bytes, int]] = deque()  # (the line, bytes dropped at its end)
        self._tail, self._dropped, self._ended = b"", 0, False
        self.count, self.consumed = 0, 0
        self._hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not sys.stdin.buffer:
            self._stream.close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def skip(self, count: int) -> None:
        """Passes over `count` lines, which are not looked at. EOFError where there are fewer."""
        for _ in range(count):
            if not self._wait_for_line(None):
                raise EOFError(f"{self.name} ends after {self.count} lines; {count} were done before")
            self._take()

    def window(self, size: int, patience: float | None = 0.02) -> list[Record]:
        """Up to `size` records; on a pipe or a terminal those that arrive within `patience` seconds of the first (None:
        however long it takes). [] at the end. InputError at a line that is not what it should be.
        """
        records: list[Record] = []
        deadline = None
        while len(records) < size and self._wait_for_line(deadline):
            if deadline is None and patience is not None:
                deadline = time.monotonic() + patience
            raw, dropped = self._take()
            try:
                records.append(self._record(raw, dropped))
            except ValueError as error:
                raise InputError(f"{self.name}, line {self.count}: {error}", records) from error
        return records

    def _take(self) -> tuple[bytes, int]:
        raw, dropped = self._lines.popleft()
        self.count += 1
        self.consumed += len(raw) + dropped + 1
        self._hash.update(raw)
        self._hash.update(b"\n")
        return raw, dropped

    def _wait_for_line(self, deadline: float | None) -> bool:
        """Whether a line is there; reads on until it is, the input ends or the deadline passes."""
        while not self._lines:
            if self._ended:
                return False
            if self._waits and self._fd is not None:
                patience = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([self._fd], [], [], patience)[0]:
                    return False
            self._read_chunk()
        return True

    def _read_chunk(self) -> None:
        chunk = os.read(self._fd, CHUNK) if self._fd is not None else self._stream.read(CHUNK)
        if not chunk:
            self._ended = True
            if self._tail or self._dropped:
                self._lines.append((self._tail, self._dropped))
            return
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            self._extend(piece)
            self._lines.append((self._tail, self._dropped))
            self._tail, self._dropped = b"", 0
        self._extend(rest)

    def _extend(self, piece: bytes) -> None:
        room = LONGEST_LINE - len(self._tail)
        self._tail += piece[:room]
        self._dropped += max(0, len(piece) - room)

    def _record(self, raw: bytes, dropped: int) -> Record:
        if self.count == 1 and self.encoding.startswith("utf-8"):
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if dropped:
            if self.jsonl:
                raise ValueError(f"longer than {LONGEST_LINE} bytes")
            warn(f"{self.name}, line {self.count}: {dropped} bytes beyond the first {LONGEST_LINE} are left out")
        try:
            if dropped:  # the cut may lie within a character, which an incremental decoder leaves out
                text = codecs.getincrementaldecoder(self.encoding)(self.errors).decode(raw)
            else:
                text = raw.decode(self.encoding, self.errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"byte {error.start + 1} of the line is not {self.encoding}; --encoding names another encoding, "
                "--replace-bad-bytes reads on"
            ) from error
        text = text.removesuffix("\r")
        return _json_record(text, self.count) if self.jsonl else Record(self.count, text)


def _checked_encoding(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        fits = "a\r\n".encode(name) == b"a\r\n"
    except (LookupError, TypeError):
        raise UsageError(f"--encoding {encoding}: Python knows no text encoding of this name") from None
    if not fits:
        raise UsageError(
            f"--encoding {encoding}: lines are found by their line feed byte, which this encoding does not have"
        )
    return name


def _json_record(text: str, line: int) -> Record:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}" if text.strip() else 'empty; expected {"text": ...}') from error
    if not isinstance(content, dict):
        raise ValueError(f'expected {{"text": ...}}, found {type(content).__name__}')
    wrong = [name for name in ("text", "text_pair") if not isinstance(content.get(name, ""), str)]
    if "text" not in content or wrong:
        raise ValueError(f'"{wrong[0]}" is not a string' if wrong else f'no field "text"; it has {list(content)}')
    return Record(line, content["text"], content.get("text_pair"), content.get("id"))
