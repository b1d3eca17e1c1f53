"""The task of answering a question with a span of its context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...models.auto import AutoModelForQuestionAnswering
from ...models.encoder_config import EncoderConfig
from ...text.spans import ContextRows, answer_text, best_spans, context_rows, span_columns
from ...text.squad_files import Question, is_squad, place_of, read_squad
from ...text.text_files import Columns
from ..data import Examples, TokenRows
from ..metrics import ANSWER_METRICS, answer_metrics
from ..recipe import Recipe
from ..sources import Source, columns_for, is_data_set, name_of, rows_of, text_value, value_of
from .base import ForwardTask, Libraries, Measured, rows_options

ANSWERS = ("answers", "answer")
# In config.json: whether the model was trained with questions that their contexts do not answer.
MAY_BE_ABSENT = "answer_may_be_absent"


class SpanDataset(TokenRows):
    """Rows of a question and a window of its context, with the first and the last token of the answer.

    In a window without the answer both are the row's first token (Devlin et al. 2018, section 4.3).

    Args:
        pairs: N (question, context). answers: N lists of (answer, its first character in the context); the first counts.
        tokenizer, max_length: see `context_rows`. types: whether the model takes token types.
        options: piece_dropout and position_shift, see `TextDataset`.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        answers: Sequence[Sequence[tuple[str, int]]],
        tokenizer: Any,
        max_length: int,
        *,
        types: bool = True,
        **options: Any,
    ) -> None:
        self.context_rows: ContextRows = context_rows(tokenizer, pairs, max_length)
        labels = []
        for row, example in enumerate(self.context_rows.example):
            columns = None
            if answers[example]:
                text, start = answers[example][0]
                columns = span_columns(self.context_rows, row, start, start + len(text))
            labels.append(columns or (0, 0))
        rows = self.context_rows
        super().__init__(rows.ids, rows.types if types else None, labels, tokenizer, **options)

    def label_tensors(self, items: Sequence[Mapping[str, Any]], columns: int) -> dict[str, Tensor]:
        """start_positions and end_positions (B,)."""
        starts, ends = torch.tensor([item["labels"] for item in items]).unbind(1)
        return {"start_positions": starts, "end_positions": ends}


class Answer(ForwardTask):
    """A span of a context that answers a question, or none, from SQuAD's JSON, or tables with question, context and answer."""

    name = "answer"
    has_labels = False
    model = AutoModelForQuestionAnswering
    architecture = "ForQuestionAnswering"
    libraries: ClassVar[Libraries] = ANSWER_METRICS
    smooths_labels = False

    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        if label_names is not None:
            raise ValueError("label_names: answers are spans of the context, and have no names")
        found = list(self._questions(source, columns))
        if not found:
            raise ValueError(f"{name_of(source)}: no examples")
        return Examples([(one.question, one.context) for one in found], [one.answers for one in found], None)

    def _questions(self, source: Source, columns: Columns) -> Iterator[Question]:
        if not is_data_set(source) and is_squad(source):
            yield from read_squad(source)
            return
        for where, values in rows_of(source, columns):
            question = text_value(values, columns_for(columns.text, "question"), where, "the question")
            context = text_value(values, columns_for(columns.pair, "context"), where, "the context")
            answers = value_of(values, columns_for(columns.label, *ANSWERS), where, "the answer")
            places = [place_of(text, context, start, where) for text, start in _answers(answers, values, where)]
            yield Question(values.get("id"), question, context, places)

    def describe(self, examples: Examples) -> str:
        without = sum(not answers for answers in examples.labels)
        return f"{len(examples.texts)} questions, {without or 'none'} without an answer"

    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """ValueError where no question has an answer."""
        if not any(examples.labels):
            raise ValueError(f"{name_of(source)}: no question has an answer: there is nothing to learn")

    def default_metric(self, label_names: list[str] | None) -> str:
        return "f1"

    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        config = config.replace(id2label=None, label2id=None, num_labels=2, problem_type=None)
        setattr(config, MAY_BE_ABSENT, not all(examples.labels))
        return config

    def data(
        self, examples: Examples, tokenizer: Any, max_length: int, *, types: bool, recipe: Recipe | None = None
    ) -> TokenRows:
        return SpanDataset(examples.texts, examples.labels, tokenizer, max_length, types=types, **rows_options(recipe))

    def criterion(self, recipe: Recipe, examples: Examples) -> nn.Module:
        return nn.CrossEntropyLoss()

    def rows(self, outputs: Any, data: TokenRows, chosen: list[int]) -> Sequence[Any]:
        """The scores of starts and of ends of each row."""
        starts, ends = outputs.start_logits.float().cpu().numpy(), outputs.end_logits.float().cpu().numpy()
        return [
            (starts[place, : data.lengths[row]], ends[place, : data.lengths[row]]) for place, row in enumerate(chosen)
        ]

    def measured(
        self, loss: float, data: TokenRows, examples: Examples, rows: list[Any], metrics: Sequence[Any], model: Any
    ) -> Measured:
        assert isinstance(data, SpanDataset)
        absent = bool(getattr(model.config, MAY_BE_ABSENT, False))
        spans = best_spans(data.context_rows, rows, len(examples.texts), may_be_absent=absent)
        predicted = [answer_text(context, span) for (_, context), span in zip(examples.texts, spans, strict=True)]
        expected = [[text for text, _ in answers] for answers in examples.labels]
        values = answer_metrics(metrics, expected, predicted) if metrics else {}
        return Measured(loss, values, expected, predicted)


def _answers(value: Any, values: Mapping[str, Any], where: str) -> list[tuple[Any, Any]]:
    """(text, start or None) of the answers in a column.

    | the column | is |
    |---|---|
    | {"text": [...], "answer_start": [...]} | SQuAD's form in Hugging Face's data sets |
    | [{"text": ..., "answer_start": ...}, ...] | SQuAD's own |
    | a text, and beside it a column answer_start or not | one answer; an empty text is none |
    """
    if isinstance(value, Mapping) and isinstance(value.get("text"), (list, tuple)):
        starts = value.get("answer_start", [None] * len(value["text"]))
        if len(starts) != len(value["text"]):
            raise ValueError(
                f"{where}: {len(value['text'])} answers and {len(starts)} starts; as many of both are needed"
            )
        return list(zip(value["text"], starts, strict=True))
    if isinstance(value, (list, tuple)) and all(isinstance(one, Mapping) and "text" in one for one in value):
        return [(one["text"], one.get("answer_start")) for one in value]
    if isinstance(value, str):
        start = values.get("answer_start")
        if isinstance(start, str):
            try:
                start = int(start) if start.strip() else None
            except ValueError:
                raise ValueError(f"{where}: answer_start is {start!r}, not a whole number") from None
        return [(value, start)] if value.strip() else []
    raise ValueError(f"{where}: cannot read the answer {value!r:.80}")


__all__ = ["MAY_BE_ABSENT", "Answer", "SpanDataset"]
