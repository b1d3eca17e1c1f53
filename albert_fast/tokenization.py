"""Text in, ids out: reads the vocabulary that lies in a checkpoint's folder, and trains new ones.

    tokenizer = load_tokenizer("path/to/checkpoint")
    model(**tokenizer(["A fine film.", "Dull."], return_tensors="pt"))

| file | what it is | who ships it |
|---|---|---|
| tokenizer.json | a whole pipeline, obeyed as it stands | what transformers and `Tokenizer.save` write |
| spiece.model | SentencePiece unigram, with the text rules of ALBERT's release | English ALBERT v1, v2 |
| vocab.txt | WordPiece, one piece a line | Chinese ALBERT, BERT |

The first that exists is read, together with tokenizer_config.json, special_tokens_map.json and config.json where they
are there. Both libraries are an extra: `pip install "albert-fast[text]"`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _vocabulary

if TYPE_CHECKING:
    import tokenizers
    import torch

DEFAULT_MAX_LENGTH = 512
_FIELDS = ("input_ids", "token_type_ids", "attention_mask")


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Tokenizer of a checkpoint's folder; a vocabulary file itself is taken too.

    Errors: FileNotFoundError where there is no folder or no vocabulary in it; ValueError that names a file that is
    broken; ImportError that names the extra where `tokenizers` is not installed.
    """
    place = Path(folder)
    if not place.exists():
        raise FileNotFoundError(f"no such folder or file: {place}")
    file = place if place.is_file() else _vocabulary.find(place)
    backend, settings = _vocabulary.read(file)
    return Tokenizer(backend, settings)


def train_tokenizer(
    lines: Iterable[str],
    vocab_size: int,
    *,
    at_most: bool = False,
    kind: str = "unigram",
    lower_case: bool = True,
    keep_accents: bool = False,
    character_coverage: float = 0.99995,
    max_lines: int = 0,
    seed: int = 0,
) -> Tokenizer:
    """New vocabulary of vocab_size pieces, learnt from lines of text (an open file is one).

    kind "unigram" is SentencePiece with ALBERT's settings (<pad> 0, <unk> 1, [CLS] 2, [SEP] 3, [MASK] 4; punctuation
    that is always a piece of its own); "wordpiece" is BERT's. max_lines: draw that many lines for unigram, 0 for all.
    at_most: from a text that holds too little for vocab_size, take all that it gives.
    Errors: ValueError where the text holds too little for vocab_size and `at_most` is off, naming both.
    """
    if kind == "unigram":
        backend, settings = _vocabulary.train_unigram(
            lines, vocab_size, at_most, lower_case, keep_accents, character_coverage, max_lines, seed
        )
    elif kind == "wordpiece":
        backend, settings = _vocabulary.train_wordpiece(lines, vocab_size, lower_case, keep_accents)
    else:
        raise ValueError(f"kind is {kind!r}; known: 'unigram', 'wordpiece'")
    return Tokenizer(backend, settings)


class Tokenizer:
    """Callable on a str, a list of str, a pair of either, or a list of (str, str) pairs."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        """backend: the pipeline of the `tokenizers` library. settings: tokenizer_config.json's content."""
        self.backend = backend
        self.settings = dict(settings)
        self.model_max_length = int(settings.get("model_max_length", DEFAULT_MAX_LENGTH))
        self.pad_token: str = settings["pad_token"]
        self.unk_token: str = settings["unk_token"]
        self.cls_token: str = settings["cls_token"]
        self.sep_token: str = settings["sep_token"]
        self.mask_token: str | None = settings.get("mask_token")
        self._lock = threading.Lock()  # truncation is a state of the backend, not an argument of its encode

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        model = type(self.backend.model).__name__
        return f"Tokenizer({model}, {self.vocab_size} pieces, model_max_length={self.model_max_length})"

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special and added ones counted."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def pad_token_id(self) -> int:
        return int(self.convert_tokens_to_ids(self.pad_token))

    @property
    def unk_token_id(self) -> int:
        return int(self.convert_tokens_to_ids(self.unk_token))

    @property
    def cls_token_id(self) -> int:
        return int(self.convert_tokens_to_ids(self.cls_token))

    @property
    def sep_token_id(self) -> int:
        return int(self.convert_tokens_to_ids(self.sep_token))

    @property
    def mask_token_id(self) -> int | None:
        return None if self.mask_token is None else self.convert_tokens_to_ids(self.mask_token)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the pad, unknown, cls, sep and mask tokens and of every other special one, sorted."""
        return sorted(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return self.backend.get_vocab(with_added_tokens=True)

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[tuple[str, str]],
        text_pair: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        truncation: bool = False,
        padding: bool | str = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_offsets: bool = False,
        return_special_tokens_mask: bool = False,
    ) -> dict[str, Any]:
        """input_ids, token_type_ids and attention_mask: lists (one list for a single text), or with
        return_tensors="pt" int64 tensors (B, S), padded on the right to the longest row (B = 1 for a single text).

        max_length: cut to that many tokens, special ones counted, a pair from its longer side first; truncation=True
        alone cuts to model_max_length. padding: True pads lists too, "max_length" pads to that length.
        return_offsets adds offset_mapping, (start, end) in characters of the text that was given, (0, 0) for a special
        token; return_special_tokens_mask adds special_tokens_mask, 1 where the template put a special token.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; known: None (lists), 'pt' (tensors)")
        if padding not in (True, False, "longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; known: False, True, 'longest', 'max_length'")
        rows, single = _rows(text, text_pair)
        limit = max_length if max_length is not None else self.model_max_length
        encodings = self._encode(
            rows, limit if truncation or max_length is not None else None, add_special_tokens, return_offsets
        )
        out: dict[str, Any] = {
            "input_ids": [e.ids for e in encodings],
            "token_type_ids": [e.type_ids for e in encodings],
            "attention_mask": [e.attention_mask for e in encodings],
        }
        if return_special_tokens_mask:
            out["special_tokens_mask"] = [e.special_tokens_mask for e in encodings]
        if return_offsets:
            out["offset_mapping"] = [e.offsets for e in encodings]
        if padding or return_tensors:
            out = self.pad(out, length=limit if padding == "max_length" else None)
        if return_tensors == "pt":
            return _tensors(out)
        return {key: value[0] for key, value in out.items()} if single else out

    def pad(self, batch: Mapping[str, Sequence[Sequence[Any]]], *, length: int | None = None) -> dict[str, Any]:
        """Rows of unequal length, as __call__ returns them, padded on the right to `length` or to the longest."""
        longest = max((len(row) for row in batch["input_ids"]), default=0)
        if length is not None and longest > length:
            raise ValueError(f"a row of {longest} tokens does not fit in length {length}; cut it with max_length")
        width = longest if length is None else length
        fill = {"input_ids": self.pad_token_id, "special_tokens_mask": 1, "offset_mapping": (0, 0)}
        return {
            key: [list(row) + [fill.get(key, 0)] * (width - len(row)) for row in rows] for key, rows in batch.items()
        }

    def collate(self, batch: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, torch.Tensor]:
        """Rows of unequal length, as __call__ returns them, as padded int64 tensors (B, S)."""
        return _tensors(self.pad(batch))

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text, without the special tokens of the template."""
        return list(self.convert_ids_to_tokens(self(text, add_special_tokens=False)["input_ids"]))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids (a list or a 1-d tensor). Case and spacing that the vocabulary does not keep are lost."""
        return str(self.backend.decode(self._checked(ids), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Piece of an id, or pieces of many."""
        if isinstance(ids, int):
            return self.backend.id_to_token(self._checked([ids])[0])
        return [self.backend.id_to_token(i) for i in self._checked(ids)]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a piece, or ids of many; a piece that is not in the vocabulary gets the unknown token's id."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend.token_to_id(tokens)
        return self.backend.token_to_id(self.unk_token) if found is None else found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which load_tokenizer and transformers read."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self.backend.no_truncation()
            pipeline = self.backend.to_str(pretty=False)
        _write(place / "tokenizer.json", pipeline)
        _write(place / "tokenizer_config.json", json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")

    def _encode(
        self, rows: list[Any], limit: int | None, add_special_tokens: bool, with_offsets: bool
    ) -> list[tokenizers.Encoding]:
        if limit is not None:
            paired = bool(rows) and isinstance(rows[0], tuple)
            least = self.backend.num_special_tokens_to_add(paired) if add_special_tokens else 0
            if limit < max(1, least):
                raise ValueError(f"max_length is {limit}, the special tokens alone take {least}")
        encode = self.backend.encode_batch if with_offsets else self.backend.encode_batch_fast
        with self._lock:
            if limit is None:
                self.backend.no_truncation()
            else:
                self.backend.enable_truncation(limit, strategy="longest_first")
            return list(encode(rows, add_special_tokens=add_special_tokens))

    def _checked(self, ids: Iterable[int]) -> list[int]:
        listed = [int(i) for i in ids]
        for position, i in enumerate(listed):
            if i < 0 or self.backend.id_to_token(i) is None:
                raise IndexError(f"id {i} at position {position} is not in the vocabulary of {self.vocab_size}")
        return listed


def _rows(text: Any, text_pair: Any) -> tuple[list[Any], bool]:
    """The texts as a list of str or of (str, str), and whether one single text was given."""
    single = isinstance(text, str)
    if single != isinstance(text_pair, str) and text_pair is not None:
        raise TypeError(f"text is {type(text).__name__}, text_pair {type(text_pair).__name__}: both str or both lists")
    if not single and not isinstance(text, Sequence):
        raise TypeError(f"text must be a str or a list, not {type(text).__name__}")
    if isinstance(text, (bytes, bytearray)):
        raise TypeError("text is bytes; decode it first, for instance with .decode('utf-8')")
    firsts = [text] if single else list(text)
    if text_pair is not None:
        seconds = [text_pair] if single else list(text_pair)
        if len(firsts) != len(seconds):
            raise ValueError(f"{len(firsts)} texts and {len(seconds)} second texts: as many of both are needed")
        firsts = list(zip(firsts, seconds, strict=True))
    rows = [tuple(row) if isinstance(row, (list, tuple)) else row for row in firsts]
    paired = bool(rows) and isinstance(rows[0], tuple)
    for index, row in enumerate(rows):
        parts = row if isinstance(row, tuple) else (row,)
        if len(parts) != (2 if paired else 1) or not all(isinstance(part, str) for part in parts):
            raise TypeError(f"row {index} is {row!r}; expected {'a pair of str' if paired else 'a str'}")
    return rows, single


def _tensors(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    shape = (len(batch["input_ids"]), len(batch["input_ids"][0]) if batch["input_ids"] else 0)
    return {
        key: torch.tensor(rows, dtype=torch.int64).view(*shape, *((2,) if key == "offset_mapping" else ()))
        for key, rows in batch.items()
    }


def _write(path: Path, content: str) -> None:
    """Written aside and renamed: a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(content, encoding="utf-8")
    aside.replace(path)
