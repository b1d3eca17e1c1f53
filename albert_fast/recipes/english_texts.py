"""Turns raw English data sets into what a small English ALBERT is trained on: documents to pre-train on, labelled opinions.

| folder or file of the data | what is read |
|---|---|
| aclImdb/{train,test,unsup}.tsv.gz | film reviews: label, stars, origin, text (Maas et al. 2011); test is only tested on |
| SST-2/{train,dev,test}.tsv | phrases and sentences about films, with labels (Socher et al. 2013) |
| wikitext-2/{valid,test}.txt | articles (Merity et al. 2016) |
| SubjQA/electronics.train.csv | reviews of electronics, without their questions (Bjerva et al. 2020) |
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..runtime.files import replacing
from ..training.data import read_examples
from ..training.masking import drop_contained_lines

NAMES = ("negative", "positive")
TITLE = re.compile(r" = [^=]+ = ")  # of an article of wikitext-2; sections have more signs


def write_documents(data: Path, folder: Path) -> list[Path]:
    """Writes the text to pre-train on, a document a line, and returns the files; those that exist stay as they are.

    Raises:
        OSError: a data set is missing.
    """
    sources = {
        "films": lambda: (text for part in ("train", "unsup") for _, text in reviews(data, part)),
        "sentences": lambda: (joined(line) for line in drop_contained_lines(read_examples(sst2(data, "train")).texts)),
        "articles": lambda: (article for part in ("valid", "test") for article in articles(data, part)),
        "electronics": lambda: electronics(data),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, documents in sources.items():
        files.append(folder / f"{name}.txt.gz")
        if not files[-1].exists():
            _write_gz(files[-1], (" ".join(document.split()) + "\n" for document in documents()))
    return files


def write_opinions(data: Path, folder: Path, reviews_held_out: int = 2500) -> dict[str, Path]:
    """Writes labelled opinions as TSV files with the columns text and label, and returns them by name.

    train: the labelled reviews but about `reviews_held_out`, and SST-2's training lines. dev: those reviews, and SST-2's dev lines.
    sst2, imdb: the test sets. Files that exist stay as they are.

    Raises:
        OSError: a data set is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.tsv" for name in ("train", "dev", "sst2", "imdb")}
    if all(file.exists() for file in files.values()):
        return files
    lines = {part: list(phrases(data, part)) for part in ("train", "dev", "test")}
    labelled = list(reviews(data, "train"))
    # The file has one label after the other: every tenth of both.
    every = max(1, len(labelled) // reviews_held_out)
    held = labelled[::every]
    kept = [row for number, row in enumerate(labelled) if number % every]
    for name, rows in (
        ("train", [*kept, *lines["train"]]),
        ("dev", [*held, *lines["dev"]]),
        ("sst2", lines["test"]),
        ("imdb", list(reviews(data, "test"))),
    ):
        with replacing(files[name]) as file:
            file.write(b"text\tlabel\n")
            for label, text in rows:
                file.write(f"{' '.join(text.split())}\t{NAMES[label]}\n".encode())
    return files


def reviews(data: Path, part: str) -> Iterator[tuple[int, str]]:
    """(label, text) of the film reviews: 0 negative, 1 positive, -1 where there is none."""
    with gzip.open(data / "aclImdb" / f"{part}.tsv.gz", "rt", encoding="utf-8") as file:
        for line in file:
            label, *_, text = line.rstrip("\n").split("\t")
            yield int(label), re.sub(r"<br\s*/?>", " ", text)


def sst2(data: Path, part: str) -> Path:
    """The file of a split of SST-2."""
    return data / "SST-2" / f"{part}.tsv"


def phrases(data: Path, part: str) -> Iterator[tuple[int, str]]:
    """(label, text) of SST-2's lines, written as people write."""
    examples = read_examples(sst2(data, part), label_names=["0", "1"])
    for text, label in zip(examples.texts, examples.labels, strict=True):
        yield int(label), joined(str(text))


def joined(text: str) -> str:
    """Joins what treebanks write apart: "does n't work , it 's" becomes "doesn't work, it's"."""
    text = re.sub(r" (n't|'(?:s|re|ve|ll|d|m))(?![\w'])", r"\1", f" {text} ")
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text).replace("-lrb- ", "(").replace(" -rrb-", ")")
    return re.sub(r"([(\[]) ", r"\1", text).strip()


def articles(data: Path, part: str) -> Iterator[str]:
    """The articles of wikitext-2, without the marks of its tokenisation."""
    lines: list[str] = []
    for line in (data / "wikitext-2" / f"{part}.txt").read_text(encoding="utf-8").splitlines():
        if TITLE.fullmatch(line) and lines:
            yield " ".join(lines)
            lines = []
        if line.strip() and not line.startswith(" ="):
            lines.append(joined(re.sub(r" @([-,.])@ ", r"\1", line).replace("<unk>", "")))
    if lines:
        yield " ".join(lines)


def electronics(data: Path) -> Iterator[str]:
    """Reviews of electronics, each once."""
    with (data / "SubjQA" / "electronics.train.csv").open(encoding="utf-8", newline="") as file:
        for review in dict.fromkeys(row["review"] for row in csv.DictReader(file)):
            yield review.removesuffix("ANSWERNOTFOUND")


def _write_gz(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        for line in lines:
            file.write(line.encode())


__all__ = ["NAMES", "joined", "write_documents", "write_opinions"]
