"""Reads the raw files of seven data sets into rows that `fit` takes: train, dev to choose the best epoch, test.

| function | files of the data | split |
|---|---|---|
| trec | TREC/TREC.{train,test}: question classes (Li and Roth 2002), the six coarse ones | every tenth training line is dev |
| cola | CoLA/{in_domain_train,in_domain_dev,out_of_domain_dev}.tsv: acceptability (Warstadt et al. 2018) | the last is test |
| stsb | STS-B/stsb-en-{train,dev,test}.csv: similarity of sentences, 0 to 5 (Cer et al. 2017) | as given |
| wnut17 | WNUT17/{wnut17train.conll,emerging.dev.conll,emerging.test.annotated}: entities (Derczynski et al. 2017) | as given |
| subjqa | SubjQA/electronics.{train,dev,test}.csv: questions about reviews, or no answer (Bjerva et al. 2020) | as given |
| xquad | XQuAD/xquad.en.json: questions about articles (Artetxe et al. 2020) | by paragraph, in order: 70, 10 and 20 % |
| chnsenticorp | ChnSentiCorp/ChnSentiCorp_htl_all.csv: Chinese reviews of hotels | of every ten rows one is dev and one test |
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..text.conll_files import read_conll
from ..text.squad_files import read_squad

Row = dict[str, Any]
NO_ANSWER = "ANSWERNOTFOUND"  # SubjQA's; it also stands at the end of every review


class Split(NamedTuple):
    """Rows to learn from, to choose by, and to test on."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


def trec(data: Path) -> Split:
    def rows(part: str) -> list[Row]:
        lines = (data / "TREC" / f"TREC.{part}").read_text(encoding="latin-1").splitlines()
        labelled = (line.partition(" ") for line in lines if line.strip())
        return [{"text": text, "label": label.partition(":")[0]} for label, _, text in labelled]

    train = rows("train")
    return Split([row for number, row in enumerate(train) if number % 10], train[::10], rows("test"))


def cola(data: Path) -> Split:
    names = "unacceptable", "acceptable"

    def rows(part: str) -> list[Row]:
        lines = (data / "CoLA" / f"{part}.tsv").read_text(encoding="utf-8").splitlines()
        cells = (line.split("\t") for line in lines if line.strip())
        return [{"text": text, "label": names[int(label)]} for _, label, _, text in cells]

    return Split(*map(rows, ("in_domain_train", "in_domain_dev", "out_of_domain_dev")))


def stsb(data: Path) -> Split:
    def rows(part: str) -> list[Row]:
        with (data / "STS-B" / f"stsb-en-{part}.csv").open(encoding="utf-8", newline="") as file:
            return [{"text": a, "text_pair": b, "label": float(score)} for a, b, score in csv.reader(file)]

    return Split(*map(rows, ("train", "dev", "test")))


def wnut17(data: Path) -> Split:
    def rows(name: str) -> list[Row]:
        return [{"tokens": one.words, "tags": one.tags} for one in read_conll(data / "WNUT17" / name)]

    return Split(*map(rows, ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated")))


def subjqa(data: Path) -> Split:
    def row(values: dict[str, str]) -> Row:
        text, context = values["human_ans_spans"], values["review"].removesuffix(NO_ANSWER)
        answers = []
        if text != NO_ANSWER:
            answers.append({"text": text, "answer_start": ast.literal_eval(values["human_ans_indices"])[0]})
        return {"question": values["question"], "context": context, "answers": answers}

    def rows(part: str) -> list[Row]:
        with (data / "SubjQA" / f"electronics.{part}.csv").open(encoding="utf-8", newline="") as file:
            return [row(values) for values in csv.DictReader(file)]

    return Split(*map(rows, ("train", "dev", "test")))


def xquad(data: Path) -> Split:
    questions = read_squad(data / "XQuAD" / "xquad.en.json")
    paragraphs = list(dict.fromkeys(one.context for one in questions))
    first, second = (round(share * len(paragraphs)) for share in (0.7, 0.8))

    def rows(chosen: Sequence[str]) -> list[Row]:
        kept = set(chosen)
        return [
            {
                "question": one.question,
                "context": one.context,
                "answers": [{"text": text, "answer_start": start} for text, start in one.answers],
            }
            for one in questions
            if one.context in kept
        ]

    return Split(rows(paragraphs[:first]), rows(paragraphs[first:second]), rows(paragraphs[second:]))


def chnsenticorp(data: Path) -> Split:
    names = "negative", "positive"
    with (data / "ChnSentiCorp" / "ChnSentiCorp_htl_all.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {"text": values["review"], "label": names[int(values["label"])]}
            for values in csv.DictReader(file)
            if values["review"].strip()
        ]
    # The file has one label after the other: every tenth row of both.
    return Split([row for number, row in enumerate(rows) if number % 10 not in (4, 9)], rows[4::10], rows[9::10])


__all__ = ["Split", "chnsenticorp", "cola", "stsb", "subjqa", "trec", "wnut17", "xquad"]
