"""Runs a whole training, from labelled text to a checkpoint: what `albert-fast train` does.

    fit("train.tsv", "out", dev_file="dev.tsv", recipe=Recipe(epochs=5, pretrain_epochs=10))
    fit("train.conll", "out", dev_file="dev.conll", init_from="my-albert")

1. All files, options and the folder are checked.
2. The vocabulary is learnt from the training text, or taken from the checkpoint to start from.
3. If wanted, the model is pre-trained on the same text by masked language modelling.
4. The model of the task is trained. After each epoch the dev set is measured, the log and the state of the run are written, and
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

from ..checkpoints.saving import folder_of
from ..checkpoints.weights import load_checkpoint, load_into, rename_old_names, resolve
from ..models.auto import (
    AutoModelForMaskedLM,
    class_of,
    config_of,
    family_of,
)
from ..models.config import ALBERTConfig
from ..models.encoder_config import EncoderConfig
from ..models.encoder_model import EncoderModel
from ..models.head_model import HeadModel
from ..text.batching import for_plain_text
from ..text.text_files import Columns
from ..text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from . import checks
from .checkpointing import STATE_NAME, claimed, other_files
from .data import Examples, TokenRows
from .evaluate import Evaluation, evaluate
from .masking import MaskedTextDataset, drop_contained_lines
from .recipe import Recipe
from .run import Stage, TrainingRun, counted, dev_metrics
from .sources import Source, name_of
from .tasks import Task, read_for

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
class _Work:
    """What a run trains and on what; `init_from` is the checkpoint to start from, None for a new model."""

    task: Task
    config: EncoderConfig
    tokenizer: Tokenizer
    examples: Examples
    dev: Examples | None
    init_from: str | Path | None


def fit(
    train_file: Source,
    output_dir: str | Path,
    *,
    task: str | None = None,
    dev_file: Source | None = None,
    test_file: Source | None = None,
    recipe: Recipe | None = None,
    config: EncoderConfig | None = None,
    vocab_size: int = 8000,
    vocab_kind: str = "unigram",
    init_from: str | Path | None = None,
    pair_pooling: str | None = None,
    label_names: list[str] | None = None,
    text_column: str | int | None = None,
    pair_column: str | int | None = None,
    label_column: str | int | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> FitResult:
    """Trains a model for a task on labelled text and keeps the best epoch's.

    Args:
        train_file, dev_file, test_file: files, folders of saved Hugging Face data sets, data sets, or lists of dictionaries. The
            dev set chooses the best epoch; the test set is measured once, at the end.
        task: "classify", "regress", "multilabel", "tag", "answer", "choose" or "translation"; None: what the training set is
            certainly for, see `tasks.read_for`.
        label_names: the labels in the order of their ids, see `read_examples`.
        text_column, pair_column, label_column: names of columns; the usual ones are in `docs/training.md`. For "answer" they are
            the question, the context and the answer; for "choose" pair_column is the choices.
        output_dir: gets the files of the table at the top; it is created if necessary, and locked while the run lasts.
        config: sizes of a new model; vocabulary, labels and special tokens are filled in. Default: `small_config`. Not
            with `init_from`.
        vocab_size: pieces of the new vocabulary, at most: a short text gives fewer. Not used with `init_from`.
        vocab_kind: "unigram" (SentencePiece) or "wordpiece", which makes a word of every Chinese character.
        init_from: a checkpoint folder, file of weights or hub id; its weights and vocabulary are the start, such as those of
            a pre-trained ALBERT, BERT or DistilBERT.
        pair_pooling: "aligned": a classifier of pairs pools the mean of their `aligned_representation` and not [CLS], here and
            wherever the model is loaded by this library; None: as in the checkpoint, by default "cls".
        resume: continue the run in output_dir if there is one. Files and settings must be the same, except for the number
            of epochs: the learning rate of each later step is then that of a run planned with the new number.
        device: default: a GPU if there is one.
        progress: on standard error, a bar on a terminal, elsewhere a line now and then.
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
        columns = Columns(text_column, pair_column, label_column)
        chosen, examples = read_for(task, train_file, columns, label_names)
        chosen.check(examples, train_file, label_names)
        metric = chosen.default_metric(examples.label_names)
        width = None if init_from is None else config_of(resolve(init_from)).hidden_size
        asked = recipe.metric is not None
        recipe = recipe.completed(trained_width=width, metric=metric)
        _check_loss(chosen, recipe)
        metrics = dev_metrics(recipe.metric)
        if asked or dev_file is not None or test_file is not None:
            chosen.check_metrics(metrics)

        def read_for_measuring(file: Source) -> Examples:
            return chosen.read_split(file, columns, examples.label_names, for_metrics=bool(metrics))

        dev = None if dev_file is None else read_for_measuring(dev_file)
        if test_file is not None:
            read_for_measuring(test_file)  # only for its errors: `evaluate` reads it at the end
        if resume and (folder / STATE_NAME).exists():  # written after the tokenizer
            tokenizer, learnt = load_tokenizer(folder), False
        else:
            tokenizer, learnt = (
                _new_tokenizer(chosen, examples, vocab_size, vocab_kind, init_from, recipe.seed),
                True,
            )
        tokenizer = for_plain_text(tokenizer)
        config = config or chosen.new_config(recipe.max_length)
        config = chosen.configured(_complete(config, tokenizer, init_from, recipe), examples)
        if pair_pooling is not None:
            _check_pairs(chosen, examples, pair_pooling)
            config.pair_pooling = pair_pooling
        work = _Work(chosen, config, tokenizer, examples, dev, init_from)
        if learnt:
            # A checkpoint's tokenizer may say less; a new one says nothing of it.
            longest = config.longest if init_from is None else min(config.longest, tokenizer.model_max_length)
            tokenizer.model_max_length = tokenizer.settings["model_max_length"] = longest
        settings = _settings(work, recipe, vocab_size, vocab_kind)
        run = TrainingRun(
            folder, recipe, settings, device, tokenizer if learnt else None, progress=progress, report=say
        )
        if resume:
            run.load()
        with torch.device("meta"):
            model = chosen.model.from_config(config)
            checks.check_disk(folder, model, recipe.ema_decay is not None)
        types = model.base_model.takes_types
        data = chosen.data(examples, tokenizer, recipe.max_length, types=types, recipe=recipe)
        for line in _introduction(run, work, data, name_of(train_file), vocab_size):
            say(line)
        torch.manual_seed(recipe.seed)
        encoder = None
        if recipe.pretrain_epochs and run.stage == "pretrain":
            encoder = _pretrain(run, work)
        _train(run, work, data, encoder)
        tested = None
        if test_file is not None:
            tested = evaluate(
                folder,
                test_file,
                metrics=metrics,
                batch_size=recipe.batch_size,
                device=device,
                progress=progress,
                text_column=text_column,
                pair_column=pair_column,
                label_column=label_column,
            )
    return FitResult(folder, run.best_epoch, str(recipe.metric), run.best_value, run.history, tested)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check_loss(task: Task, recipe: Recipe) -> None:
    """ValueError for settings of the loss that the task's does not have."""
    if recipe.label_smoothing and not task.smooths_labels:
        raise ValueError(f"label_smoothing is for one of several classes; the task is {task.name}")
    if recipe.class_weights and not task.weighs_classes:
        raise ValueError(f"class_weights is for classes and tags; the task is {task.name}")
    for name in ("pretrain_epochs", "piece_dropout", "position_shift"):
        if getattr(recipe, name) and not task.encoder_alone:
            raise ValueError(f"{name} is for an encoder alone; the task is {task.name}")


def _check_pairs(task: Task, examples: Examples, pair_pooling: str) -> None:
    """ValueError where there are no pairs to pool."""
    if pair_pooling == "aligned" and (
        not task.architecture.endswith("SequenceClassification") or isinstance(examples.texts[0], str)
    ):
        raise ValueError(
            "pair_pooling 'aligned' is for classes or numbers of pairs of texts; the examples are not such pairs"
        )


def _settings(work: _Work, recipe: Recipe, vocab_size: int, vocab_kind: str) -> dict[str, Any]:
    """What a resumed run must have in common with this one, for JSON."""
    return dataclasses.asdict(recipe) | {
        "task": work.task.name,
        "config": work.config.to_dict(),
        "init_from": None if work.init_from is None else str(work.init_from),
        "vocab_size": vocab_size if work.init_from is None else None,
        "vocab_kind": vocab_kind if work.init_from is None else None,
        "train": _digest(work.examples),
        "dev": None if work.dev is None else _digest(work.dev),
    }


def _introduction(run: TrainingRun, work: _Work, data: TokenRows, train_name: str, vocab_size: int) -> Iterator[str]:
    """Lines that a user should read before the first step."""
    recipe, pieces = run.recipe, work.config.vocab_size
    yield f"{train_name}: {work.task.name}, {work.task.describe(work.examples)}"
    if data.left_out is not None:
        yield data.left_out
    if work.dev is None:
        yield "no dev set: the model of the last epoch is kept"
    if work.init_from is None and pieces < vocab_size:
        yield f"vocabulary: {pieces} pieces, all that this text gives ({vocab_size} were asked for)"
    device = str(run.device) if run.device.type != "cpu" else f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    steps = -(-len(data) // recipe.batch_size)
    start = "a new model" if work.init_from is None else f"from {work.init_from}"
    yield (
        f"{start}; {counted(recipe.epochs, 'epoch')} of {counted(steps, 'step')}, "
        f"learning rate {recipe.learning_rate:g}, batch size {recipe.batch_size}; {device}"
    )
    total = recipe.epochs * steps
    if work.init_from is None and total < FEW_STEPS:
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


def _new_tokenizer(
    task: Task, examples: Examples, vocab_size: int, kind: str, init_from: str | Path | None, seed: int
) -> Tokenizer:
    """The tokenizer of `init_from`, or one learnt from the training text."""
    if init_from is not None:
        return load_tokenizer(folder_of(resolve(init_from)))
    lines = sorted(set(task.lines(examples)))
    return train_tokenizer(lines, vocab_size, at_most=True, kind=kind, seed=seed, **task.vocabulary)


def _complete(
    config: EncoderConfig | None, tokenizer: Tokenizer, init_from: str | Path | None, recipe: Recipe
) -> EncoderConfig:
    """Fills the run's vocabulary and special tokens into the configuration, and checks it."""
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
    return config


def _pretrain(run: TrainingRun, work: _Work) -> EncoderModel:
    """Trains by masked language modelling on the training text; returns the encoder."""
    recipe, lines = run.recipe, drop_contained_lines(work.task.documents(work.examples))
    model = AutoModelForMaskedLM.from_config(work.config).float()
    encoder: EncoderModel = model.base_model
    data = MaskedTextDataset(
        lines,
        work.tokenizer,
        recipe.max_length,
        mask_probability=recipe.mask_probability,
        with_wanted_tokens=True,
        token_types=encoder.takes_types,
    )
    if work.init_from is not None:
        _start_from(model, work.init_from, keeps_head=True)
    stage = Stage(
        "pretrain", model, data, None, recipe.pretrain_epochs, recipe.pretrain_batch_size, recipe.pretrain_learning_rate
    )
    run.epochs(stage)
    return encoder


def _start_from(model: HeadModel, init_from: str | Path, *, keeps_head: bool) -> None:
    """Loads the weights of a checkpoint into a model, without its head if that is for other labels or another task."""
    folder = resolve(init_from)
    state = rename_old_names(load_checkpoint(folder), model.family, model.prefix)
    if not keeps_head:
        for key in [key for key in state if key.startswith(("classifier.", "qa_outputs."))]:
            del state[key]
    load_into(model, state, model.family, allow_missing_head=True, warns_of_missing=False)  # a new task has a new head


def _has_same_head(work: _Work) -> bool:
    """Whether the head of the checkpoint to start from has the task and the labels of the run."""
    assert work.init_from is not None
    old, new = config_of(resolve(work.init_from)), work.config
    same_labels = (old.num_labels, old.id2label, old.problem_type) == (new.num_labels, new.id2label, new.problem_type)
    stated = old.architectures
    return same_labels and (not stated or str(stated[0]).endswith(work.task.architecture))


def _train(run: TrainingRun, work: _Work, data: TokenRows, encoder: EncoderModel | None) -> None:
    """Trains the model of the task, starting from the pre-trained encoder, from `init_from` or at random."""
    recipe, task = run.recipe, work.task
    model = task.model.from_config(work.config).float()
    if encoder is not None:
        left = model.base_model.load_state_dict(encoder.state_dict(), strict=False)
        assert not left.unexpected_keys, left
        assert all(key.startswith("pooler.") for key in left.missing_keys), left
    elif work.init_from is not None and run.saved is None:
        _start_from(model, work.init_from, keeps_head=_has_same_head(work))
    criterion = task.criterion(recipe, work.examples)
    if criterion is not None:
        criterion.to(run.device)  # weights of classes are on it
    rate = recipe.learning_rate
    assert rate is not None, "the recipe is a completed one"
    stage = Stage(
        task.name,
        model,
        data,
        criterion,
        recipe.epochs,
        recipe.batch_size,
        rate,
        _dev_figures(run, work, model.base_model.takes_types),
        keeps_best=True,
    )
    run.epochs(stage)


def _dev_figures(run: TrainingRun, work: _Work, types: bool) -> Callable[[Any], dict[str, float]] | None:
    """The function that measures a model on the dev set; None without one."""
    recipe, dev = run.recipe, work.dev
    if dev is None:
        return None
    data = work.task.data(dev, work.tokenizer, recipe.max_length, types=types)

    def figures(model: Any) -> dict[str, float]:
        measured = work.task.measure(
            model,
            data,
            dev,
            metrics=dev_metrics(recipe.metric),
            batch_size=recipe.batch_size,
            device=run.device,
            progress=run.progress,
        )
        return {"loss": measured.loss, **measured.metrics}

    return figures


__all__ = ["FitResult", "Recipe", "fit", "small_config"]
