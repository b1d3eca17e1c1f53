"""The task of tagging words: named entities, parts of speech."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...models.auto import AutoModelForTokenClassification
from ...models.encoder_config import EncoderConfig
from ...ops.linear_cross_entropy import IGNORED
from ...text.conll_files import read_conll
from ...text.text_files import Columns, table_format
from ...text.words import OUTSIDE, marks_entities, word_rows
from ..data import Examples, TokenRows
from ..metrics import TAG_METRICS, tag_metrics
from ..recipe import Recipe
from ..sources import Source, columns_for, is_data_set, name_of, rows_of, value_of
from .base import ForwardTask, Libraries, Measured, rows_options
from .texts import describe_classes

WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels")


class WordDataset(TokenRows):
    """Rows of tokens in which the first token of each word has a label; long sentences are several rows.

    Args:
        sentences: N lists of words. tags: N lists of ids, one for each word.
        tokenizer, max_length: see `word_rows`. types: whether the model takes token types.
        options: piece_dropout and position_shift, see `TextDataset`.
    """

    def __init__(
        self,
        sentences: Sequence[Sequence[str]],
        tags: Sequence[Sequence[int]],
        tokenizer: Any,
        max_length: int,
        *,
        types: bool = True,
        **options: Any,
    ) -> None:
        rows = word_rows(tokenizer, sentences, max_length)
        kept = [row for row, words in enumerate(rows.words) if words]
        self.sentence, self.words = [rows.sentence[row] for row in kept], [rows.words[row] for row in kept]
        ids = [rows.ids[row] for row in kept]
        labels = [(rows.columns[row], [tags[rows.sentence[row]][word] for word in rows.words[row]]) for row in kept]
        super().__init__(ids, [[0] * len(row) for row in ids] if types else None, labels, tokenizer, **options)

    def label_tensors(self, items: Sequence[Mapping[str, Any]], columns: int) -> dict[str, Tensor]:
        """labels (B, S), -100 but at the first token of each word; wanted_tokens, where there is a label."""
        labels = torch.full((len(items), columns), IGNORED, dtype=torch.int64)
        for row, item in enumerate(items):
            places, tags = item["labels"]
            labels[row, places] = torch.tensor(tags)
        return {"labels": labels, "wanted_tokens": labels != IGNORED}


class Tag(ForwardTask):
    """One tag for each word, from CoNLL files, or lists of words and tags in JSON lines, Parquet and data sets."""

    name = "tag"
    model = AutoModelForTokenClassification
    architecture = "ForTokenClassification"
    libraries: ClassVar[Libraries] = TAG_METRICS
    weighs_classes = True

    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        sentences, tags, places = [], [], []
        for where, words, marks in self._rows(source, columns):
            if words:
                sentences.append(list(words))
                tags.append(list(marks))
                places.append(where)
        if not sentences:
            raise ValueError(f"{name_of(source)}: no examples")
        found = {tag for marks in tags for tag in marks}
        # O first, then the kinds of entities with B- before I-, as most checkpoints number them.
        names = sorted(found, key=lambda tag: (tag != OUTSIDE, tag.partition("-")[2], tag))
        names = names if label_names is None else list(label_names)
        ids = {name: number for number, name in enumerate(names)}
        for marks, where in zip(tags, places, strict=True):
            if (wrong := next((tag for tag in marks if tag not in ids), None)) is not None:
                raise ValueError(f"{where}: the tag is {wrong!r}, expected one of {names}")
        return Examples(sentences, [[ids[tag] for tag in marks] for marks in tags], names)

    def _rows(self, source: Source, columns: Columns) -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
        if not is_data_set(source) and table_format(source) is None:
            for name in (columns.text, columns.label):
                if isinstance(name, str):
                    raise ValueError(
                        f"{source}: the columns of a CoNLL file have numbers, from 0, not the name {name!r}"
                    )
            for sentence in read_conll(source, columns.text, columns.label):  # type: ignore[arg-type]
                yield f"{source}, from line {sentence.line}", sentence.words, sentence.tags
            return
        for where, values in rows_of(source, columns):
            words = value_of(values, columns_for(columns.text, *WORDS), where, "the words")
            tags = value_of(values, columns_for(columns.label, *TAGS), where, "the tags")
            for what, parts in (("words", words), ("tags", tags)):
                if not isinstance(parts, (list, tuple)):
                    raise ValueError(f"{where}: the {what} must be a list, got {parts!r:.80}; CSV and TSV have none")
            if len(words) != len(tags):
                raise ValueError(f"{where}: {len(words)} words and {len(tags)} tags; as many of both are needed")
            if not all(isinstance(word, str) and word.strip() for word in words):
                raise ValueError(f"{where}: every word must be a string that is not empty")
            yield where, words, [str(tag) for tag in tags]

    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """ValueError where all words have one tag."""
        if len({tag for tags in examples.labels for tag in tags}) == 1:
            raise ValueError(
                f"{name_of(source)}: all words have one tag: there is nothing to learn; is the column right?"
            )

    def describe(self, examples: Examples) -> str:
        names = examples.label_names or []
        counts = Counter(names[tag] for tags in examples.labels for tag in tags)
        return f"{len(examples.texts)} sentences, {describe_classes(counts, names, 'tags')}"

    def default_metric(self, label_names: list[str] | None) -> str:
        return "f1" if marks_entities(label_names or []) else "accuracy"

    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        return config.replace(id2label=dict(enumerate(examples.label_names or [])), label2id=None, problem_type=None)

    def data(
        self, examples: Examples, tokenizer: Any, max_length: int, *, types: bool, recipe: Recipe | None = None
    ) -> TokenRows:
        return WordDataset(examples.texts, examples.labels, tokenizer, max_length, types=types, **rows_options(recipe))

    def rows(self, outputs: Any, data: TokenRows, chosen: list[int]) -> Sequence[Any]:
        """The tag of each word of each row."""
        found: Tensor = outputs.logits.argmax(-1).cpu()
        places = [data.labels[row][0] for row in chosen]
        if found.dim() == 1:  # of wanted tokens alone
            return [part.tolist() for part in found.split([len(own) for own in places])]
        return [found[row, own].tolist() for row, own in enumerate(places)]

    def measured(
        self, loss: float, data: TokenRows, examples: Examples, rows: list[Any], metrics: Sequence[Any], model: Any
    ) -> Measured:
        assert isinstance(data, WordDataset)
        names = examples.label_names or []
        outside = OUTSIDE if OUTSIDE in names else names[0]
        predicted = [[outside] * len(words) for words in examples.texts]
        for sentence, words, tags in zip(data.sentence, data.words, rows, strict=True):
            for word, tag in zip(words, tags, strict=True):
                predicted[sentence][word] = names[tag]
        expected = [[names[tag] for tag in tags] for tags in examples.labels]
        return Measured(loss, tag_metrics(metrics, expected, predicted), expected, predicted)


__all__ = ["Tag", "WordDataset"]
