"""Reads the lines of a file, of standard input or of a pipe, in constant memory and with a limit on the waiting time."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import select
import stat
import sys
import time
import zlib
from collections import deque
from pathlib import Path
from typing import BinaryIO, NamedTuple

CHUNK = 1 << 16
# More than any model reads of one text. The rest of a longer line is dropped, so that memory stays bounded.
LONGEST_LINE = 1 << 20


class Line(NamedTuple):
    """A line: its number from 1, its text without the line end, and how many bytes beyond the limit were dropped."""

    number: int
    text: str
    dropped: int


class LineReader:
    """Reads and decodes the lines of a byte stream.

    A line ends at a line feed, which the last line may lack. A byte order mark at the start of UTF-8 is dropped.

    Args:
        errors: "strict" or "replace", as for `bytes.decode`.
        longest: bytes of a line that are kept.

    Attributes:
        name: the stream's name in error messages. count: lines that were returned. consumed: their bytes.
        size: bytes of the whole file; None where they are not known.
    """

    def __init__(
        self, stream: BinaryIO, name: str, encoding: str = "utf-8", errors: str = "strict", longest: int = LONGEST_LINE
    ) -> None:
        self.name, self.longest = name, longest
        self._stream, self._encoding, self._errors = stream, encoding, errors
        self._fd: int | None = None
        try:
            if not isinstance(stream, gzip.GzipFile):  # its descriptor gives the packed bytes
                self._fd = stream.fileno()
        except (OSError, io.UnsupportedOperation):
            pass  # bytes in memory
        regular = self._fd is None or stat.S_ISREG(os.fstat(self._fd).st_mode)
        self.size = os.fstat(self._fd).st_size if regular and self._fd is not None else None
        self._waits = not regular and os.name == "posix"
        self._lines: deque[tuple[bytes, int]] = deque()  # (the line, bytes dropped at its end)
        self._tail, self._dropped, self._ended = b"", 0, False
        self.count, self.consumed = 0, 0
        self._hash = hashlib.blake2b(digest_size=16)

    def close(self) -> None:
        if self._stream is not sys.stdin.buffer:
            self._stream.close()

    def checksum(self) -> str:
        """A checksum of all lines that were returned so far."""
        return self._hash.hexdigest()

    def read(self, deadline: float | None = None) -> Line | None:
        """Returns the next line; None at the end, or if none arrives before `deadline`.

        Args:
            deadline: a time of time.monotonic; None: no limit.

        Raises:
            ValueError: bytes that are not text in this encoding, or damaged gzip data; the message names the line.
        """
        if not self._wait_for_line(deadline):
            return None
        raw, dropped = self._lines.popleft()
        self.count += 1
        self.consumed += len(raw) + dropped + 1
        self._hash.update(raw)
        self._hash.update(b"\n")
        return Line(self.count, self._decode(raw, dropped), dropped)

    def _decode(self, raw: bytes, dropped: int) -> str:
        if self.count == 1 and self._encoding.startswith("utf-8"):
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            if dropped:  # the cut may be inside a character, which an incremental decoder drops
                return codecs.getincrementaldecoder(self._encoding)(self._errors).decode(raw)
            return raw.decode(self._encoding, self._errors)
        except UnicodeDecodeError as error:
            where = f"{self.name}, line {self.count}"
            raise ValueError(f"{where}: byte {error.start + 1} of the line is not {self._encoding}") from error

    def _wait_for_line(self, deadline: float | None) -> bool:
        """Reads until there is a line, the input ends or the deadline passes; returns whether there is a line."""
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
        try:
            # read1 returns what it has before it raises; read would lose it.
            chunk = os.read(self._fd, CHUNK) if self._fd is not None else self._stream.read1(CHUNK)  # type: ignore[attr-defined]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._ended = True
            raise ValueError(
                f"{self.name}, line {self.count + 1}: the gzip data is cut or damaged ({error})"
            ) from error
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
        room = self.longest - len(self._tail)
        self._tail += piece[:room]
        self._dropped += max(0, len(piece) - room)


def open_lines(
    path: str | Path, encoding: str = "utf-8", errors: str = "strict", longest: int = LONGEST_LINE
) -> LineReader:
    """Opens a file, which is unpacked if its name ends in .gz, or standard input for "-". OSError: see `open`."""
    if str(path) == "-":
        return LineReader(sys.stdin.buffer, "standard input", encoding, errors, longest)
    packed = str(path).lower().endswith(".gz")
    if packed:
        return LineReader(gzip.open(path, "rb"), str(path), encoding, errors, longest)  # type: ignore[arg-type]
    return LineReader(open(path, "rb", buffering=0), str(path), encoding, errors, longest)
