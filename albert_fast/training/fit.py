"""Runs a whole training, from labelled text to a checkpoint: what `albert-fast train` does.

    fit("train.tsv", "out", dev_file="dev.tsv", recipe=Recipe(epochs=5, pretrain_epochs=10))

1. All files, options and the folder are checked.
2. The vocabulary is learnt from the training text, or taken from the checkpoint to start from.
3. If wanted, the model is pre-trained on the same text by masked language modelling.
4. The classifier is trained. After each epoch the dev set is measured, the log and the state of the run are written, and
   the best epoch's model is kept.
5. The test set is measured once.

| in output_dir | what |
|---|---|
| config.json, model.safetensors | the best model so far, for from_pretrained |
| tokenizer.json, tokenizer_config.json | the vocabulary |
| log.jsonl | an object for each epoch |
| training_state.pt | everything that `resume=True` needs to continue with the same losses |
| .train.lock | keeps a second run out; exists while a run lasts |
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoints.saving import folder_of
from ..checkpoints.weights import load_checkpoint, load_into, rename_old_names, resolve
from ..models.auto import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    class_of,
    config_of,
    family_of,
)
from ..models.config import ALBERTConfig
from ..models.encoder_config import EncoderConfig
from ..models.encoder_model import EncoderModel
from ..models.head_model import HeadModel
from ..text.batching import for_plain_text
from ..text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from . import checks
from .checkpointing import STATE_NAME, claimed, other_files
from .data import Examples, LengthBucketSampler, TextDataset, read_examples
from .evaluate import Evaluation, evaluate
from .masking import MaskedTextDataset, drop_contained_lines
from .metrics import check_metrics
from .recipe import Recipe
from .run import Stage, TrainingRun, counted, dev_metrics

FEW_STEPS = 400  # after fewer steps a new model mostly guesses


@dataclass
class FitResult:
    """What a run achieved.

    Attributes:
        best_epoch: from 1; the last epoch where there is no dev set.
        metric, best_value: the metric that chose the best epoch, and its value; None without a dev set.
        history: the records of the log.
        test: the best model on the test set; None without one.
    """

    output_dir: Path
    best_epoch: int
    metric: str
    best_value: float | None
    history: list[dict[str, Any]]
    test: Evaluation | None


@dataclass(frozen=True)
class _Task:
    """What a run trains and on what; `init_from` is the checkpoint to start from, None for a new model."""

    config: EncoderConfig
    tokenizer: Tokenizer
    examples: Examples
    dev: Examples | None
    init_from: str | Path | None


def fit(
    train_file: str | Path,
    output_dir: str | Path,
    *,
    dev_file: str | Path | None = None,
    test_file: str | Path | None = None,
    recipe: Recipe | None = None,
    config: EncoderConfig | None = None,
    vocab_size: int = 8000,
    init_from: str | Path | None = None,
    label_names: list[str] | None = None,
    text_column: str | int | None = None,
    pair_column: str | int | None = None,
    label_column: str | int | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> FitResult:
    """Trains a text classifier (or a regressor, if the labels are numbers to predict) and keeps the best epoch's model.

    Args:
        train_file, dev_file, test_file, label_names, *_column: labelled text, see `read_examples`. The dev set chooses
            the best epoch; the test set is measured once, at the end.
        output_dir: gets the files of the table at the top; it is created if necessary, and locked while the run lasts.
        config: sizes of a new model; vocabulary, labels and special tokens are filled in. Default: `small_config`. Not
            with `init_from`.
        vocab_size: pieces of the new vocabulary, at most: a short text gives fewer. Not used with `init_from`.
        init_from: a checkpoint folder, file of weights or hub id; its weights and vocabulary are the start, such as those of
            a pre-trained ALBERT, BERT or DistilBERT.
        resume: continue the run in output_dir if there is one. Files and settings must be the same, except for the number
            of epochs: the learning rate of each later step is then that of a run planned with the new number.
        device: default: a GPU if there is one.
        progress: bars on standard error.
        report: called with lines about the run; default: they go to standard error if `progress` is on.

    Raises:
        FileExistsError: output_dir holds a run and `resume` is off, or a model that no run wrote.
        LockedError: another run is writing to output_dir.
        ValueError: files that do not fit, a state with other settings. ImportError: a metric's library is missing.
            OSError: a folder that cannot be written, a full disk. All of these come before the first step.
        FloatingPointError: the loss is no longer finite; the state on disk is that of the last good epoch.
        KeyboardInterrupt: Ctrl-C, after the current step was finished and the state saved.
    """
    recipe = recipe or Recipe()
    if config is not None and init_from is not None:
        raise ValueError("config is for a new model, init_from for one that has its sizes; give one of them")
    say = report or (_say if progress else lambda line: None)
    device = checks.check_device(device)
    folder = Path(output_dir)
    with claimed(folder, resume):
        if not resume and (others := other_files(folder)):
            say(f"{folder} holds other files, which stay: {others[0]}{' ...' if len(others) > 1 else ''}")
        columns: dict[str, Any] = {
            "text_column": text_column,
            "pair_column": pair_column,
            "label_column": label_column,
        }
        examples = read_examples(train_file, label_names=label_names, **columns)
        checks.check_train_labels(examples, train_file, label_names)
        numbers = examples.label_names is None
        recipe = recipe.completed(from_checkpoint=init_from is not None, numbers=numbers)
        metrics = dev_metrics(recipe.metric)
        if dev_file is not None or test_file is not None:
            check_metrics(metrics, numbers=numbers)

        def read_for_measuring(file: str | Path) -> Examples:
            return checks.read_split(file, examples.label_names, columns, for_metrics=bool(metrics))

        dev = None if dev_file is None else read_for_measuring(dev_file)
        if test_file is not None:
            read_for_measuring(test_file)  # only for its errors: `evaluate` reads it at the end
        tokenizer, learnt = _tokenizer(folder, examples, vocab_size, init_from, recipe.seed, resume)
        tokenizer = for_plain_text(tokenizer)
        config = _complete(config, tokenizer, examples, init_from, recipe)
        task = _Task(config, tokenizer, examples, dev, init_from)
        if learnt:
            # A checkpoint's tokenizer may say less; a new one says nothing of it.
            longest = config.longest if init_from is None else min(config.longest, tokenizer.model_max_length)
            tokenizer.model_max_length = tokenizer.settings["model_max_length"] = longest
        settings = _settings(task, recipe, vocab_size)
        run = TrainingRun(
            folder, recipe, settings, device, tokenizer if learnt else None, progress=progress, report=say
        )
        if resume:
            run.load()
        checks.check_disk(folder, config, recipe.ema_decay is not None)
        for line in _introduction(run, task, train_file, vocab_size):
            say(line)
        torch.manual_seed(recipe.seed)
        encoder = None
        if recipe.pretrain_epochs and run.stage == "pretrain":
            encoder = _pretrain(run, task)
        _classify(run, task, encoder)
        tested = None
        if test_file is not None:
            tested = evaluate(
                folder,
                test_file,
                metrics=metrics,
                batch_size=recipe.batch_size,
                device=device,
                progress=progress,
                **columns,
            )
    return FitResult(folder, run.best_epoch, str(recipe.metric), run.best_value, run.history, tested)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings(task: _Task, recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """What a resumed run must have in common with this one, for JSON."""
    return dataclasses.asdict(recipe) | {
        "config": task.config.to_dict(),
        "init_from": None if task.init_from is None else str(task.init_from),
        "vocab_size": vocab_size if task.init_from is None else None,
        "train": _digest(task.examples),
        "dev": None if task.dev is None else _digest(task.dev),
    }


def _introduction(run: TrainingRun, task: _Task, train_file: str | Path, vocab_size: int) -> Iterator[str]:
    """Lines that a user should read before the first step."""
    recipe, pieces = run.recipe, task.config.vocab_size
    yield f"{train_file}: {checks.describe_examples(task.examples)}"
    if task.dev is None:
        yield "no dev set: the model of the last epoch is kept"
    if task.init_from is None and pieces < vocab_size:
        yield f"vocabulary: {pieces} pieces, all that this text gives ({vocab_size} were asked for)"
    device = str(run.device) if run.device.type != "cpu" else f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    steps = -(-len(task.examples.texts) // recipe.batch_size)
    start = "a new model" if task.init_from is None else f"from {task.init_from}"
    yield (
        f"{start}; {counted(recipe.epochs, 'epoch')} of {counted(steps, 'step')}, "
        f"learning rate {recipe.learning_rate:g}, batch size {recipe.batch_size}; {device}"
    )
    total = recipe.epochs * steps
    if task.init_from is None and total < FEW_STEPS:
        few = counted(total, "step")
        yield f"{few} {'is' if total == 1 else 'are'} few for a new model: more epochs or a start from a checkpoint learn more"
    yield (
        f"model, log and state go to {run.folder} after each epoch; "
        "Ctrl-C saves the state; --resume (resume=True) continues"
    )


def _digest(examples: Examples) -> str:
    """A checksum that tells two sets of examples apart."""
    digest = hashlib.blake2b(digest_size=8)
    for text, label in zip(examples.texts, examples.labels, strict=True):
        digest.update(repr((text, label)).encode("utf-8", "surrogatepass"))
    return f"{len(examples.texts)} examples, {digest.hexdigest()}"


def small_config(max_length: int) -> ALBERTConfig:
    """The default of a new model: about 2 million parameters with 8,000 pieces, for training from scratch on a CPU."""
    return ALBERTConfig(
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        num_hidden_layers=4,
        embedding_size=128,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=max(128, max_length),
    )


def _tokenizer(
    folder: Path, examples: Examples, vocab_size: int, init_from: str | Path | None, seed: int, resume: bool
) -> tuple[Tokenizer, bool]:
    """The tokenizer of the run to resume, of `init_from`, or one learnt from the training text; and whether to save it."""
    if resume and (folder / STATE_NAME).exists():  # written after the tokenizer
        return load_tokenizer(folder), False
    if init_from is not None:
        return load_tokenizer(folder_of(resolve(init_from))), True
    lines = {line for text in examples.texts for line in ([text] if isinstance(text, str) else text)}
    return train_tokenizer(sorted(lines), vocab_size, at_most=True, seed=seed), True


def _complete(
    config: EncoderConfig | None, tokenizer: Tokenizer, examples: Examples, init_from: str | Path | None, recipe: Recipe
) -> EncoderConfig:
    """Fills the run's vocabulary, special tokens and labels into the configuration, and checks it."""
    if init_from is not None:
        config = config_of(resolve(init_from))
        checks.check_trainable(config, init_from)
        checks.check_vocabulary(tokenizer, config, init_from)
    else:
        sizes = config or small_config(recipe.max_length + recipe.position_shift)
        config = sizes.replace(
            vocab_size=tokenizer.vocab_size,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    checks.check_length(recipe.max_length, config, recipe.position_shift)
    if recipe.position_shift and not class_of(family_of(config.model_type, "config"), "Model").positions_are_columns:
        raise ValueError(f"position_shift: {config.model_type} counts positions from its pad token, and takes none")
    if (recipe.piece_dropout or recipe.pretrain_epochs) and tokenizer.mask_token_id is None:
        raise ValueError("piece_dropout and pretrain_epochs need a tokenizer with a mask token")
    if examples.label_names is None:
        return config.replace(id2label=None, label2id=None, num_labels=1, problem_type="regression")
    names = dict(enumerate(examples.label_names))
    return config.replace(id2label=names, label2id=None, problem_type="single_label_classification")


def _pretrain(run: TrainingRun, task: _Task) -> EncoderModel:
    """Trains by masked language modelling on the training text; returns the encoder."""
    recipe, texts = run.recipe, task.examples.texts
    lines = drop_contained_lines([text if isinstance(text, str) else " ".join(text) for text in texts])
    model = AutoModelForMaskedLM.from_config(task.config).float()
    encoder: EncoderModel = model.base_model
    data = MaskedTextDataset(
        lines,
        task.tokenizer,
        recipe.max_length,
        mask_probability=recipe.mask_probability,
        with_wanted_tokens=True,
        token_types=encoder.takes_types,
    )
    if task.init_from is not None:
        _start_from(model, task.init_from)
    stage = Stage(
        "pretrain", model, data, None, recipe.pretrain_epochs, recipe.pretrain_batch_size, recipe.pretrain_learning_rate
    )
    run.epochs(stage)
    return encoder


def _start_from(model: HeadModel, init_from: str | Path) -> None:
    """Loads the weights of a checkpoint into a model, without its classifier if that is for other labels."""
    folder = resolve(init_from)
    state = rename_old_names(load_checkpoint(folder), model.family, model.prefix)
    old, new = config_of(folder), model.config
    if (old.num_labels, old.id2label, old.problem_type) != (new.num_labels, new.id2label, new.problem_type):
        for key in [key for key in state if key.startswith("classifier.")]:
            del state[key]
    load_into(model, state, model.family, allow_missing_head=True)


def _classify(run: TrainingRun, task: _Task, encoder: EncoderModel | None) -> None:
    """Trains the classifier (or regressor), starting from the pre-trained encoder, from `init_from` or at random."""
    recipe, examples = run.recipe, task.examples
    model = AutoModelForSequenceClassification.from_config(task.config).float()
    types = model.base_model.takes_types
    if encoder is not None:
        left = model.base_model.load_state_dict(encoder.state_dict(), strict=False)
        assert not left.unexpected_keys, left
        assert all(key.startswith("pooler.") for key in left.missing_keys), left
    elif task.init_from is not None and run.saved is None:
        _start_from(model, task.init_from)
    data = TextDataset(
        examples.texts,
        examples.labels,
        task.tokenizer,
        recipe.max_length,
        piece_dropout=recipe.piece_dropout,
        position_shift=recipe.position_shift,
        token_types=types,
    )
    regression = examples.label_names is None
    criterion = nn.MSELoss() if regression else nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    dev_loader = None
    if task.dev is not None:
        dev_data = TextDataset(task.dev.texts, task.dev.labels, task.tokenizer, recipe.max_length, token_types=types)
        sampler = LengthBucketSampler(dev_data.lengths, recipe.batch_size, shuffle=False)
        dev_loader = DataLoader(dev_data, batch_sampler=sampler, collate_fn=dev_data.collate)
    rate = recipe.learning_rate
    assert rate is not None, "the recipe is a completed one"
    stage = Stage(
        "classify", model, data, criterion, recipe.epochs, recipe.batch_size, rate, dev_loader, keeps_best=True
    )
    run.epochs(stage)


__all__ = ["FitResult", "Recipe", "fit", "small_config"]
