"""Documents of every source, their sentences, and the memory-mapped corpus that they become."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from albert_fast.text.documents import dataset_texts, read_documents, split_sentences
from albert_fast.training.corpus import Documents, open_corpus, tokenised

pytest.importorskip("tokenizers", reason="the text extra is not installed")

from albert_fast.tokenization import Tokenizer, train_tokenizer

TEXTS = ["One film. It was, e.g., fine!\nA second line", "null", "NA", 'He said "Go." Then he went.', "Ende"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([line for text in TEXTS for line in text.split("\n")] * 4, 60, at_most=True)


def write_rows(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "body"], *enumerate(TEXTS)])


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("\n \n".join(TEXTS) + "\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\r\n\r\n".join(text.encode() for text in TEXTS)))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"id": 1, "body": text}) + "\n" for text in TEXTS))
    write_rows(tmp_path / "d.csv", ",")
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    assert list(read_documents(plain)) == TEXTS
    assert [text.replace("\r", "") for text in read_documents(tmp_path / "b.txt.gz")] == TEXTS
    for name in ("c.jsonl", "d.csv", "e.csv.gz"):
        assert list(read_documents(tmp_path / name, text_column="body")) == TEXTS
    (tmp_path / "f.tsv").write_text("text\nnull\nNA\n\n")
    assert list(read_documents(tmp_path / "f.tsv")) == ["null", "NA"]
    assert list(read_documents(plain, "lines")) == [line for text in TEXTS for line in text.split("\n")]


def test_saved_data_sets_and_rows_in_memory(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"body": TEXTS, "label": [0] * len(TEXTS)})
    made.save_to_disk(str(tmp_path / "set"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    assert list(read_documents(tmp_path / "set", text_column="body")) == TEXTS
    assert list(read_documents(tmp_path / "splits" / "train", text_column="body")) == TEXTS
    with pytest.raises(ValueError, match=r"splits: has the splits train; give one of them"):
        list(read_documents(tmp_path / "splits"))
    assert list(Documents(rows=made, text_column="body")) == TEXTS
    assert list(Documents(rows=TEXTS)) == TEXTS
    assert Documents(rows=made, text_column="body").digest() != Documents(rows=TEXTS[:-1], text_column="body").digest()
    with pytest.raises(ValueError, match="documents: has the splits train, test; give one of them"):
        list(Documents(rows={"train": TEXTS, "test": TEXTS}))
    with pytest.raises(TypeError, match="documents must be a list of texts, got one string"):
        list(Documents(rows=TEXTS[0]))
    with pytest.raises(ValueError, match="row 0: name the text column; the row has 'body'"):
        list(dataset_texts([{"body": "a"}], None, "rows"))
    with pytest.raises(ValueError, match="row 1, column 'text': expected a string, got int"):
        list(dataset_texts([{"text": "a"}, {"text": 3}], None, "rows"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nstill fine\n\xff\xfe\x00\n", r"a\.txt, line 3: byte 1 of the line is not utf-8"),
        (b"fine\n\x00\x01\x02\n", r"a\.txt, line 2: holds a NUL byte; is this a file of text\?"),
        (b"", r"a\.txt: holds no text"),
        (b"\n \n\n", r"a\.txt: holds no text"),
    ],
)
def test_a_file_that_is_no_text_is_named_and_leaves_nothing(
    content: bytes, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "a.txt"
    good.write_text("A fine film.")
    bad.write_bytes(content)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match=message):
        tokenised(Documents((str(good), str(bad))), tokenizer, out)
    assert list(out.iterdir()) == []


def test_sentences_lose_no_text() -> None:
    assert split_sentences(TEXTS[0]) == ["One film.", "It was, e.g., fine!", "A second line"]
    assert split_sentences(TEXTS[3]) == ['He said "Go."', "Then he went."]
    assert split_sentences("\u597d\u3002\u4e0d\u597d\uff01") == ["\u597d\u3002", "\u4e0d\u597d\uff01"]
    letters = list("ab.!?\"') \n\u3002\u0964")
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(letters, 30))
        assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_a_corpus_holds_the_tokens_and_ends_of_all_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(TEXTS[:1] + TEXTS[3:], rng.integers(1, 4))) for _ in range(600)]
    said: list[str] = []
    folder = tokenised(Documents(rows=texts), tokenizer, tmp_path, said.append)
    corpus = open_corpus(folder)
    assert corpus.tokens.dtype == np.uint16
    assert "600 documents" in said[-1]
    begins = corpus.document_begins
    assert len(begins) == 600
    for at in (0, 255, 256, 599):
        begin, end = begins[at], corpus.document_ends[at]
        pieces = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in split_sentences(texts[at])]
        assert corpus.tokens[begin:end].tolist() == [token for piece in pieces for token in piece]
        inside = (corpus.sentence_ends > begin) & (corpus.sentence_ends <= end)
        assert np.array_equal(corpus.sentence_ends[inside], begin + np.cumsum([len(piece) for piece in pieces]))
    copy = pickle.loads(pickle.dumps(corpus))
    assert isinstance(copy.tokens, np.memmap)
    assert np.array_equal(copy.tokens, corpus.tokens)
    said.clear()
    assert tokenised(Documents(rows=texts), tokenizer, tmp_path, said.append) == folder
    assert said == []
    assert tokenised(Documents(rows=texts[1:]), tokenizer, tmp_path) != folder
    (folder / "tokens.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"tokens\.bin: is missing or not \d+ bytes long"):
        open_corpus(folder)


def test_text_of_invisible_characters_makes_no_empty_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = open_corpus(tokenised(Documents(rows=["Ende", "\u200b", "Ende. \u200b"]), tokenizer, tmp_path))
    assert len(corpus.document_ends) <= 3
    assert (np.diff(corpus.document_ends, prepend=0) > 0).all()
    assert corpus.document_ends[-1] == corpus.sentence_ends[-1] == len(corpus.tokens)


def test_the_names_of_control_tokens_in_a_text_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.split_special_tokens = True
    corpus = open_corpus(tokenised(Documents(rows=["a [MASK] b [SEP] c"]), tokenizer, tmp_path))
    assert not {tokenizer.mask_token_id, tokenizer.sep_token_id} & set(corpus.tokens.tolist())


def test_marks_of_scripts_that_need_them_stay_in_the_vocabulary() -> None:
    line = "\u0e19\u0e49\u0e33 caf\u00e9 \u0939\u093f\u0928\u094d\u0926\u0940"
    kept = train_tokenizer([line] * 20, 60, at_most=True, keep_accents=True)
    pieces = "".join(kept.tokenize(line))
    assert all(mark in pieces for mark in ("\u0e49", "\u00e9", "\u094d"))
    dropped = "".join(train_tokenizer([line] * 20, 60, at_most=True).tokenize(line))
    assert "\u00e9" not in dropped
