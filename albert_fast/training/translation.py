"""Trains a translator from two aligned files, and measures one.

    fit_translation(("train.en", "train.de"), "out", dev=("val.en", "val.de"), recipe=Recipe(epochs=20))
    evaluate_translation("out", ("test.en", "test.de"))

The output folder is `fit`'s: the best epoch's model, its vocabulary, a log, and the state that `resume=True` continues from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..models.seq2seq import ALBERTForConditionalGeneration
from ..models.seq2seq_config import ALBERTSeq2SeqConfig
from ..ops.linear_cross_entropy import IGNORED
from ..tasks.translate import Translator
from ..text.aligned_files import read_aligned
from ..text.batching import for_plain_text, pad_rows
from ..text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from .checkpointing import STATE_NAME, claimed
from .checks import check_device, check_length
from .data import LengthBucketSampler
from .fit import FitResult
from .recipe import Recipe
from .run import Stage, TrainingRun, counted

# A file of sources and a file of their translations.
Files = tuple["str | Path", "str | Path"]
# Settings of a recipe that are for encoders alone.
_NOT_HERE = ("piece_dropout", "position_shift", "pretrain_epochs")


class PairDataset(Dataset[dict[str, list[int]]]):
    """Tokenized pairs of a source and its target.

    Args:
        pairs: N (source, target). max_length: pairs with more tokens on either side are left out.
        label_smoothing: for the model's loss, see `ALBERTForConditionalGeneration.forward`.

    Attributes:
        lengths: tokens of source and target. dropped: pairs that were left out.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_length: int, label_smoothing: float = 0.0
    ) -> None:
        sources, targets = (tokenizer([pair[side] for pair in pairs])["input_ids"] for side in (0, 1))
        both = zip(sources, targets, strict=True)
        self.rows = [(one, other) for one, other in both if max(len(one), len(other)) <= max_length]
        self.dropped = len(pairs) - len(self.rows)
        self.lengths = [len(one) + len(other) for one, other in self.rows]
        self.pad_id, self.label_smoothing = tokenizer.pad_token_id, label_smoothing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        source, target = self.rows[index]
        return {"input_ids": source, "target": target}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a batch: input_ids and attention_mask (B, S); decoder_input_ids, decoder_attention_mask and labels (B, T), the
        labels one token ahead; all padded on the right."""
        sources, targets = [item["input_ids"] for item in items], [item["target"] for item in items]
        labels = pad_rows([target[1:] for target in targets], IGNORED)
        batch = {
            "input_ids": pad_rows(sources, self.pad_id),
            "attention_mask": _mask(sources),
            "decoder_input_ids": pad_rows([target[:-1] for target in targets], self.pad_id),
            "decoder_attention_mask": (labels != IGNORED).long(),
            "labels": labels,
        }
        return batch | ({"label_smoothing": self.label_smoothing} if self.label_smoothing else {})


def _mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, S), 1 at the tokens of rows that are padded on the right."""
    return pad_rows([[1] * len(row) for row in rows], 0)


def small_translation_config(max_length: int) -> ALBERTSeq2SeqConfig:
    """The default of a new model: about 5 million parameters with 8,000 pieces, for training from scratch on a CPU."""
    return ALBERTSeq2SeqConfig(
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_hidden_groups=2,
        num_decoder_layers=4,
        num_decoder_groups=2,
        embedding_size=128,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=max(128, max_length),
    )


def fit_translation(
    train: Files,
    output_dir: str | Path,
    *,
    dev: Files | None = None,
    recipe: Recipe | None = None,
    config: ALBERTSeq2SeqConfig | None = None,
    vocab_size: int = 8000,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> FitResult:
    """Trains a translator from random weights and keeps the best epoch's model.

    Args:
        train, dev: a file of sources and a file of targets, a text on each line, also .gz: see `read_aligned`. The dev set's loss
            chooses the best epoch; without it that is the last.
        recipe: pairs with more than its max_length tokens on either side are left out; its metric is "loss".
        config: sizes of the model; vocabulary and special tokens are filled in. Default: `small_translation_config`.
        vocab_size: pieces of the vocabulary, at most, which is learnt from both sides of the training set, case kept.
        output_dir, resume, device, progress, report: as in `fit`.

    Raises:
        ValueError: files that do not fit, a recipe with settings that a translator does not have. Others as `fit`.
    """
    recipe = _completed(recipe or Recipe())
    say = report or (_say if progress else lambda line: None)
    device, folder = check_device(device), Path(output_dir)
    with claimed(folder, resume):
        pairs = read_aligned(*train)
        dev_pairs = None if dev is None else read_aligned(*dev)
        learnt = not (resume and (folder / STATE_NAME).exists())
        tokenizer = _learn(pairs, vocab_size, recipe.seed) if learnt else load_tokenizer(folder)
        config = _complete(config or small_translation_config(recipe.max_length), tokenizer)
        check_length(recipe.max_length, config)
        tokenizer.model_max_length = tokenizer.settings["model_max_length"] = config.longest
        tokenizer = for_plain_text(tokenizer)
        data = PairDataset(pairs, tokenizer, recipe.max_length, recipe.label_smoothing)
        _check_left(data, pairs, train, recipe.max_length)
        loader = None
        if dev_pairs is not None and dev is not None:
            dev_data = PairDataset(dev_pairs, tokenizer, recipe.max_length)
            _check_left(dev_data, dev_pairs, dev, recipe.max_length)
            sampler = LengthBucketSampler(dev_data.lengths, recipe.batch_size, shuffle=False)
            loader = DataLoader(dev_data, batch_sampler=sampler, collate_fn=dev_data.collate)
        settings = dataclasses.asdict(recipe) | {
            "task": "translation",
            "config": config.to_dict(),
            "vocab_size": vocab_size,
            "train": _digest(pairs),
            "dev": None if dev_pairs is None else _digest(dev_pairs),
        }
        run = TrainingRun(
            folder, recipe, settings, device, tokenizer if learnt else None, progress=progress, report=say
        )
        if resume:
            run.load()
        say(
            f"{len(data)} pairs, {data.dropped} longer than {recipe.max_length} tokens left out; {tokenizer.vocab_size} pieces"
        )
        steps = -(-len(data) // recipe.batch_size)
        say(
            f"{counted(recipe.epochs, 'epoch')} of {counted(steps, 'step')}, learning rate {recipe.learning_rate:g}; {device}"
        )
        torch.manual_seed(recipe.seed)
        model, rate = ALBERTForConditionalGeneration(config), recipe.learning_rate
        assert rate is not None, "the recipe is a completed one"
        stage: Any = Stage
        run.epochs(
            stage("translate", model, data, None, recipe.epochs, recipe.batch_size, rate, loader, keeps_best=True)
        )
    return FitResult(folder, run.best_epoch, "loss", run.best_value, run.history, None)


def _completed(recipe: Recipe) -> Recipe:
    for name in _NOT_HERE:
        if getattr(recipe, name):
            raise ValueError(f"{name} is for encoders: a translator is trained without it")
    if recipe.metric not in (None, "loss"):
        raise ValueError(f"metric is {recipe.metric!r}: the best epoch of a translator is chosen by its loss")
    rate = 1e-3 if recipe.learning_rate is None else recipe.learning_rate
    return dataclasses.replace(recipe, metric="loss", learning_rate=rate)


def _learn(pairs: Sequence[tuple[str, str]], vocab_size: int, seed: int) -> Tokenizer:
    """A vocabulary of both sides that gives back what it reads: with case, accents and every character."""
    lines = sorted({line for pair in pairs for line in pair})
    kept: dict[str, Any] = {"lower_case": False, "keep_accents": True, "character_coverage": 1.0}
    return train_tokenizer(lines, vocab_size, at_most=True, seed=seed, **kept)


def _complete(config: ALBERTSeq2SeqConfig, tokenizer: Tokenizer) -> ALBERTSeq2SeqConfig:
    start = tokenizer.cls_token_id
    return config.replace(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=start,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=start,
    )


def _check_left(data: PairDataset, pairs: Sequence[tuple[str, str]], files: Files, max_length: int) -> None:
    if not len(data):
        raise ValueError(
            f"{files[0]}, {files[1]}: all {len(pairs)} pairs have more than {max_length} tokens (max_length)"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _digest(pairs: Sequence[tuple[str, str]]) -> str:
    """A checksum that tells two sets of pairs apart."""
    digest = hashlib.blake2b(digest_size=8)
    for pair in pairs:
        digest.update(repr(pair).encode())
    return f"{len(pairs)} pairs, {digest.hexdigest()}"


@dataclass(frozen=True)
class TranslationScores:
    """The figures of a translator on a test set, by sacrebleu: case is kept, its own tokenisation.

    bleu, chrf: 0 to 100. signature: how sacrebleu computed BLEU. translations: of each source, in order.
    """

    bleu: float
    chrf: float
    signature: str
    translations: list[str]


def evaluate_translation(
    checkpoint: str | Path, files: Files, *, device: str | torch.device | None = None, **options: Any
) -> TranslationScores:
    """Translates the sources of a test set and compares the results with its targets.

    Args:
        files: a file of sources and a file of targets, see `read_aligned`.
        options: num_beams, length_penalty and others, see `Translator.translate`.

    Raises:
        ImportError: sacrebleu is not installed. Others as `read_aligned` and `Translator`.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError("evaluate_translation needs sacrebleu: pip install 'albert-fast[train]'") from error
    pairs = read_aligned(*files)
    written = Translator(checkpoint, device=check_device(device)).translate([source for source, _ in pairs], **options)
    references = [[target for _, target in pairs]]
    bleu = BLEU()
    score = bleu.corpus_score(written, references).score
    return TranslationScores(score, CHRF().corpus_score(written, references).score, str(bleu.get_signature()), written)


__all__ = [
    "PairDataset",
    "TranslationScores",
    "evaluate_translation",
    "fit_translation",
    "small_translation_config",
]
