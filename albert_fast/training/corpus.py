"""Tokenises documents once into memory-mapped files, so that later passes read any part of a corpus of any size.

| file | what |
|---|---|
| tokens.bin | the ids of all documents, uint16 or uint32 |
| sentences.bin, documents.bin | int64: where each sentence and each document ends, in tokens |
| corpus.json | the counts, and the dtype of the ids |
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.files import read_json_object, replacing_folder
from ..text.documents import dataset_texts, read_documents, split_sentences
from ..text.tokenizer import Tokenizer

Array = npt.NDArray[Any]
DOCUMENTS_AT_A_TIME = 256
REPORT_SECONDS = 15.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class Documents:
    """Where documents come from; every pass reads them anew.

    Attributes:
        files: text files, tables and saved data sets, see `read_documents`; `cut` and `text_column` as there.
        rows: instead of files: strings or dicts that can be read more than once, such as a list or a `datasets.Dataset`.
    """

    files: tuple[str, ...] = ()
    cut: str = "blank_lines"
    text_column: str | None = None
    rows: Iterable[Any] | None = field(default=None, compare=False)

    def __iter__(self) -> Iterator[str]:
        """Yields the documents.

        Raises:
            ValueError: a file without any text. Others as `read_documents` and `dataset_texts`.
        """
        if self.rows is not None:
            yield from (text for text in dataset_texts(self.rows, self.text_column, "documents") if text.strip())
        for file in self.files:
            documents = read_documents(file, self.cut, self.text_column)
            first = next(documents, None)
            if first is None:
                raise ValueError(f"{file}: holds no text")
            yield first
            yield from documents

    def digest(self) -> str:
        """A checksum of the content and of how it is read; the names of files do not count."""
        total = hashlib.blake2b(json.dumps([self.cut, self.text_column]).encode(), digest_size=8)
        if self.rows is not None:
            for text in self:
                content = text.encode("utf-8", "surrogatepass")
                total.update(len(content).to_bytes(8, "little") + content)
        for file in self.files:
            folder = Path(file)
            parts = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
            for part in parts:
                total.update(part.stat().st_size.to_bytes(8, "little"))
                with part.open("rb") as stream:
                    while chunk := stream.read(CHUNK):
                        total.update(chunk)
        return total.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents: tokens (T,), and where sentences and documents end in them, ascending.

    The end of a document is the end of a sentence too. A process that gets a copy maps the files of `folder` itself.
    """

    tokens: Array
    sentence_ends: Array
    document_ends: Array
    folder: Path | None = None

    def __reduce__(self) -> Any:
        if self.folder is None:
            return type(self), (self.tokens, self.sentence_ends, self.document_ends)
        return open_corpus, (self.folder,)

    @property
    def document_begins(self) -> Array:
        return np.concatenate([[0], self.document_ends[:-1]])


def tokenised(
    documents: Documents, tokenizer: Tokenizer, parent: Path, say: Callable[[str], None] = lambda line: None
) -> Path:
    """The folder in `parent` with the tokens of these documents and this vocabulary; writes it if it is not there.

    The files are written in a scratch folder that is renamed when they are complete: after a kill the work starts anew.

    Raises:
        ValueError: no text, or half a surrogate pair; files that are no text, see `read_documents`.
        OSError: a file that cannot be read, a full disk.
    """
    vocabulary = hashlib.blake2b(tokenizer.backend.to_str().encode(), digest_size=8).hexdigest()
    key = hashlib.blake2b(f"{documents.digest()} {vocabulary}".encode(), digest_size=8).hexdigest()
    folder = parent / f"corpus-{key}"
    if not folder.exists():
        with replacing_folder(folder) as new:
            _write(documents, tokenizer, new, say)
    return folder


def open_corpus(folder: Path) -> Corpus:
    """Maps the files of a tokenised corpus into memory.

    Raises:
        ValueError: a file that is missing or has another size than corpus.json says.
    """
    about = read_json_object(folder / "corpus.json")
    arrays: list[Array] = []
    for name, dtype in (("tokens", about["dtype"]), ("sentences", "int64"), ("documents", "int64")):
        path, size = folder / f"{name}.bin", about[name] * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(f"{path}: is missing or not {size} bytes long; delete {folder}, and it is made again")
        arrays.append(np.memmap(path, dtype, mode="r"))
    tokens, sentences, documents = arrays
    return Corpus(tokens, sentences, documents, folder)


def _write(documents: Documents, tokenizer: Tokenizer, folder: Path, say: Callable[[str], None]) -> None:
    dtype: np.dtype[Any] = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    counts = dict.fromkeys(("tokens", "sentences", "documents"), 0)
    unknown, started = 0, time.monotonic()
    due = started + REPORT_SECONDS
    files = {name: (folder / f"{name}.bin").open("wb") for name in counts}
    try:
        source = iter(documents)
        while group := list(itertools.islice(source, DOCUMENTS_AT_A_TIME)):
            written = _encode(group, tokenizer, counts["tokens"])
            unknown += int((written[0] == tokenizer.unk_token_id).sum())
            for (name, file), values in zip(files.items(), written, strict=True):
                file.write(values.astype(dtype if name == "tokens" else np.int64).tobytes())
                counts[name] += len(values)
            if time.monotonic() >= due:
                due += REPORT_SECONDS
                rate = counts["tokens"] / (time.monotonic() - started)
                say(f"tokenising: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {rate:,.0f} tokens/s")
    finally:
        for file in files.values():
            file.close()
    if not counts["tokens"]:
        raise ValueError("the documents hold no text")
    (folder / "corpus.json").write_text(json.dumps({**counts, "dtype": dtype.name}))
    share = 100 * unknown / counts["tokens"]
    say(f"corpus: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {share:.2g} % of them unknown")


def _encode(group: list[str], tokenizer: Tokenizer, begin: int) -> tuple[Array, Array, Array]:
    """Ids of the documents of a group, sentence ends and document ends; `begin` tokens come before them."""
    cut = [split_sentences(document) for document in group]
    texts = [sentence for sentences in cut for sentence in sentences]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ends = begin + np.cumsum(lengths)
    last = np.cumsum([len(sentences) for sentences in cut]) - 1
    # A sentence or a document may come to nothing, such as one of invisible characters.
    documents = np.unique(ends[last[last >= 0]])
    ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return ids, np.unique(ends[ends > begin]), documents[documents > begin]


__all__ = ["Corpus", "Documents", "open_corpus", "tokenised"]
