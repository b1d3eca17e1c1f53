"""The tokenizer: reads the vocabulary in a checkpoint's folder, turns texts into ids, and trains new vocabularies.

    tokenizer = load_tokenizer("path/to/checkpoint")
    model(**tokenizer(["A fine film.", "Dull."], return_tensors="pt"))

| file | what it is | written by |
|---|---|---|
| tokenizer.json | a complete pipeline; tokenizer_config.json may change it | transformers, `Tokenizer.save` |
| spiece.model | SentencePiece unigram, with the text rules of ALBERT's release | English ALBERT v1, v2 |
| vocab.txt | WordPiece, one piece on each line | Chinese ALBERT, BERT |

The first of these files that exists is read, with tokenizer_config.json, special_tokens_map.json and config.json if they
exist. If a folder has both spiece.model and vocab.txt, the one that belongs to the model is read. The libraries are an
extra: `pip install "albert-fast[text]"`.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import secrets
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.files import replacing
from . import normalization as _normalization
from . import vocabulary as _vocabulary
from . import vocabulary_training as _training

if TYPE_CHECKING:
    import tokenizers
    import torch

DEFAULT_MAX_LENGTH = 512
_CUTS = ("longest_first", "only_first", "only_second")


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of a checkpoint's folder; takes a vocabulary file too.

    Settings in tokenizer_config.json override tokenizer.json: do_lower_case, keep_accents, strip_accents,
    tokenize_chinese_chars, remove_space, padding_side, truncation_side, split_special_tokens, names of special tokens,
    added tokens. model_max_length is the smaller of its own value and config.json's max_position_embeddings. Warns if the
    vocabulary has more pieces than config.json's vocab_size.

    Raises:
        FileNotFoundError: there is no such folder, or no vocabulary in it.
        ValueError: a broken file, which the message names; or both spiece.model and vocab.txt fit.
        ImportError: a library is missing; the message names the extra.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"no such folder or file: {path}")
    file = path if path.is_file() else _vocabulary.find(path)
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
    """Learns a new vocabulary of vocab_size pieces from lines of text, such as an open file.

    Args:
        at_most: if the text holds too little for vocab_size pieces, take as many as it gives.
        kind: "unigram" is SentencePiece with ALBERT's settings (<pad> 0, <unk> 1, [CLS] 2, [SEP] 3, [MASK] 4; some
            punctuation is always a piece of its own); "wordpiece" is BERT's.
        character_coverage: share of the text's characters that "unigram" knows.
        max_lines: draw this many lines for "unigram"; 0: all.

    Raises:
        ValueError: the text holds too little for vocab_size, and `at_most` is off.
    """
    if kind == "unigram":
        how = _training.UnigramTraining(
            vocab_size, at_most, lower_case, keep_accents, character_coverage, max_lines, seed
        )
        backend, settings = _training.train_unigram(lines, how)
    elif kind == "wordpiece":
        backend, settings = _training.train_wordpiece(lines, vocab_size, lower_case, keep_accents)
    else:
        raise ValueError(f"kind is {kind!r}; known: 'unigram', 'wordpiece'")
    return Tokenizer(backend, settings)


class Tokenizer:
    """Turns texts into ids: call it on a str, a list of str, a pair of either, or a list of (str, str) pairs.

    Calls do not change the tokenizer, so threads and forked processes share it without a lock.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        """backend: a pipeline of the `tokenizers` library. settings: the content of tokenizer_config.json."""
        self.backend = backend
        self.settings = dict(settings)
        self.model_max_length = int(settings.get("model_max_length", DEFAULT_MAX_LENGTH))
        self.padding_side: str = settings.get("padding_side", "right")
        self.truncation_side: str = settings.get("truncation_side", "right")
        self.split_special_tokens = bool(settings.get("split_special_tokens", False))
        self.pad_token: str = settings["pad_token"]
        self.unk_token: str = settings["unk_token"]
        self.cls_token: str = settings["cls_token"]
        self.sep_token: str = settings["sep_token"]
        self.mask_token: str | None = settings.get("mask_token")
        backend.no_truncation()  # both are done here: in the library they are a state that calls would share
        backend.no_padding()
        contracted = _normalization.contracted(backend.normalizer and backend.normalizer.__getstate__())
        self._contracted = re.compile("|".join(map(re.escape, contracted))) if contracted else None
        self._splitting: dict[frozenset[str] | bool, tokenizers.Tokenizer] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_splitting": {}}

    def __repr__(self) -> str:
        model = type(self.backend.model).__name__
        return f"Tokenizer({model}, {self.vocab_size} pieces, model_max_length={self.model_max_length})"

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of ids: the highest id plus 1, special and added pieces included."""
        size = int(self.backend.get_vocab_size(with_added_tokens=True))
        if self.backend.id_to_token(size - 1) is not None and self.backend.id_to_token(size) is None:
            return size
        return max(self.get_vocab().values()) + 1  # a line that is twice in a vocab.txt leaves an id without a piece

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
    def all_special_tokens(self) -> list[str]:
        """All special tokens (pad, unknown, cls, sep, mask and others) in the order of their ids."""
        return [str(self.backend.id_to_token(i)) for i in self.all_special_ids]

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens (pad, unknown, cls, sep, mask and others), sorted."""
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
        truncation: bool | str = False,
        padding: bool | str = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_offsets: bool = False,
        return_special_tokens_mask: bool = False,
        split_special_tokens: bool | Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Returns input_ids, token_type_ids and attention_mask.

        They are lists (one list for a single text) or, with return_tensors="pt", int64 tensors (B, S), padded to the
        longest row (B = 1 for a single text).

        Args:
            max_length: cut to this many tokens, special tokens included.
            truncation: True without max_length cuts to model_max_length. The longer text of a pair is cut first; with
                "only_first" or "only_second" only that text.
            padding: True pads lists too; "max_length" pads to that length. The attributes padding_side and
                truncation_side say on which side.
            return_offsets: add offset_mapping: (start, end) in characters of the given text, (0, 0) for special tokens.
            return_special_tokens_mask: add special_tokens_mask: 1 where the template put a special token.
            split_special_tokens: what special tokens ("[SEP]", "<pad>") mean that are written in a text. False: the
                tokens, as in transformers. True: plain text, as texts from strangers need it. A list of special tokens:
                these are plain text. None: as the attribute of this name says, by default False.

        Raises:
            TypeError: a text that is not a str, or an argument of another type.
            ValueError: half of a surrogate pair in a text, or an argument of another value.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; known: None (lists), 'pt' (tensors)")
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding is {padding!r}; known: False, True, 'longest', 'max_length'")
        padding = padding != "do_not_pad" and padding
        if truncation not in (True, False, "do_not_truncate", *_CUTS):
            raise ValueError(f"truncation is {truncation!r}; known: False, True, {', '.join(map(repr, _CUTS))}")
        if max_length is not None and (isinstance(max_length, bool) or not hasattr(max_length, "__index__")):
            raise TypeError(f"max_length must be an int, not {type(max_length).__name__}")
        rows, single = _rows(text, text_pair)
        limit = max_length if max_length is not None else self.model_max_length
        cut = truncation if truncation in _CUTS else "longest_first"
        cuts = max_length is not None or truncation not in (False, "do_not_truncate")
        least = self.backend.num_special_tokens_to_add(isinstance(rows[0], tuple)) if rows and add_special_tokens else 0
        if cuts and limit < max(1, least):
            raise ValueError(f"max_length is {limit}, the special tokens alone take {least}")
        wanted = [("input_ids", "ids"), ("token_type_ids", "type_ids"), ("attention_mask", "attention_mask")]
        wanted += [("special_tokens_mask", "special_tokens_mask")] if return_special_tokens_mask else []
        encodings = self._encode(rows, add_special_tokens, return_offsets, split_special_tokens)
        out: dict[str, Any] = {key: [getattr(e, attribute) for e in encodings] for key, attribute in wanted}
        if return_offsets:
            out["offset_mapping"] = [self._spans(row, e) for row, e in zip(rows, encodings, strict=True)]
        if cuts:
            self._cut(out, encodings, limit, str(cut))
        if padding or return_tensors:
            out = self.pad(out, length=limit if padding == "max_length" else None)
        if return_tensors == "pt":
            return _tensors(out)
        return {key: value[0] for key, value in out.items()} if single else out

    def pad(self, batch: Mapping[str, Sequence[Sequence[Any]]], *, length: int | None = None) -> dict[str, Any]:
        """Pads rows, as __call__ returns them, to `length` or to the longest row, on padding_side."""
        longest = max((len(row) for row in batch["input_ids"]), default=0)
        if length is not None and longest > length:
            raise ValueError(f"a row of {longest} tokens does not fit in length {length}; cut it with max_length")
        width = longest if length is None else length
        fill = {"input_ids": self.pad_token_id, "special_tokens_mask": 1, "offset_mapping": (0, 0)}
        out: dict[str, Any] = {}
        for key, rows in batch.items():
            padded = [(list(row), [fill.get(key, 0)] * (width - len(row))) for row in rows]
            out[key] = [pads + row if self.padding_side == "left" else row + pads for row, pads in padded]
        return out

    def collate(self, batch: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, torch.Tensor]:
        """Pads rows, as __call__ returns them, and makes int64 tensors (B, S) of them."""
        return _tensors(self.pad(batch))

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text, without the special tokens of the template."""
        return list(self.convert_ids_to_tokens(self(text, add_special_tokens=False)["input_ids"]))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids (a list or a 1-d tensor), without the case and spacing that the vocabulary does not keep."""
        return str(self.backend.decode(self._checked(ids), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The piece of an id, or a list of pieces for several ids."""
        if isinstance(ids, int):
            return self.backend.id_to_token(self._checked([ids])[0])
        return [self.backend.id_to_token(i) for i in self._checked(ids)]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a piece, or a list of ids for several pieces; unknown pieces get the unknown token's id."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend.token_to_id(tokens)
        return self.backend.token_to_id(self.unk_token) if found is None else found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which load_tokenizer and transformers read."""
        directory = Path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        for name, content in (
            ("tokenizer.json", self.backend.to_str(pretty=False)),
            ("tokenizer_config.json", settings),
        ):
            with replacing(directory / name) as file:
                file.write(content.encode())

    def _encode(
        self, rows: list[Any], add_special_tokens: bool, with_offsets: bool, split: bool | Iterable[str] | None
    ) -> list[tokenizers.Encoding]:
        backend = self._backend(self.split_special_tokens if split is None else split)
        encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
        try:
            with _vocabulary.naming("the vocabulary's pipeline fails on these texts"):
                return list(encode(rows, add_special_tokens=add_special_tokens))
        except ValueError:
            _check_surrogates(rows)
            raise

    def _backend(self, split: bool | Iterable[str]) -> tokenizers.Tokenizer:
        """The pipeline, or a copy with the same ids that treats the special tokens in `split` as plain text.

        The library's own switch is not enough: the model would still find "<pad>" and "[SEP]", which are pieces of a
        SentencePiece vocabulary.
        """
        if split is False:
            return self.backend
        if isinstance(split, str):
            raise TypeError(f"split_special_tokens is {split!r}; expected True, False or a list of special tokens")
        key = True if split is True else frozenset(split)
        if key not in self._splitting:
            special = self.all_special_tokens
            chosen = frozenset(special if split is True else split)
            if unknown := chosen.difference(special):
                raise ValueError(f"split_special_tokens: {sorted(unknown)} are not special tokens; these are {special}")
            content = json.loads(self.backend.to_str())
            secret = secrets.token_hex(16)  # no text contains it, so the renamed tokens are never found
            hidden = {token: f"\x00{secret} {token}" for token in chosen}
            for token in content["added_tokens"]:
                token["content"] = hidden.get(token["content"], token["content"])
            model = content["model"]
            if isinstance(model["vocab"], dict):
                model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
            else:
                model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
            if model.get("unk_token") in hidden:
                model["unk_token"] = hidden[model["unk_token"]]
            self._splitting[key] = type(self.backend).from_str(json.dumps(content))
        return self._splitting[key]

    def _cut(self, out: dict[str, list[Any]], encodings: list[tokenizers.Encoding], limit: int, strategy: str) -> None:
        """Cuts rows of more than `limit` tokens; the special tokens of the template stay."""
        for index, encoding in enumerate(encodings):
            if len(encoding) <= limit:
                continue
            owners = encoding.sequence_ids  # None for special tokens of the template
            lengths = owners.count(0), owners.count(1)
            first, second = _shares(*lengths, limit - owners.count(None), strategy)
            if first < 0 or second < 0:
                raise ValueError(
                    f"text {index}: {lengths[0]} and {lengths[1]} tokens cannot be cut to {limit} by {strategy!r}"
                )
            kept: set[int] = set()
            for number, count in enumerate((first, second)):
                own = [position for position, owner in enumerate(owners) if owner == number]
                kept.update(own[len(own) - count :] if self.truncation_side == "left" else own[:count])
            chosen = [position for position, owner in enumerate(owners) if owner is None or position in kept]
            for rows in out.values():
                rows[index] = [rows[index][position] for position in chosen]

    def _spans(self, row: str | tuple[str, str], encoding: tokenizers.Encoding) -> list[tuple[int, int]]:
        """The offsets of a row's tokens, corrected where the library gives only a part of a token's characters."""
        spans: list[tuple[int, int]] = encoding.offsets
        for number, text in enumerate(row if isinstance(row, tuple) else (row,)):
            own = [i for i, owner in enumerate(encoding.sequence_ids) if owner == number]
            # For a replacement of several characters the library gives the last one.
            matches = self._contracted.finditer(text) if self._contracted else ()
            moved = {match.end() - 1: match.start() for match in matches}
            for i, following in zip(own, [*(spans[i][0] for i in own[1:]), len(text)], strict=False):
                start, end = spans[i]
                # For a character that was composed from several the library gives the first one.
                while end < following and _extends(text[end]) and self._differ(text[start:end], text[start : end + 1]):
                    end += 1
                spans[i] = moved.get(start, start), end
        return spans

    def _differ(self, text: str, other: str) -> bool:
        normalizer = self.backend.normalizer
        return normalizer is not None and normalizer.normalize_str(text) != normalizer.normalize_str(other)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        listed = [int(i) for i in ids]
        for position, i in enumerate(listed):
            if i < 0 or self.backend.id_to_token(i) is None:
                raise IndexError(f"id {i} at position {position} is not in the vocabulary of {self.vocab_size}")
        return listed


def _rows(text: Any, text_pair: Any) -> tuple[list[Any], bool]:
    """Returns the texts as a list of str or of (str, str), and whether a single text was given."""
    single = isinstance(text, str)
    for name, value in (("text", text), ("text_pair", text_pair)):
        if isinstance(value, (bytes, bytearray)):
            raise TypeError(f"{name} is bytes; decode it first, for instance with .decode('utf-8')")
        if not isinstance(value, Sequence) and (value is not None or name == "text"):
            raise TypeError(f"{name} must be a str or a list, not {type(value).__name__}")
    if single != isinstance(text_pair, str) and text_pair is not None:
        raise TypeError(f"text is {type(text).__name__}, text_pair {type(text_pair).__name__}: both str or both lists")
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
            want = "a pair of str" if paired else "a str"
            raise TypeError(f"row {index} is {reprlib.repr(row)}; expected {want}")
    return rows, single


def _check_surrogates(rows: list[Any]) -> None:
    """Raises ValueError for the first text with half of a surrogate pair, which is not a character."""
    for index, row in enumerate(rows):
        for text in row if isinstance(row, tuple) else (row,):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                raise ValueError(
                    f"text {index}: half a surrogate pair, U+{code:04X}, at position {error.start} is no character; "
                    "text.encode('utf-8', 'replace').decode() replaces it"
                ) from None


def _shares(first: int, second: int, room: int, strategy: str) -> tuple[int, int]:
    """How many tokens stay of two texts of `first` and `second` tokens, so that they fill `room`."""
    over = first + second - room
    if strategy == "only_first" or (second == 0 and strategy == "longest_first"):
        return first - over, second
    if strategy == "only_second":
        return first, second - over
    short, long = min(first, second), max(first, second)
    if short > room // 2:
        short, long = room // 2, room - room // 2
    else:
        long = room - short
    return (short, long) if first <= second else (long, short)


def _extends(character: str) -> bool:
    """Whether a character can be composed with the one before it: a mark, or a vowel or final consonant of Hangul."""
    return "\u1160" <= character <= "\u11ff" or unicodedata.category(character).startswith("M")


def _tensors(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    shape = (len(batch["input_ids"]), len(batch["input_ids"][0]) if batch["input_ids"] else 0)
    return {
        key: torch.tensor(rows, dtype=torch.int64).view(*shape, *((2,) if key == "offset_mapping" else ()))
        for key, rows in batch.items()
    }
