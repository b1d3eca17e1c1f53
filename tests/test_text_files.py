"""Rows of CSV, TSV and JSON lines: what they hold, and the file, line and column that a broken one is refused with."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path

import pytest

from albert_fast.commands._lines import InputError, Lines
from albert_fast.text.line_reader import CHUNK, LONGEST_LINE
from albert_fast.text.text_files import Columns, Record, read_table

LABEL = Columns(label="label")


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def records_before(path: Path, columns: Columns = LABEL) -> tuple[list[str], str]:
    """The texts before the first bad row, and what is said of it, without the name of the file."""
    texts: list[str] = []
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}[,:] ") as caught:
        texts.extend(record.text for record in read_table(path, columns))  # keeps what came before the error
    return texts, str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_tables_agree(tmp_path: Path, packed: str, line_end: str, mark: str, last: bool) -> None:
    def lines(*rows: str) -> str:
        return mark + line_end.join(rows) + line_end * last

    written = lines("label,id,text,text_pair", '1,a,"not bad, ""really"" ",x', "", f'0,b,"two{line_end}lines",')
    expected = [
        Record(2, 'not bad, "really" ', "x", "1", "a"),
        Record(4, f"two{line_end}lines", "", "0", "b"),
    ]
    assert list(read_table(write(tmp_path / f"x.csv{packed}", written), LABEL)) == expected
    written = lines('text\tlabel\tnote "', '"quoted" \t yes \t', "\t no\t")
    expected = [Record(2, '"quoted" ', None, "yes"), Record(3, "", None, "no")]
    assert list(read_table(write(tmp_path / f"x.tsv{packed}", written), LABEL)) == expected
    written = lines(
        '{"review": "caf\\u00e9 \\ud83d\\ude00", "label": 0.5, "id": [1]}',
        "  ",
        '{"review": "", "text": 3, "label": true, "text_pair": "b"}',
        '{"review": "c", "label": [0.25, 0.75], "id": null}',
    )
    expected = [
        Record(1, "caf\u00e9 \U0001f600", None, 0.5, [1]),
        Record(3, "", "b", True),
        Record(4, "c", None, [0.25, 0.75]),
    ]
    assert list(read_table(write(tmp_path / f"x.jsonl{packed}", written), LABEL)) == expected


def test_columns_by_number_and_by_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", "text\tb\t3\nd\te\t4\n")
    assert list(read_table(path, Columns(1, 0, 2))) == [Record(1, "b", "text", "3"), Record(2, "e", "d", "4")]
    path = write(tmp_path / "x.csv", ",body,text,stars\n0,a,b,5\n")
    assert list(read_table(path, Columns("body", "text", "stars"))) == [Record(2, "a", "b", "5")]
    path = write(tmp_path / "x.JSONL", '{"a": "b", "c": "d"}\n')
    assert list(read_table(path, Columns("a", "c"))) == [Record(1, "b", "d")]


def test_python_csv_writes_what_is_read(tmp_path: Path) -> None:
    """Texts of separators, quotes, line ends and other scripts survive; each row knows the line where it begins."""
    draw = random.Random(5)
    texts = [
        "".join(draw.choices(',"\n\r\t a\u0939\u093e\U0001f600;', k=draw.randrange(1, 30))) + "." for _ in range(300)
    ]
    with (tmp_path / "x.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, index] for index, text in enumerate(texts))
    found = list(read_table(tmp_path / "x.csv", LABEL))
    assert [(record.text, record.label) for record in found] == [(text, str(i)) for i, text in enumerate(texts)]
    starts = [2]
    for text in texts[:-1]:
        starts.append(starts[-1] + 1 + text.count("\n"))
    assert [record.line for record in found] == starts


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl"])
def test_long_texts_are_read(tmp_path: Path, name: str) -> None:
    """Python's csv module refuses fields of more than 131,072 characters unless told otherwise."""
    text = "word " * 40_000
    rows = {
        "x.csv": f"text,label\na,0\n{text},1\n",
        "x.tsv": f"text\tlabel\na\t0\n{text}\t1\n",
        "x.jsonl": json.dumps({"text": "a", "label": 0}) + "\n" + json.dumps({"text": text, "label": 1}) + "\n",
    }
    found = list(read_table(write(tmp_path / name, rows[name]), LABEL))
    assert [(record.text, str(record.label)) for record in found] == [("a", "0"), (text, "1")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("c,d,1", ", line 3: 3 fields, but the header ['text', 'label'] has 2; a text with a comma needs quotes"),
        ("c", ", line 3: 1 field, but the header"),
        ("c,1,", ", line 3: 3 fields, but the header"),
        ('c, "d, e",1', ", line 3: 4 fields, but the header"),
        ("c,", ", line 3, column 'label': empty; every row needs a label"),
        ("c,\t \n", ", line 3, column 'label': empty"),
        ('"c,1\nd,0\n', ", line 3: a quote that opens in this row is never closed"),
        ('"c,1\n"d,0\n', ", line 3: a closing quote is followed by text"),
        ('"c"d",1', ", line 3: a closing quote is followed by text"),
        ("c\0d,1", ", line 3: holds a NUL byte"),
        ('"c\nd\0",1', ", line 3: holds a NUL byte"),
        ("c\rd,1", ", line 3: a carriage return within the row"),
        ("text,label", ", line 3: the header again"),
    ],
)
def test_broken_csv(tmp_path: Path, content: str, says: str) -> None:
    texts, said = records_before(write(tmp_path / "x.csv", f'text,label\n"a, b",1\n{content}\ne,0\n'))
    assert texts == ["a, b"]
    assert said.startswith(says), said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("c\td\t1", ", line 3: 3 fields, but the header ['text', 'label'] has 2; a text cannot hold a tab"),
        ("c", ", line 3: 1 field, but the header"),
        ("c\t", ", line 3, column 'label': empty"),
        ("c\0\t1", ", line 3: holds a NUL byte"),
        ("c\rd\t1", ", line 3: a carriage return within the row"),
        ("text\tlabel", ", line 3: the header again"),
    ],
)
def test_broken_tsv(tmp_path: Path, content: str, says: str) -> None:
    texts, said = records_before(write(tmp_path / "x.tsv", f'text\tlabel\na "b\t1\n{content}\ne\t0\n'))
    assert texts == ['a "b']
    assert said.startswith(says), said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": ["c", "d"], "label": 0}', ", line 2, column 'text': expected a string, found a list"),
        ('{"text": 3, "label": 0}', ", line 2, column 'text': expected a string, found a number"),
        ('{"text": {"a": 1}, "label": 0}', ", line 2, column 'text': expected a string, found an object"),
        ('{"text": "\\udc80", "label": 0}', ", line 2, column 'text': character 1 of the text"),
        (
            '{"text": "c", "label": null}',
            ", line 2, column 'label': expected a string, a finite number or a list of them",
        ),
        ('{"text": "c", "label": " "}', ", line 2, column 'label': empty"),
        ('{"text": "c", "label": []}', ", line 2, column 'label': expected"),
        ('{"text": "c", "label": ["0.5"]}', ", line 2, column 'label': expected"),
        ('{"text": "c", "label": {"a": 1}}', ", line 2, column 'label': expected"),
        ('{"text": "c", "label": 1e999}', ", line 2, column 'label': expected"),
        ('{"text": "c", "label": NaN}', ", line 2: not JSON: NaN is no JSON value"),
        ('{"text": "c"}', ", line 2: no field \"label\"; it has ['text']"),
        ('{"sentence": "c", "label": 1}', ", line 2: no field \"text\"; it has ['sentence', 'label']"),
        ('{"text": "c", "label": 1, "label": 0}', ", line 2: not JSON: the key 'label' is there twice"),
        ('{"text": "c", "label": 1} {"text": "d", "label": 1}', ", line 2: not JSON: Extra data"),
        ("[" * 100_000, ", line 2: not JSON: nested too deeply"),
        ("null", ', line 2: expected {"text": ...}, found null'),
    ],
)
def test_broken_json_lines(tmp_path: Path, content: str, says: str) -> None:
    first, last = '{"text": "a", "label": 1}', '{"text": "e", "label": 0}'
    texts, said = records_before(write(tmp_path / "x.jsonl", f"{first}\n{content}\n{last}\n"))
    assert texts == ["a"]
    assert said.startswith(says), said


@pytest.mark.parametrize(
    ("columns", "content", "says"),
    [
        (LABEL, "text,label,text\n", ", line 1, column 'text': the header names it twice: ['text', 'label', 'text']"),
        (LABEL, "a joy,1\n", ", line 1, column 'label': the header has no such column, only ['a joy', '1']"),
        (Columns(), "a joy,1\n", ", line 1: the header has no column 'text' or 'sentence' or 'review', only ['a joy'"),
        (
            Columns(),
            "review,text\n",
            ", line 1: which column is the text, 'text' or 'review'? Name one (--text-column)",
        ),
        (Columns("body"), "text,label\n", ", line 1, column 'body': the header has no such column"),
        (Columns(pair="b"), "text,label\n", ", line 1, column 'b': the header has no such column"),
        (Columns(0, label=2), "a,1\n", ", line 1, column 2: the row has 2 columns, numbered from 0"),
        (Columns(0, label=1), "a,1\nb,2,3\n", ", line 2: 3 fields, but the first row has 2"),
        (Columns(0, label=1), "text,label\nb,2\n", ", line 1: a header; name the columns instead of numbering them"),
        (Columns(0, label="label"), "a,1\n", ": column 0 is a number, for tables without a header, not names such as"),
        (Columns(label=1), "a,1\n", ": a table without a header needs the number of its text column too"),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: Columns, content: str, says: str) -> None:
    for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
        _, said = records_before(write(tmp_path / name, content.replace(",", separator)), columns)
        assert said.startswith(says), said


def test_bytes_that_are_not_utf8_and_cut_gzip_data(tmp_path: Path) -> None:
    rows = "".join(f"text number {i},{i % 2}\n" for i in range(30_000))
    texts, said = records_before(write(tmp_path / "x.csv", b"text,label\na,1\ncaf\xe9,0\n"))
    assert (texts, said) == (["a"], ", line 3: byte 4 of the line is not utf-8")
    packed = gzip.compress(f"text,label\n{rows}".encode())
    (tmp_path / "x.csv.gz").write_bytes(packed[: len(packed) // 2])
    texts, said = records_before(tmp_path / "x.csv.gz")
    assert 5_000 < len(texts) < 25_000
    assert texts == [f"text number {i}" for i in range(len(texts))]
    assert said.startswith(f", line {len(texts) + 2}: the gzip data is cut or damaged")
    (tmp_path / "x.csv.gz").write_bytes(b"text,label\na,1\n")
    assert records_before(tmp_path / "x.csv.gz")[1].startswith(", line 1: the gzip data is cut or damaged")
    with pytest.raises(FileNotFoundError):
        list(read_table(tmp_path / "none.csv", LABEL))
    with pytest.raises(ValueError, match=r"x\.txt: cannot tell the format from the name"):
        list(read_table(tmp_path / "x.txt", LABEL))


def test_long_lines_take_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        file.write(b"first\n")
        for _ in range(300):
            file.write("\u00e9".encode() * (CHUNK // 2))
        file.write(b"\nlast")
    tracemalloc.start()
    cut = f"line 2: {300 * CHUNK - LONGEST_LINE} bytes beyond the first"
    with Lines(str(path)) as lines, pytest.warns(UserWarning, match=cut):
        texts = [record.text for record in lines.window(10)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(text) for text in texts] == [5, LONGEST_LINE // 2, 4]
    assert peak < 8 * LONGEST_LINE < path.stat().st_size
    assert lines.consumed == path.stat().st_size + 1


@pytest.mark.parametrize("name", ["many.txt", "many.txt.gz", "many.csv", "many.jsonl"])
def test_many_lines_take_bounded_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    line = '{"text": "a line of text"}\n' if name == "many.jsonl" else "a line of text\n"
    content = (("text\n" if name == "many.csv" else "") + line * 50_000).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with Lines(str(path)) as lines:
        lines.window(100)
        tracemalloc.start()
        while lines.window(100):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert lines.count == 50_000
    assert peak < 600_000 < len(content)


def test_windows_are_whole_and_a_bad_row_comes_after_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(11)) + "no JSON\n")
    for done in (0, 2, 4, 5):
        seen: list[list[str]] = []
        with Lines(str(path)) as lines:
            lines.skip(done)
            windows = ([record.text for record in window] for window in lines.windows(4, patience=None))
            with pytest.raises(InputError, match="line 12: "):
                seen.extend(windows)
        whole = [[str(i) for i in range(begin, min(begin + 4, 11))] for begin in (0, 4, 8)]
        assert seen == [rest for window in whole if (rest := [text for text in window if int(text) >= done])]
    with Lines(str(path)) as lines:
        assert len(next(lines.windows(4, patience=60))) == 4


def test_a_long_json_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "x" * LONGEST_LINE}) + "\n")
    with Lines(str(path)) as lines, pytest.raises(InputError, match="line 1: longer than 1048576 bytes"):
        lines.window(1)
