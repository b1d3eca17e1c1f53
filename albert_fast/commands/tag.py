"""`albert-fast tag`: the entities in each line of text, or a tag for each word of CoNLL files."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..text.conll_files import is_conll, read_conll
from . import _options as options
from ._errors import reports_errors
from ._lines import Lines, Record, json_answer, parts
from ._progress import Progress, counted

if TYPE_CHECKING:
    from ..tasks.tag import Entity, TextTagger

# Batches whose texts are sorted by length together. A pipe gives fewer at a time and is answered at once.
WINDOW = 16


@dataclass(frozen=True)
class Answers:
    """The form of the answers."""

    format: Annotated[options.AnswerFormat, typer.Option("--format", "-f", help="Form of the answers.")] = (
        options.AnswerFormat.tsv
    )
    with_text: Annotated[bool, typer.Option("--with-text", help="Add the text that was tagged.")] = False

    def line(self, found: list[Entity], record: Record) -> str:
        return _tsv(found, record, self) if self.format is options.AnswerFormat.tsv else _jsonl(found, record, self)


@reports_errors
@options.expands_groups
def command(
    file: Annotated[str, typer.Argument(metavar="FILE|TEXT", help=options.INPUT_HELP)],
    model: options.Model,
    *,
    answers: Answers,
    column: options.TextColumn,
    max_length: options.MaxLength = None,
    batch_size: options.BatchSize = 32,
    input: options.Input,
    compute: options.Compute,
) -> None:
    """Find the entities in each line of a text, or each row of a table: one answer for each line, in order.

    tsv: kind=words for each entity, separated by tabs; an empty line where there is none. jsonl: {"entities": [{"kind": "place",
    "text": "Bern", "start": 14, "end": 18, "score": 0.98}]}, in characters; an "id" of the input is repeated. A model for
    other tags, such as parts of speech, gives every word.

    A FILE that ends in .conll, .conllu, .bio or .iob (also .gz) has a word on each line, alone or with its tag; the answer is each
    word, its tag if it has one, and the model's tag, separated by tabs, with an empty line after each sentence.

    A text that is longer than the model takes is computed in windows that overlap.

    \b
    Examples:
      albert-fast tag "Anna lives in Bern." -m my-tagger
      albert-fast tag news.txt -m my-tagger --format jsonl > entities.jsonl
      albert-fast tag test.conll -m my-tagger > tagged.conll
    """
    if is_conll(file):
        _tag_conll(file, _tagger(model, max_length, batch_size, compute))
        return
    with Lines(file, input, column.as_columns(), may_be_text=True) as lines:
        tagger = _tagger(model, max_length, batch_size, compute)
        with Progress(lines, "tag", answers_on_stdout=True) as progress:
            for records in lines.windows(batch_size * WINDOW):
                found = tagger([record.text for record in records])
                for record, entities in zip(records, found, strict=True):
                    sys.stdout.write(answers.line(entities, record) + "\n")
                sys.stdout.flush()
                progress.update()


def _tagger(model: str, max_length: int | None, batch_size: int, compute: options.Compute) -> TextTagger:
    from ..tasks.tag import TextTagger

    options.warn_of_rounding(model, compute.precision)
    return TextTagger(model, max_length=max_length, batch_size=batch_size, **compute.as_keywords())


def _tag_conll(file: str, tagger: TextTagger) -> None:
    sentences = counted(read_conll(file, needs_tags=False), "tag", " sentences")
    for part in parts(sentences, 32 * WINDOW):
        for sentence, tags in zip(part, tagger.tags([sentence.words for sentence in part]), strict=True):
            for place, (word, found) in enumerate(zip(sentence.words, tags, strict=True)):
                stated = sentence.tags[place : place + 1]  # none in a file of words alone
                sys.stdout.write("\t".join([word, *stated, found.tag]) + "\n")
            sys.stdout.write("\n")
        sys.stdout.flush()


def _tsv(found: list[Entity], record: Record, form: Answers) -> str:
    columns = [f"{one.kind}={one.text}" for one in found]
    columns += [record.text] if form.with_text else []
    return "\t".join(re.sub("[\t\r\n]", " ", column) for column in columns)


def _jsonl(found: list[Entity], record: Record, form: Answers) -> str:
    content: dict[str, Any] = {"entities": [{**one._asdict(), "score": round(one.score, 6)} for one in found]}
    if form.with_text:
        content["text"] = record.text
    return json_answer(record, **content)
