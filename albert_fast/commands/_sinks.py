"""Outputs of `encode` that are never half-written, and the note beside them from which interrupted work goes on.

| file | what |
|---|---|
| OUT.partial | rows so far; becomes OUT by a rename when all are there |
| OUT.progress | JSON: rows and bytes that are safe in OUT.partial, and what they were made from; goes with the rename |
| OUT.lock | empty, locked while a process works on OUT; a killed process leaves it unlocked, and the next one removes it |
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..runtime.files import remove_left, replacing
from ..runtime.locking import LockedError, locked
from ._errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from ._lines import Record


class Form(Protocol):
    """How rows become bytes: `head` first, written again with the final count of rows, and `body` for each window."""

    def head(self, rows: int) -> bytes: ...

    def body(self, vectors: np.ndarray, records: list[Record]) -> bytes: ...


class NpyForm:
    """numpy's format 1.0: a header of fixed length, then the vectors as they lie in memory."""

    def __init__(self, width: int, dtype: str) -> None:
        import numpy as np

        self.width, self.dtype = width, np.dtype(dtype)

    def head(self, rows: int) -> bytes:
        from numpy.lib import format as npy

        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (rows, self.width)}
        out = io.BytesIO()
        npy.write_array_header_1_0(out, header)  # leaves room for the first axis to grow, so its length never changes
        return out.getvalue()

    def body(self, vectors: np.ndarray, records: list[Record]) -> bytes:
        return vectors.astype(self.dtype, copy=False).tobytes()


class JsonlForm:
    """A line {"embedding": [...]} for each row, with the "id" and the "label" of the input line where it had them."""

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
            # Shortest decimals that give the same float32 or float16 back.
            lines.append(f'{{{head}"embedding": [{", ".join(_number(value) for value in vector)}]}}\n')
        return "".join(lines).encode()


def _number(value: Any) -> str:
    text = str(value)
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)


class StandardOutput:
    """Rows to standard output as they come; nothing can be resumed."""

    def __init__(self, form: Form) -> None:
        self.form, self.rows = form, 0

    def append(self, vectors: np.ndarray, records: list[Record], digest: str) -> None:
        sys.stdout.write(self.form.body(vectors, records).decode())
        sys.stdout.flush()
        self.rows += len(records)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class State(Enum):
    """What is to be done about an output file."""

    new = "new"
    unfinished = "unfinished"
    complete = "complete"


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Keeps other processes from an output inside; UsageError where one of them works on it now.

    Take it before `state_of`, or what another process has just finished or begun is not seen.
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
    """Looks at what earlier runs left; UsageError where neither option says what to do with it. Needs the output's lock."""
    partial, progress = _companions(output)
    if not partial.exists():
        progress.unlink(missing_ok=True)  # a kill between the two steps of `finish` left it
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
    raise UsageError(f"{output} is there already; --overwrite makes it anew")


def _companions(output: Path) -> tuple[Path, Path]:
    return output.with_name(output.name + ".partial"), output.with_name(output.name + ".progress")


class ResumableFile:
    """Rows to a file by way of OUT.partial and OUT.progress; the first `rows` of them are safe.

    settings: what the rows depend on; going on under other settings is a UsageError that names the difference.
    is_locked: the caller holds `output_lock`; off, it is taken here, until `finish` or `close`.
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
                self.progress.unlink(missing_ok=True)  # before the rows that it speaks of go
            self._file = self.partial.open("r+b" if state is State.unfinished else "wb")
            position = self._read_progress() if state is State.unfinished else self._file.write(form.head(0))
            self._file.truncate(position)  # what was written after the last note is not known to be whole
            self._file.seek(position)
        except BaseException:
            self._release()
            raise

    def _read_progress(self) -> int:
        """Takes over rows and digest; returns the bytes that are safe."""
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
        """Adds the rows of a window; `digest` is that of the input up to its end."""
        assert self._file is not None
        self._file.write(self.form.body(vectors, records))
        self._flush()  # the rows first: the note must never promise more than there is
        rows = self.rows + len(records)
        note = {"rows": rows, "bytes": self._file.tell(), "digest": digest, "settings": self.settings}
        with replacing(self.progress) as file:
            file.write(json.dumps(note).encode())
        self.rows = rows

    def finish(self) -> None:
        """Makes OUT.partial into OUT."""
        assert self._file is not None
        self._file.seek(0)
        self._file.write(self.form.head(self.rows))
        self._flush()
        self.partial.replace(self.output)
        self.progress.unlink(missing_ok=True)
        self._release()

    def close(self) -> None:
        if self._file is not None and not self.rows:  # nothing to go on from
            self.partial.unlink(missing_ok=True)
            self.progress.unlink(missing_ok=True)
        self._release()

    def _flush(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())

    def _release(self) -> None:
        """Lets the file and the lock go, in this order and once: from then on the output may be another process's."""
        remove_left(self.progress)
        if self._file is not None:
            self._file.close()
            self._file = None
        self._held.close()
