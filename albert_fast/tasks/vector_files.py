"""Files of vectors that are never half-written: interrupted work continues where it stopped.

| file | what |
|---|---|
| OUT.partial | the rows so far; renamed to OUT when all rows are there |
| OUT.progress | JSON: how many rows and bytes of OUT.partial are safe, and what they were made from; removed after the rename |
| OUT.lock | locked while a process works on OUT; a killed process leaves it unlocked, and the next process removes it |
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..runtime.files import commit, remove_left, replacing, sync
from ..runtime.locking import LockedError, locked
from ..text.text_files import Record
from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np


class Form(Protocol):
    """The bytes of a file format: `body` for each window of rows, after a `head`, which is rewritten with the final count.

    A head has the same length for every count. Where `converts` is True these bytes are not the file yet: `convert` makes it
    of them when all rows are there.
    """

    converts: bool

    def head(self, rows: int) -> bytes: ...

    def body(self, vectors: np.ndarray, records: list[Record]) -> bytes: ...

    def convert(self, rows: BinaryIO, out: BinaryIO) -> None: ...


class PlainForm:
    """A form whose bytes are the file."""

    converts = False

    def convert(self, rows: BinaryIO, out: BinaryIO) -> None:
        """Never called."""
        raise NotImplementedError


class NpyForm(PlainForm):
    """A .npy file (format 1.0): a header of fixed length, then the vectors (rows, width)."""

    def __init__(self, width: int, dtype: str) -> None:
        import numpy as np

        self.width, self.dtype = width, np.dtype(dtype)

    def head(self, rows: int) -> bytes:
        from numpy.lib import format as npy

        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (rows, self.width)}
        out = io.BytesIO()
        npy.write_array_header_1_0(out, header)  # the header leaves room for more rows, so its length never changes
        return out.getvalue()

    def body(self, vectors: np.ndarray, records: list[Record]) -> bytes:
        return vectors.astype(self.dtype, copy=False).tobytes()


class JsonlForm(PlainForm):
    """A .jsonl file: {"embedding": [...]} for each row, with the input's "id" and "label" where it has them."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def head(self, rows: int) -> bytes:
        return b""

    def body(self, vectors: np.ndarray, records: list[Record]) -> bytes:
        lines = []
        for record, vector in zip(records, vectors.astype(self.dtype, copy=False), strict=True):
            fields = {"id": record.key, "label": record.label}
            given = {name: value for name, value in fields.items() if value is not None}
            head = "".join(f'"{name}": {json.dumps(value, ensure_ascii=False)}, ' for name, value in given.items())
            # The shortest decimals that read back as the same float32 or float16.
            lines.append(f'{{{head}"embedding": [{", ".join(_number(value) for value in vector)}]}}\n')
        return "".join(lines).encode()


def _number(value: Any) -> str:
    text = str(value)
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)


class State(Enum):
    """What was found of an output file."""

    new = "new"
    unfinished = "unfinished"
    complete = "complete"


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Keeps other processes away from an output while the block runs. UsageError where another process works on it.

    Take the lock before you call `state_of`: otherwise another process may finish or begin its work in between.
    """
    if not output.parent.is_dir():
        raise UsageError(f"{output}: there is no folder {output.parent}")
    with ExitStack() as held:
        try:
            held.enter_context(locked(output.with_name(output.name + ".lock")))
        except LockedError as error:
            raise UsageError(f"{output} is being written by another process ({error})") from None
        yield


def state_of(output: Path, resume: bool, overwrite: bool) -> State:
    """Finds out what earlier runs left; the caller holds the output's lock.

    Raises:
        UsageError: there is an output or unfinished work, and neither option says what to do with it.
    """
    partial, progress = _companions(output)
    if not partial.exists():
        progress.unlink(missing_ok=True)  # left by a kill between the two steps of `finish`
    if overwrite:
        return State.new
    if partial.exists() and progress.exists():
        if resume:
            return State.unfinished
        raise UsageError(f"{partial} is unfinished work; --resume continues it, --overwrite starts again")
    if not output.exists():
        return State.new
    if resume:
        return State.complete
    raise UsageError(f"{output} is there already; --overwrite replaces it")


def _companions(output: Path) -> tuple[Path, Path]:
    return output.with_name(output.name + ".partial"), output.with_name(output.name + ".progress")


class ResumableFile:
    """Writes rows to a file by way of OUT.partial and OUT.progress.

    Args:
        settings: everything that the rows depend on.
        state: what `state_of` found.
        is_locked: the caller holds `output_lock`. If False, this object holds it until `finish` or `close`.

    Attributes:
        rows: rows that are safe on the disk. digest: checksum of the input after these rows.

    Raises:
        UsageError: the unfinished work is damaged, or was made with other settings; the message names the difference.
    """

    def __init__(
        self, output: Path, form: Form, settings: dict[str, Any], state: State, *, is_locked: bool = False
    ) -> None:
        self.output, self.form, self.settings = output, form, settings
        self.partial, self.progress = _companions(output)
        self.rows, self.digest = 0, ""
        self._held = ExitStack()
        if not is_locked:
            self._held.enter_context(output_lock(output))
        self._file: BinaryIO | None = None
        try:
            if state is not State.unfinished:
                self.progress.unlink(missing_ok=True)  # before the rows that it counts are gone
            self._file = self.partial.open("r+b" if state is State.unfinished else "w+b")
            position = self._read_progress() if state is State.unfinished else self._file.write(form.head(0))
            self._file.truncate(position)  # rows after the last note may be incomplete
            self._file.seek(position)
        except BaseException:
            self._release()
            raise

    def _read_progress(self) -> int:
        """Reads `rows` and `digest`; returns how many bytes are safe."""
        try:
            note = json.loads(self.progress.read_text(encoding="utf-8"))
            self.rows, self.digest, position = int(note["rows"]), str(note["digest"]), int(note["bytes"])
            before = dict(note["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.progress} is damaged ({error}); --overwrite starts again") from None
        if self.partial.stat().st_size < position:
            raise UsageError(f"{self.partial} is shorter than {self.progress} says; --overwrite starts again")
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise UsageError(
                    f"{self.partial} was made with {name} {before.get(name)}, not {value}; --overwrite starts again"
                )
        return position

    def append(self, vectors: np.ndarray, records: list[Record], digest: str) -> None:
        """Adds the rows of a window; `digest` is the input's checksum after them."""
        assert self._file is not None
        self._file.write(self.form.body(vectors, records))
        sync(self._file)  # the rows first: the note must never count rows that are not on the disk
        rows = self.rows + len(records)
        note = {"rows": rows, "bytes": self._file.tell(), "digest": digest, "settings": self.settings}
        with replacing(self.progress) as file:
            file.write(json.dumps(note).encode())
        self.rows = rows

    def finish(self) -> None:
        """Renames OUT.partial to OUT, or makes OUT of it where the form asks for that."""
        assert self._file is not None
        if self.form.converts:
            with replacing(self.output) as out:
                self.form.convert(self._file, out)
            self.partial.unlink()
        else:
            self._file.seek(0)
            self._file.write(self.form.head(self.rows))
            self._file.flush()
            commit(self.partial, self.output)
        self.progress.unlink(missing_ok=True)
        self._release()

    def close(self) -> None:
        """Releases the file and the lock; unfinished work stays on the disk if it has rows."""
        if self._file is not None and not self.rows:
            self.partial.unlink(missing_ok=True)
            self.progress.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        """Closes the file, then releases the lock, once: from then on another process may write the output."""
        remove_left(self.progress)
        if self._file is not None:
            self._file.close()
            self._file = None
        self._held.close()
