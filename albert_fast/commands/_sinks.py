"""Outputs of `encode`: standard output here, files in `albert_fast.tasks.vector_files`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..tasks.parquet_vectors import ParquetForm
from ..tasks.vector_files import Form, JsonlForm, NpyForm, ResumableFile, State, output_lock, state_of
from ._lines import Record

if TYPE_CHECKING:
    import numpy as np


class StandardOutput:
    """Writes rows to standard output as they come; nothing can be resumed."""

    def __init__(self, form: Form) -> None:
        self.form, self.rows, self.digest = form, 0, ""

    def append(self, vectors: np.ndarray, records: list[Record], digest: str) -> None:
        sys.stdout.write(self.form.body(vectors, records).decode())
        sys.stdout.flush()
        self.rows += len(records)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


__all__ = [
    "Form",
    "JsonlForm",
    "NpyForm",
    "ParquetForm",
    "ResumableFile",
    "StandardOutput",
    "State",
    "output_lock",
    "state_of",
]
