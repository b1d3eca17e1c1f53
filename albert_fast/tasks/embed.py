"""Turns texts into vectors: `TextEncoder` for a list of texts, `encode_rows` for a file of any length.

TextEncoder("my-encoder").encode(["A fine film.", "Dull."])  # numpy (2, width)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import sentence_modules
from ..checkpoints.saving import folder_of
from ..models.auto import AutoModel
from ..text.batching import TextPair
from ..text.normalization import lower_first
from ..text.text_files import Record
from ..text.windows import RowWindows
from .errors import UsageError
from .loading import TextModel, checked_texts, checkpoint_path, progress_bar, quiet_about_modules
from .pooling import MODES, modes_of, pool
from .sentence_steps import Normalize, build
from .token_batches import TokenBatch, default_batch_tokens

POOLINGS = (*MODES, "pooler")
# The files of a checkpoint that the vectors depend on.
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt")


class TextEncoder(TextModel):
    """Turns texts into vectors, as the checkpoint's folder says.

    A sentence-transformers folder is obeyed: its pooling, Dense, LayerNorm and Normalize, max_seq_length, do_lower_case,
    prompts and truncate_dim. Any other checkpoint is an encoder alone, and its vectors are the means of its tokens.
    Neither sentence-transformers nor transformers is needed.

    Args:
        checkpoint: a folder or a name on the Hugging Face hub.
        pooling: one of POOLINGS: "mean" of all tokens, "cls" (the first token's vector), "pooler" (the trained pooler's
            output), "max", "mean_sqrt_len_tokens" (the sum over the root of the count), "weightedmean" (by position) or
            "lasttoken". It replaces everything that a folder's modules.json names after the encoder.
        prompt_name, prompt, truncate_dim, batch_tokens: what `encode` does by default.
        batch_size: most texts of a batch; None: as many as its tokens allow.
        loading: max_length, backend, precision and device; see `TextModel`.

    Attributes:
        prompts: the folder's prompts by name.

    Raises:
        UsageError: "pooler" for a model without a pooler; the folder of another kind of model, such as a cross-encoder.
        ValueError: a module of the folder that is not applied here, or settings or weights that do not fit; names it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        pooling: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        **loading: Any,
    ) -> None:
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: known are {', '.join(POOLINGS)}")
        folder = checkpoint_path(checkpoint)
        asked = sentence_modules.read(folder_of(folder))
        if asked is not None and asked.kind != "SentenceTransformer":
            hint = ": TextScorer (albert-fast rerank) scores with it" if asked.kind == "CrossEncoder" else ""
            raise UsageError(f"{checkpoint} is a {asked.kind}, which gives no vectors of texts{hint}")
        self._places = [folder]
        if asked is not None and folder.is_dir():
            self._places = [asked.root, asked.encoder, *(module.folder for module in asked.modules)]
        with quiet_about_modules():  # the modules are applied here
            place = folder if asked is None or not folder.is_dir() else asked.encoder
            super().__init__(AutoModel, place, batch_size=batch_size, **loading)
        if asked is not None and asked.max_length is not None and loading.get("max_length") is None:
            self.max_length = min(asked.max_length, self.model.config.longest)
        if asked is not None and asked.lower_case:
            lower_first(self.tokenizer.backend)
        self.pooling, self.modes, self.include_prompt, self.steps, self._full_width = self._plan(asked, pooling)
        if self.pooling == "pooler" and self.model.pooler is None:
            raise UsageError(f"{checkpoint} has no pooler; --pooling mean or cls (pooling=) needs none")
        self._pooled_width = int(self.model.config.hidden_size) * max(len(self.modes), 1)
        self.prompts = {} if asked is None else dict(asked.prompts)
        self.batch_tokens = default_batch_tokens(self.device) if batch_tokens is None else batch_tokens
        given = prompt is not None or prompt_name is not None
        default = None if asked is None or given else asked.default_prompt
        self.prompt = self._prompt_text(prompt_name if given else default, prompt) or ""
        self.truncate_dim = truncate_dim if truncate_dim is not None or asked is None else asked.truncate_dim
        self.width = self._cut_width(truncate_dim)

    def _plan(
        self, asked: sentence_modules.SentenceFolder | None, pooling: str | None
    ) -> tuple[str, tuple[str, ...], bool, list[nn.Module], int]:
        """The pooling's name, its modes, whether prompts take part in it, the steps after it, and the vectors' width."""
        width = int(self.model.config.hidden_size)
        if pooling is not None or asked is None or not asked.modules:
            name = pooling or "mean"
            return name, () if name == "pooler" else (name,), True, [], width
        first, *later = asked.modules
        if first.kind != "Pooling":
            raise ValueError(f"{first.name}: {first.kind} follows the encoder; only Pooling does here")
        modes, include_prompt = modes_of(first)
        stated = first.settings.get("embedding_dimension", first.settings.get("word_embedding_dimension", width))
        if stated != width:
            raise ValueError(f"{first.name}: is for {stated!r:.100} columns; the encoder's hidden_size is {width}")
        width *= len(modes)
        steps = []
        for module in later:
            step, width = build(module, width)
            steps.append(step.to(self.device))
        return "+".join(modes), modes, include_prompt, steps, width

    def encode(
        self,
        texts: Sequence[str | TextPair],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        batch_tokens: int | None = None,
        show_progress: bool = False,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """Texts -> vectors, float32 (N, width), in the order of the texts; (0, width) for no texts.

        Memory beside the result does not grow with N. The next texts are tokenised while the model computes.

        Args:
            texts: a list of str, or of (text, second text or None).
            prompt_name: which of `prompts` stands before every text. prompt: the same as a text; it goes first. Default:
                the folder's default_prompt_name, if it has one.
            batch_tokens: tokens that are computed at a time, without padding. Default: what suits the device.
            show_progress: a bar on standard error, in texts per second; it needs tqdm.
            normalize: True: vectors of length 1, after truncate_dim. False: without a Normalize at the end of the folder's
                modules. None: as the folder says.
            truncate_dim: keep this many of a vector's first numbers. Default: the folder's.

        Raises:
            TypeError: a text that is not a str, or one str in place of a list. ValueError: a prompt's name that the folder
            does not have; batch_tokens or truncate_dim below 1; truncate_dim above the vectors' width; half of a surrogate
            pair in a text.
        """
        given = prompt is not None or prompt_name is not None
        before = (self._prompt_text(prompt_name, prompt) or "") if given else self.prompt
        checked = checked_texts(texts)
        skip = 0 if self.include_prompt or not before else self._prompt_tokens(before)
        most = self.batch_tokens if batch_tokens is None else batch_tokens
        steps = self.steps[:-1] if normalize is False and self.steps and _normalizes(self.steps[-1]) else self.steps
        width = self._cut_width(truncate_dim)
        out = np.empty((len(checked), width), dtype=np.float32)
        with torch.inference_mode(), progress_bar(len(checked), show_progress) as done:
            for batch in self.token_batches(checked, most, before):
                vectors = self._pooled(batch, skip)
                for step in steps:
                    vectors = step(vectors)
                vectors = vectors[:, :width]
                if normalize:
                    vectors = nn.functional.normalize(vectors, dim=-1)
                out[batch.indices] = vectors.cpu().numpy()
                done(len(batch.indices))
        return out

    def _pooled(self, batch: TokenBatch, skip: int) -> Tensor:
        """T tokens of B texts -> (B, columns), float32; zeros for a text without tokens."""
        if 0 in batch.lengths:  # an empty text, where the vocabulary adds no special tokens
            vectors = torch.zeros(len(batch.lengths), self._pooled_width, device=self.device)
            full = [row for row, length in enumerate(batch.lengths) if length]
            if full:
                vectors[full] = self._pooled(replace(batch, lengths=[batch.lengths[row] for row in full]), skip)
            return vectors
        inputs = batch.packed(self.device)
        if self.pooling == "pooler":
            pooler: Tensor = self.model.forward_packed(**inputs, wanted_tokens="first").pooler_output
            return pooler.float()
        if self.modes == ("lasttoken",) or (self.modes == ("cls",) and not skip):
            seqlens, wanted = batch.cu_seqlens, torch.zeros(len(batch.ids), dtype=torch.bool)
            wanted[(seqlens[1:] - 1 if self.modes == ("lasttoken",) else seqlens[:-1]).long()] = True
            chosen = wanted.to(self.device)
            states: Tensor = self.model.forward_packed(**inputs, wanted_tokens=chosen).last_hidden_state
            return states.float()
        states = self.model.forward_packed(**inputs).last_hidden_state
        return pool(states, batch.lengths, self.modes, skip)

    def _prompt_text(self, name: str | None, text: str | None) -> str | None:
        if text is None and name is not None:
            if name not in self.prompts:
                known = ", ".join(map(repr, self.prompts)) or "none"
                raise UsageError(f"prompt_name {name!r:.100}: the folder has no such prompt; known: {known}")
            return self.prompts[name]
        if text is not None and not isinstance(text, str):
            raise TypeError(f"prompt must be a str, not {type(text).__name__}")
        return text

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens that `prompt` takes at the beginning of a text, with the special tokens before it."""
        ids = self.tokenizer(prompt, max_length=self.max_length)["input_ids"]
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def _cut_width(self, truncate_dim: int | None) -> int:
        limit = self.truncate_dim if truncate_dim is None else truncate_dim
        if limit is not None and limit < 1:
            raise ValueError(f"truncate_dim is {limit}; expected at least 1")
        if truncate_dim is not None and truncate_dim > self._full_width:
            raise ValueError(f"truncate_dim is {truncate_dim}; the vectors have {self._full_width} columns")
        return self._full_width if limit is None else min(limit, self._full_width)

    def settings(self) -> dict[str, Any]:
        """Everything that the vectors depend on, so that interrupted work is not continued with another model."""
        return {
            "model": self._digest(),
            "pooling": self.pooling,
            "prompt": self.prompt,
            "truncate_dim": self.truncate_dim,
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "backend": self.backend,
            "device": str(self.device),
        }

    def _digest(self) -> str:
        """Checksum of the checkpoint's files, those of its modules included."""
        digest = hashlib.blake2b(digest_size=16)
        files = {
            path
            for place in self._places
            for path in (place.iterdir() if place.is_dir() else [place])
            if path.is_file()
        }
        for path in sorted(files):
            if path.suffix in _MODEL_FILES:
                digest.update(path.name.encode())
                with path.open("rb") as content:
                    while block := content.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()


def _normalizes(step: nn.Module) -> bool:
    return isinstance(step, Normalize)


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
