"""What people have becomes examples: CoNLL, SQuAD's JSON, tables, data sets; bad input is refused, with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from albert_fast.testing import require_data
from albert_fast.text.conll_files import read_conll
from albert_fast.text.text_files import Columns
from albert_fast.training import read_examples
from albert_fast.training.tasks import TASKS, read_for

NONE = Columns()


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CONLL = (
    "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\nPeter NNP I-NP B-PER\nBlackburn NNP I-NP I-PER\n"
)


def test_conll(tmp_path: Path) -> None:
    task, examples = read_for(None, written(tmp_path / "a.conll.gz", gzip.compress(CONLL.encode())), NONE, None)
    assert (task.name, examples.texts) == ("tag", [["EU", "rejects"], ["Peter", "Blackburn"]])
    assert examples.label_names == ["O", "B-ORG", "B-PER", "I-PER"]
    assert examples.labels == [[1, 0], [2, 3]]
    tabs = written(tmp_path / "b.txt", "# id = 1\n1\t# a\tX\tsym\n2\tb\tY\tword\n \t\n1\tc\tX\tw\n")
    examples = TASKS["tag"].read(tabs, Columns(text=1, label=2), None)
    assert (examples.texts, examples.label_names) == ([["# a", "b"], ["c"]], ["X", "Y"])
    words = written(tmp_path / "words.conll", "a\nb\n\nc\n")
    assert [(one.line, one.words, one.tags) for one in read_conll(words, needs_tags=False)] == [
        (1, ["a", "b"], []),
        (4, ["c"], []),
    ]
    assert [one.tags for one in read_conll(tabs, 1, 2, needs_tags=False)] == [["X", "Y"], ["X"]]
    with pytest.raises(ValueError, match=r"words.conll, line 1: 1 column, expected a word and a tag"):
        list(read_conll(words))
    with pytest.raises(ValueError, match=r"bad.bio, line 2: 2 columns, but the first line is a word alone"):
        list(read_conll(written(tmp_path / "bad.bio", "a\nb O\n"), needs_tags=False))
    with pytest.raises(ValueError, match=r"bad.bio, line 3: 1 column, expected a word and a tag"):
        read_for(None, written(tmp_path / "bad.bio", "a O\nb O\nc\n"), NONE, None)
    with pytest.raises(ValueError, match=r"bad.bio, from line 4: the tag is 'B-odd', expected one of \['O', 'B-x'\]"):
        TASKS["tag"].read(written(tmp_path / "bad.bio", "a O\n\n\nb B-odd\n"), NONE, ["O", "B-x"])
    with pytest.raises(ValueError, match=r"bad.bio, line 2: byte 1 of the line is not utf-8"):
        read_for(None, written(tmp_path / "bad.bio", b"a O\n\xff\xfe O\n"), NONE, None)
    with pytest.raises(ValueError, match="all words have one tag"):
        TASKS["tag"].check(TASKS["tag"].read(written(tmp_path / "one.bio", "a O\nb O\n"), NONE, None), "one.bio", None)


def test_lists_of_words(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", lines({"tokens": ["NA", "null"], "ner_tags": ["B-x", "O"]}))
    task, examples = read_for(None, file, NONE, None)
    assert (task.name, examples.texts, examples.label_names) == ("tag", [["NA", "null"]], ["O", "B-x"])
    for row, says in (
        ({"tokens": ["a"], "tags": ["O", "O"]}, "line 1: 1 words and 2 tags"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "line 1: the words must be a list"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "line 1: every word must be a string that is not empty"),
        ({"tokens": ["a"], "marks": ["O"]}, "line 1: no column 'tags' or 'ner_tags' or 'labels' for the tags"),
    ):
        with pytest.raises(ValueError, match=says):
            TASKS["tag"].read(written(tmp_path / "a.jsonl", lines(row)), NONE, None)


def squad(*asked: dict[str, Any]) -> str:
    context = "NA was born in Bern. Bern is old."
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(asked)}]}]})


def test_squad(tmp_path: Path) -> None:
    born = {"id": "1", "question": "where?", "answers": [{"text": "Bern", "answer_start": 15}]}
    none = {"id": "2", "question": "when?", "answers": [], "is_impossible": True, "plausible_answers": []}
    near = {"id": "3", "question": "what is old?", "answers": [{"text": "Bern", "answer_start": 22}]}
    task, examples = read_for(None, written(tmp_path / "a.json", squad(born, none, near)), NONE, None)
    assert task.name == "answer"
    assert [question for question, _ in examples.texts] == ["where?", "when?", "what is old?"]
    assert examples.labels == [[("Bern", 15)], [], [("Bern", 21)]]
    for content, says in (
        (
            squad(born | {"answers": [{"text": "Rome", "answer_start": 0}]}),
            "question '1': the context does not contain",
        ),
        (squad({"id": "1"}), "not of SQuAD's form.*'question'"),
        ("[]", "not of SQuAD's form"),
        ("{", "not JSON"),
        (squad(), "no examples"),
    ):
        with pytest.raises(ValueError, match=rf"a.json.*{says}"):
            read_for(None, written(tmp_path / "a.json", content), NONE, None)


def test_tables_of_questions(tmp_path: Path) -> None:
    table = 'question,context,answer\nwho?,"NA, of Bern",NA\nwhen?,"NA, of Bern",\n'
    task, examples = read_for(None, written(tmp_path / "a.csv", table), NONE, None)
    assert (task.name, examples.labels) == ("answer", [[("NA", 0)], []])
    hub = {"question": "who?", "context": "a a", "answers": {"text": ["a", "a"], "answer_start": [2, 0]}, "id": 7}
    assert read_for(None, [hub], NONE, None)[1].labels == [[("a", 2), ("a", 0)]]
    other = written(tmp_path / "b.tsv", "q\treview\tspan\twhere\nwho?\ta b\tb\t1\n")
    examples = TASKS["answer"].read(other, Columns("q", "review", "span"), None)
    assert (examples.texts, examples.labels) == ([("who?", "a b")], [[("b", 2)]])
    split = {"question": "q", "context": "Or it 's: it's (so)!", "answer": "it's ( so )"}
    assert read_for(None, [split], NONE, None)[1].labels == [[("it's (so)", 10)]]
    with pytest.raises(ValueError, match=r"a.csv, line 2: the context does not contain the answer 'x'"):
        read_for(None, written(tmp_path / "a.csv", "question,context,answer\nwho?,a b,x\n"), NONE, None)


def test_several_labels_and_choices(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", lines({"text": "null", "label": ["b", "a"]}, {"text": "NA", "label": []}))
    task, examples = read_for(None, file, NONE, None)
    assert (task.name, examples.texts, examples.label_names) == ("multilabel", ["null", "NA"], ["a", "b"])
    assert examples.labels == [[1.0, 1.0], [0.0, 0.0]]
    table = written(tmp_path / "a.csv", 'text,label\nx,"b, a"\ny,\n')
    assert TASKS["multilabel"].read(table, NONE, None).labels == examples.labels
    with pytest.raises(ValueError, match=r"a.csv, line 2: the label is 'b', expected some of \['a', 'c'\]"):
        TASKS["multilabel"].read(table, NONE, ["a", "c"])
    swag = written(tmp_path / "s.csv", "sent1,ending0,ending1,label\nx,a,b,1\ny,c,d,0\n")
    task, examples = read_for(None, swag, NONE, None)
    assert (task.name, examples.texts, examples.labels) == ("choose", [("x", ["a", "b"]), ("y", ["c", "d"])], [1, 0])
    listed = [{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "label": "b"}]
    assert read_for(None, listed, NONE, None)[1].labels == [1]
    digits = {"text": "q", "choices": ["1", "2"]}
    assert read_for(None, [digits | {"label": 1}], NONE, None)[1].labels == [1], "a number is never a text"
    assert read_for(None, [digits | {"choices": ["0", "x"], "label": "0"}], NONE, None)[1].labels == [0]
    for choices, label in ((["1", "2"], "1"), (["a", "a"], "a")):
        with pytest.raises(ValueError, match=f"row 0: the label '{label}' fits several choices"):
            read_for(None, [digits | {"choices": choices, "label": label}], NONE, None)
    with pytest.raises(ValueError, match="row 0: the label is 2, expected the number of a choice, 0 to 1"):
        read_for(None, [{"text": "q", "choices": ["a", "b"], "label": 2}], NONE, None)
    two = {"text": "q", "choices": ["a", "b"], "label": 0}
    with pytest.raises(ValueError, match="row 1: 3 choices, but the first row has 2"):
        read_for(None, [two, two | {"choices": ["a", "b", "c"]}], NONE, None)


def test_tables_without_a_header(tmp_path: Path) -> None:
    """Columns are numbered from 0 for every task whose columns are not of unknown number."""
    file = written(tmp_path / "a.csv", '"b,a",x\nb,y\n')
    examples = TASKS["multilabel"].read(file, Columns(text=1, label=0), None)
    assert (examples.texts, examples.label_names, examples.labels) == (["x", "y"], ["a", "b"], [[1.0, 1.0], [0.0, 1.0]])
    file = written(tmp_path / "a.tsv", "Bern\twhere?\tin Bern\n")
    examples = TASKS["answer"].read(file, Columns(1, 2, 0), None)
    assert (examples.texts, examples.labels) == ([("where?", "in Bern")], [[("Bern", 3)]])
    file = written(tmp_path / "b.tsv", "ein\tone\n")
    assert TASKS["translation"].read(file, Columns(text=1, label=0), None).texts == ["one"]
    rows = [{"text": "a", "label": "x"}]
    for task, source, columns, says in (
        ("multilabel", file, Columns(label=0), "needs the number of its text column too"),
        ("multilabel", file, Columns(text=0, label=2), r"no column 2 for the label; it has \[0, 1\]"),
        ("multilabel", written(tmp_path / "h.tsv", "label\ttext\n"), Columns(text=1, label=0), "line 1: a header"),
        ("multilabel", rows, Columns(text=0, label=1), "column 0 is a number, .* a data set's columns have names"),
        ("multilabel", written(tmp_path / "a.jsonl", lines(*rows)), Columns(0, None, 1), "JSON lines have names"),
        ("choose", file, Columns(label=0), "column 0 is a number; columns of choices have names"),
    ):
        with pytest.raises(ValueError, match=says):
            TASKS[task].read(source, columns, None)


def test_data_sets_in_memory_and_in_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"sentence": ["a", "NA"], "label": [1, 0]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    for source in (data, tmp_path / "saved", list(data.with_format("python"))):
        task, examples = read_for(None, source, NONE, None)
        assert (task.name, examples.texts, examples.labels) == ("classify", ["a", "NA"], [1, 0])
        assert examples.label_names == (["0", "1"] if isinstance(source, list) else ["no", "yes"])
    tags = datasets.Features({"tokens": datasets.List(datasets.Value("string")),
                              "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"]))})  # fmt: skip
    words = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, features=tags)
    task, examples = read_for(None, words, NONE, None)
    assert (task.name, examples.labels, examples.label_names) == ("tag", [[0, 1]], ["O", "B-x"])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="has the splits train, test; give one of them"):
        read_for(None, tmp_path / "splits", NONE, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without a saved data set"):
        read_for(None, tmp_path / "empty", NONE, None)


def test_a_task_that_is_named_overrules_the_labels(tmp_path: Path) -> None:
    stars = written(tmp_path / "a.csv", "text,label\nnull,5\nNA,3\nnan,5\n")
    assert read_for(None, stars, NONE, None)[0].name == "regress"
    task, examples = read_for("classify", stars, NONE, None)
    assert (task.name, examples.texts, examples.labels) == ("classify", ["null", "NA", "nan"], [1, 0, 1])
    assert examples.label_names == ["3", "5"]
    ids = written(tmp_path / "b.csv", "text,label\na,1\nb,0\n")
    assert read_for("regress", ids, NONE, None)[1].labels == [1.0, 0.0]
    with pytest.raises(ValueError, match="line 2: the label 'x' is not a number"):
        read_for("regress", written(tmp_path / "b.csv", "text,label\na,x\n"), NONE, None)
    with pytest.raises(
        ValueError, match="unknown task 'sing'; known: classify, regress, multilabel, tag, answer, choose"
    ):
        read_for("sing", ids, NONE, None)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.conll"])
def test_empty_files_and_files_that_are_no_text(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: no examples"):
        read_for(None, written(tmp_path / name, ""), NONE, None)
    header = (
        b'{"text": "a", "label": 1}\n'
        if name == "a.jsonl"
        else b"text\tlabel\n"
        if name != "a.csv"
        else b"text,label\n"
    )
    with pytest.raises(ValueError, match=f"{name}, line 2: byte 1 of the line is not utf-8"):
        read_for(None, written(tmp_path / name, header + b"\x89PNG\r\n\x1a\n"), NONE, None)


def test_words_that_other_readers_take_for_missing_values(tmp_path: Path) -> None:
    words = ["null", "NA", "None", "nan", "", "true"]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        table = "".join(f"{word}{separator}{'NA' if i % 2 else 'null'}\n" for i, word in enumerate(words))
        examples = read_examples(written(tmp_path / name, f"text{separator}label\n{table}"))
        assert (examples.texts, examples.label_names) == (words, ["NA", "null"])


def test_real_files() -> None:
    task, examples = read_for(None, require_data("WNUT17/wnut17train.conll"), NONE, None)
    assert (task.name, len(examples.texts), len(examples.label_names)) == ("tag", 3394, 13)
    task, examples = read_for(None, require_data("XQuAD/xquad.zh.json"), NONE, None)
    assert (task.name, len(examples.texts)) == ("answer", 1190)
    _, examples = read_for(None, require_data("XQuAD/xquad.en.json"), NONE, None)
    answers = zip(examples.texts, examples.labels, strict=True)
    assert all(context.startswith(text, at) for (_, context), own in answers for text, at in own)
