"""The task of writing a text for each text, such as its translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...generation.options import MAX_NEW_TOKENS, GenerationOptions
from ...layers.inputs import Inputs
from ...models.encoder_config import EncoderConfig
from ...models.seq2seq import ALBERTForConditionalGeneration
from ...models.seq2seq_config import ALBERTSeq2SeqConfig
from ...ops.linear_cross_entropy import IGNORED
from ...text.aligned_files import read_aligned
from ...text.batching import pad_rows
from ...text.text_files import Columns
from ..data import Examples, LengthBucketSampler, TokenRows
from ..loop import test
from ..metrics import TRANSLATION_METRICS, Metric, translation_metrics
from ..progress import epoch_progress
from ..recipe import Recipe
from ..sources import Source, columns_for, name_of, rows_of, text_value
from .base import Libraries, Measured, Task

SOURCES, TARGETS = ("source", "text"), ("target", "translation")
# Where a model is measured, a text ends at the latest with this many tokens more than twice what the targets lead to expect: a
# model at the start of its training rarely ends one, and would write MAX_NEW_TOKENS for each.
SPARE_TOKENS = 10


class PairDataset(TokenRows):
    """Rows of source tokens, with the tokens of their targets.

    Args:
        sources, targets: N texts each. tokenizer: `albert_fast.text.tokenizer.Tokenizer`.
        max_length: longer texts are cut to this many tokens; with `drops`, their pairs are left out: half a translation teaches
            the wrong thing.
        label_smoothing: for the model's loss, see `ALBERTForConditionalGeneration.forward`.

    Raises:
        ValueError: no pair is left.
    """

    def __init__(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        tokenizer: Any,
        max_length: int,
        *,
        drops: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        limit = {} if drops else {"max_length": max_length}
        both = [tokenizer(list(texts), **limit)["input_ids"] for texts in (sources, targets)]
        pairs = [pair for pair in zip(*both, strict=True) if not drops or max(map(len, pair)) <= max_length]
        if sources and not pairs:
            raise ValueError(f"all {len(sources)} pairs have a text of more than {max_length} tokens (max_length)")
        if fewer := len(sources) - len(pairs):
            self.left_out = (
                f"{fewer} of {len(sources)} pairs left out: a text has more than {max_length} tokens (max_length)"
            )
        super().__init__([source for source, _ in pairs], None, [target for _, target in pairs], tokenizer)
        self.lengths = [len(source) + len(target) for source, target in pairs]
        self.tokenizer, self.label_smoothing = tokenizer, label_smoothing

    def label_tensors(self, items: Sequence[Mapping[str, Any]], columns: int) -> dict[str, Tensor]:
        """decoder_input_ids, decoder_attention_mask and labels (B, T); the labels are one token ahead."""
        targets = [item["labels"] for item in items]
        labels = pad_rows([target[1:] for target in targets], IGNORED)
        return {
            "decoder_input_ids": pad_rows([target[:-1] for target in targets], self.pad_id),
            "decoder_attention_mask": (labels != IGNORED).long(),
            "labels": labels,
        }

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return super().collate(items) | smoothing


class Translate(Task):
    """A target for each source: two aligned files, or a table with the columns source and target."""

    name = "translation"
    model = ALBERTForConditionalGeneration
    architecture = "EncoderDecoderModel"
    libraries: ClassVar[Libraries] = TRANSLATION_METRICS
    has_labels = False
    encoder_alone = False
    # The vocabulary gives back what it reads.
    vocabulary: ClassVar[dict[str, Any]] = {"lower_case": False, "keep_accents": True, "character_coverage": 1.0}

    def read(self, source: Source, columns: Columns, label_names: Sequence[str] | None) -> Examples:
        """Reads (sources file, targets file), or the same as one text with a comma between, or a table.

        Raises:
            ValueError: as `read_aligned` and `rows_of`; a table without such columns, or without a row.
        """
        if label_names is not None:
            raise ValueError("label_names are for classes; the task is translation")
        if (files := aligned(source)) is not None:
            pairs = read_aligned(*files)
        else:
            first, second = columns_for(columns.text, *SOURCES), columns_for(columns.label, *TARGETS)
            pairs = [
                (text_value(row, first, where, "the source"), text_value(row, second, where, "the target"))
                for where, row in rows_of(source, columns)
            ]
        if not pairs:
            raise ValueError(f"{name_of(source)}: no examples")
        return Examples([first for first, _ in pairs], [second for _, second in pairs], None)

    def check(self, examples: Examples, source: Source, given_names: Sequence[str] | None) -> None:
        """Nothing: any pairs teach something."""

    def describe(self, examples: Examples) -> str:
        return f"{len(examples.texts)} pair{'s' * (len(examples.texts) != 1)} of texts"

    def lines(self, examples: Examples) -> list[str]:
        return [*examples.texts, *examples.labels]

    def default_metric(self, label_names: list[str] | None) -> str:
        return "bleu"

    def new_config(self, max_length: int, **sizes: Any) -> EncoderConfig:
        """About 4 million parameters with 8,000 pieces, for training from scratch on a CPU."""
        usual: dict[str, Any] = {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
            "num_decoder_groups": 2,
            "embedding_size": 128,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": max(128, max_length),
        }
        return ALBERTSeq2SeqConfig(**(usual | sizes))

    def configured(self, config: EncoderConfig, examples: Examples) -> EncoderConfig:
        if not isinstance(config, ALBERTSeq2SeqConfig):
            raise ValueError(f"a translator needs an ALBERTSeq2SeqConfig, got {type(config).__name__}")
        return config.replace(decoder_start_token_id=config.bos_token_id)

    def data(
        self, examples: Examples, tokenizer: Any, max_length: int, *, types: bool, recipe: Recipe | None = None
    ) -> TokenRows:
        smoothing = 0.0 if recipe is None else recipe.label_smoothing
        return PairDataset(
            examples.texts, examples.labels, tokenizer, max_length, drops=recipe is not None, label_smoothing=smoothing
        )

    def criterion(self, recipe: Recipe, examples: Examples) -> None:
        """None: the model computes its own loss, without the scores in memory."""

    def measure(
        self,
        model: nn.Module,
        data: TokenRows,
        examples: Examples,
        *,
        metrics: Sequence[str | Metric],
        batch_size: int,
        device: torch.device | str,
        progress: bool,
    ) -> Measured:
        """The loss, and where metrics are wanted, those of what greedy search writes for each source: see `longest_answers`."""
        sampler = LengthBucketSampler(data.lengths, batch_size, shuffle=False)
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate)
        loss, written = test(model, loader, None, device, progress=progress), [""] * len(data)
        assert isinstance(model, ALBERTForConditionalGeneration)
        assert isinstance(data, PairDataset)
        if metrics:
            longest = longest_answers(data, model.config.longest)
            with epoch_progress(loader, "translate", progress) as (batches, show):
                for chosen, batch in zip(sampler, batches, strict=True):
                    inputs = Inputs(batch["input_ids"].to(device), batch["attention_mask"].to(device))
                    texts = model.write(inputs, GenerationOptions(max(longest[index] for index in chosen)))
                    for index, ids in zip(chosen, texts, strict=True):
                        # Cut here too: what is written for a text does not depend on the others in its batch.
                        written[index] = data.tokenizer.decode(ids[: longest[index]], skip_special_tokens=True)
                    show(0.0, 0)
        expected = list(examples.labels)
        names = [str(metric) for metric in metrics]
        return Measured(loss, translation_metrics(names, expected, written), expected, written)


def longest_answers(data: PairDataset, positions: int) -> list[int]:
    """The most tokens to write for each source: 2 x its tokens + SPARE_TOKENS, more where all targets together are longer than
    all sources by that factor; MAX_NEW_TOKENS and `positions` at most."""
    sources = [len(ids) for ids in data.input_ids]
    growth = max(1.0, sum(map(len, data.labels)) / max(sum(sources), 1))
    return [min(int(2 * growth * tokens) + SPARE_TOKENS, MAX_NEW_TOKENS, positions) for tokens in sources]


def aligned(source: Source) -> tuple[str | Path, str | Path] | None:
    """The two files that a source names, as a pair or with a comma between; None for anything else."""
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(file, (str, Path)) for file in source):
        return source
    if isinstance(source, (str, Path)) and not Path(source).exists():
        first, comma, second = str(source).partition(",")
        return (first, second) if comma else None
    return None


__all__ = ["PairDataset", "Translate"]
