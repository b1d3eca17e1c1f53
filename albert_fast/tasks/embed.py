"""Turns texts into vectors: `TextEncoder` for a list of texts, `encode_rows` for a file of any length.

TextEncoder("my-albert").encode(["A fine film.", "Dull."])  # numpy (2, hidden_size)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..checkpoints import sentence_modules
from ..checkpoints.saving import folder_of
from ..checkpoints.weights import resolve
from ..models.albert import ALBERTModel
from ..text.batching import TextPair
from ..text.text_files import Record
from ..text.windows import RowWindows
from .errors import UsageError
from .loading import TextModel

POOLINGS = ("mean", "cls", "pooler")
# The files of a checkpoint that the vectors depend on.
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt")


class TextEncoder(TextModel):
    """Turns texts into vectors of hidden_size numbers.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub.
        pooling: "mean" of all tokens, "cls" (the first token's vector) or "pooler" (the trained pooler's output).
            Default: "mean".
        loading: max_length, batch_size, backend, precision and device; see `TextModel`.

    Raises:
        UsageError: "pooler" for a model without a pooler; no pooling for a sentence-transformers folder, whose
            modules.json is not read.
    """

    def __init__(self, checkpoint: str | Path, *, pooling: str | None = None, **loading: Any) -> None:
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: known are {', '.join(POOLINGS)}")
        folder = resolve(checkpoint)
        modules = sentence_modules.describe(folder_of(folder))
        if pooling is None and modules is not None:
            raise UsageError(
                f"{checkpoint}: a sentence-transformers folder whose modules.json asks for {modules}, which is not read: "
                "name the --pooling to use (pooling=; a Dense layer or normalising is not applied)"
            )
        super().__init__(ALBERTModel, folder, **loading)
        self.pooling = pooling or "mean"
        if self.pooling == "pooler" and self.model.pooler is None:
            raise UsageError(f"{checkpoint} has no pooler; --pooling mean or cls (pooling=) needs none")

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str | TextPair]) -> np.ndarray:
        """Texts, or (text, second text or None) -> float32 (N, width), in the order of the texts."""
        pairs = [(text, None) if isinstance(text, str) else text for text in texts]
        out = np.empty((len(pairs), self.width), dtype=np.float32)
        with torch.inference_mode():
            for chosen, batch in self.batches(pairs):
                out[chosen] = self._pool(batch).float().cpu().numpy()
        return out

    def _pool(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A padded batch (B, S) -> vectors (B, width)."""
        if self.pooling == "pooler":
            pooled: torch.Tensor = self.model(**batch, wanted_tokens="first").pooler_output
            return pooled
        mask = batch["attention_mask"]
        if self.pooling == "cls":
            first = torch.zeros_like(mask, dtype=torch.bool)
            first[:, 0] = True
            states: torch.Tensor = self.model(**batch, wanted_tokens=first).last_hidden_state
            return states
        hidden = self.model(**batch).last_hidden_state.float()
        # Row by row: the order of a sum over padded rows depends on the longest text of the batch.
        return torch.stack([row[:length].mean(0) for row, length in zip(hidden, mask.sum(1).tolist(), strict=True)])

    def settings(self) -> dict[str, Any]:
        """Everything that the vectors depend on, so that interrupted work is not continued with another model."""
        return {
            "model": self._digest(),
            "pooling": self.pooling,
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "backend": self.backend,
            "device": str(self.device),
        }

    def _digest(self) -> str:
        """Checksum of the checkpoint's files."""
        digest = hashlib.blake2b(digest_size=16)
        files = [path for path in self.folder.iterdir() if path.is_file()] if self.folder.is_dir() else [self.folder]
        for path in sorted(files):
            if path.suffix in _MODEL_FILES:
                digest.update(path.name.encode())
                with path.open("rb") as content:
                    while block := content.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()


class Sink(Protocol):
    """Where vectors go. `rows` are safe already; `digest` is the input's checksum after these rows."""

    rows: int
    digest: str

    def append(self, vectors: np.ndarray, records: list[Record], digest: str) -> None: ...


def skip_encoded_rows(rows: RowWindows, sink: Sink) -> None:
    """Passes over the rows that `sink` already has.

    Raises:
        UsageError: the input's first rows are not the ones that were encoded before.
        EOFError: the input has fewer rows.
    """
    if not sink.rows:
        return
    rows.skip(sink.rows)
    if rows.digest != sink.digest:
        raise UsageError(f"the first {sink.rows} lines of {rows.name} are not those that were encoded before")


def encode_rows(
    encoder: TextEncoder,
    rows: RowWindows,
    sink: Sink,
    window: int,
    *,
    patience: float | None = None,
    after_window: Callable[[], None] = lambda: None,
) -> None:
    """Encodes every remaining row of `rows` into `sink`, one window at a time.

    Args:
        window: rows whose texts are sorted by length together.
        patience: as for `RowWindows.windows`; None waits for full windows, the same ones after an interruption.
        after_window: called after each window, for a progress bar.

    Raises:
        InputError: a row that cannot be read; the rows before it are in `sink`.
    """
    for records in rows.windows(window, patience):
        sink.append(encoder.encode([(record.text, record.pair) for record in records]), records, rows.digest)
        after_window()
