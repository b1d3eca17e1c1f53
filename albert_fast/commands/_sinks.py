"""Outputs of `encode` that are never half-written, and the note beside them from which interrupted work goes on.

| file | what |
|---|---|
| OUT.partial | rows so far; becomes OUT by a rename when all are there |
| OUT.progress | JSON: rows and bytes that are safe in OUT.partial, and what they were made from; goes with the rename |
"""

from __future__ import annotations

import io
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..files import replacing
from ..locking import try_lock
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
    """A line {"embedding": [...]} for each row, with the "id" of the input line where it had one."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def head(self, rows: int) -> bytes:
        return b""

    def body(self, vectors: np.ndarray, records: list[Record]) -> bytes:
        lines = []
        for record, vector in zip(records, vectors.astype(self.dtype, copy=False), strict=True):
            key = "" if record.key is None else f'"id": {json.dumps(record.key, ensure_ascii=False)}, '
            # Shortest decimals that give the same float32 or float16 back.
            lines.append(f'{{{key}"embedding": [{", ".join(_number(value) for value in vector)}]}}\n')
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


def state_of(output: Path, resume: bool, overwrite: bool) -> State:
    """Looks at what earlier runs left; UsageError where neither option says what to do with it."""
    partial, progress = _companions(output)
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
    """

    def __init__(self, output: Path, form: Form, settings: dict[str, Any], state: State) -> None:
        self.output, self.form, self.settings = output, form, settings
        self.partial, self.progress = _companions(output)
        self.rows, self.digest = 0, ""
        # Not opened for writing anew: another process may hold it, and the lock comes after opening.
        self._file: BinaryIO = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if not try_lock(self._file.fileno()):
                raise UsageError(f"{self.partial} is being written by another process")
            if state is State.unfinished:
                position = self._read_progress()
            else:
                self.progress.unlink(missing_ok=True)  # before the rows that it speaks of go
                self._file.truncate(0)
                position = self._file.write(form.head(0))
            self._file.truncate(position)  # what was written after the last note is not known to be whole
            self._file.seek(position)
        except BaseException:
            self._file.close()  # the traceback of the error would keep the file open, and so locked
            raise

    def _read_progress(self) -> int:
        """Takes over rows and digest; returns the bytes that are safe."""
        try:
            note = json.loads(self.progress.read_text(encoding="utf-8"))
            self.rows, self.digest, position = int(note["rows"]), str(note["digest"]), int(note["bytes"])
            before = dict(note["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.progress} is damaged ({error}); --overwrite starts again") from None
        if os.fstat(self._file.fileno()).st_size < position:
            raise UsageError(f"{self.partial} is shorter than {self.progress} says; --overwrite starts again")
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise UsageError(
                    f"{self.partial} was made with {name} {before.get(name)}, not {value}; --overwrite starts again"
                )
        return position

    def append(self, vectors: np.ndarray, records: list[Record], digest: str) -> None:
        """Adds the rows of a window; `digest` is that of the input up to its end."""
        self._file.write(self.form.body(vectors, records))
        self._flush()  # the rows first: the note must never promise more than there is
        self.rows += len(records)
        note = {"rows": self.rows, "bytes": self._file.tell(), "digest": digest, "settings": self.settings}
        with replacing(self.progress) as file:
            file.write(json.dumps(note).encode())

    def finish(self) -> None:
        """Makes OUT.partial into OUT."""
        self._file.seek(0)
        self._file.write(self.form.head(self.rows))
        self._flush()
        self._file.close()
        self.partial.replace(self.output)
        self.progress.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()
        if not self.rows:  # nothing to go on from
            self.partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
