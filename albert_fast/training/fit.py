"""A whole training run, from labelled text to a checkpoint: what `albert-fast train` does.

    fit("train.tsv", "out", dev_file="dev.tsv", recipe=Recipe(epochs=5, pretrain_epochs=10))

    checks of all files, options and the folder -> vocabulary (learnt from the training text, or taken over) -> masked
    language modelling on the same text, if wanted -> classification; after each epoch the dev set, the log and the state
    of the run; the best epoch's model is kept -> the test set, once

| in output_dir | what |
|---|---|
| config.json, model.safetensors | the best model so far, for from_pretrained |
| tokenizer.json, tokenizer_config.json | the vocabulary |
| log.jsonl | an object for each epoch |
| training_state.pt | all that `resume=True` needs to go on with the same losses |
| .train.lock | only while a run lasts: it keeps a second run out |
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel
from ..checkpoints.weights import config_path, load_checkpoint, load_into, rename_old_names, resolve
from ..text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from . import checks
from .checkpointing import STATE_NAME, claimed
from .data import Examples, LengthBucketSampler, TextDataset, read_examples
from .evaluate import Evaluation, evaluate
from .masking import MaskedTextDataset, drop_contained_lines
from .metrics import check_metrics
from .run import Recipe, Run, dev_metrics

FEW_STEPS = 400  # a new model that was trained for less still guesses, mostly


@dataclass
class FitResult:
    """output_dir; the best epoch (from 1; the last where there is no dev set), the metric that chose it and its value;
    the log's records; the best model on the test set, where there is one."""

    output_dir: Path
    best_epoch: int
    metric: str
    best_value: float | None
    history: list[dict[str, Any]]
    test: Evaluation | None


def fit(
    train_file: str | Path,
    output_dir: str | Path,
    *,
    dev_file: str | Path | None = None,
    test_file: str | Path | None = None,
    recipe: Recipe | None = None,
    config: ALBERTConfig | None = None,
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
    """Trains a text classifier (or, where labels are numbers to predict, a regressor) and keeps the best epoch's model.

    Args:
        train_file, dev_file, test_file, label_names, *_column: labelled text, see `read_examples`. The dev set chooses
            the best epoch; the test set is measured once, at the end.
        output_dir: gets the files of the table at the top; made if need be, and locked while the run lasts.
        config: sizes of a new model; vocabulary, labels and special tokens are filled in. Default: a small one,
            `small_config`. Not with `init_from`.
        vocab_size: pieces of the new vocabulary, at most: a short text gives fewer. Not used with `init_from`.
        init_from: a checkpoint folder whose weights and vocabulary are the start, such as a pre-trained ALBERT.
        resume: go on with the run in output_dir if there is one; files and settings must be the same, but for the number
            of epochs. With another number the learning rate of each later step is that of a run planned with it.
        device: default: a GPU if there is one.
        progress: bars on standard error.
        report: called with lines on what the run does. Default: they go to standard error where `progress` is on.

    Raises:
        FileExistsError: output_dir holds a run and `resume` is off, or a model of another origin.
        LockedError: another run is writing to output_dir.
        ValueError: files that do not fit, a state that belongs to other settings; ImportError: a metric's library is
            missing; OSError: a folder that cannot be written, a full disk. All of these before the first step.
        FloatingPointError: the loss is not finite any more (the state on disk is that of the last good epoch).
        KeyboardInterrupt: Ctrl-C; a step that has begun is finished and the state saved first.
    """
    recipe = recipe or Recipe()
    if config is not None and init_from is not None:
        raise ValueError("config is for a new model, init_from for one that has its sizes; give one of them")
    say = report or (_say if progress else lambda line: None)
    place = checks.check_device(device)
    folder = Path(output_dir)
    with claimed(folder, resume):
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
            read_for_measuring(test_file)  # for its errors alone: `evaluate` reads it at the end
        tokenizer, learnt = _tokenizer(folder, examples, vocab_size, init_from, recipe.seed, resume)
        tokenizer.split_special_tokens = True  # as `classify` reads texts
        config = _complete(config, tokenizer, examples, init_from, recipe)
        settings = dataclasses.asdict(recipe) | {
            "config": config.to_dict(), "init_from": None if init_from is None else str(init_from),
            "vocab_size": vocab_size if init_from is None else None,
            "train": _digest(examples), "dev": None if dev is None else _digest(dev),
        }  # fmt: skip
        if learnt:
            tokenizer.model_max_length = config.max_position_embeddings
            tokenizer.settings["model_max_length"] = config.max_position_embeddings
        run = Run(folder, recipe, settings, place, progress, say, tokenizer if learnt else None)
        if resume:
            run.load()
        checks.check_disk(folder, config, recipe.ema_decay is not None)
        _introduce(say, run, examples, dev, train_file, vocab_size, init_from)
        torch.manual_seed(recipe.seed)
        encoder = None
        if recipe.pretrain_epochs and run.stage == "pretrain":
            encoder = _pretrain(run, config, tokenizer, examples, init_from)
        _classify(run, config, tokenizer, examples, dev, encoder, init_from)
        tested = None
        if test_file is not None:
            tested = evaluate(
                folder,
                test_file,
                metrics=metrics,
                batch_size=recipe.batch_size,
                device=place,
                progress=progress,
                **columns,
            )
    return FitResult(folder, run.best_epoch, str(recipe.metric), run.best_value, run.history, tested)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _introduce(
    say: Callable[[str], None], run: Run, examples: Examples, dev: Examples | None, train_file: str | Path,
    vocab_size: int, init_from: str | Path | None,
) -> None:  # fmt: skip
    """What a user should know before the first step."""
    config, recipe = run.settings["config"], run.recipe
    say(f"{train_file}: {checks.describe_examples(examples)}")
    if dev is None:
        say("no dev set: the model of the last epoch is kept")
    if init_from is None and config["vocab_size"] < vocab_size:
        say(f"vocabulary: {config['vocab_size']} pieces, all that this text gives ({vocab_size} were asked for)")
    where = str(run.device) if run.device.type != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    steps = -(-len(examples.texts) // recipe.batch_size)
    say(
        f"{'a new model' if init_from is None else f'from {init_from}'}; {recipe.epochs} epochs of {steps} steps, "
        f"learning rate {recipe.learning_rate:g}, batch size {recipe.batch_size}; {where}"
    )
    if init_from is None and recipe.epochs * steps < FEW_STEPS:
        say(
            f"{recipe.epochs * steps} steps are few for a new model: more epochs or a start from a checkpoint learn more"
        )
    say(
        f"model, log and state go to {run.folder} after each epoch; Ctrl-C saves the state; --resume (resume=True) goes on"
    )


def _digest(examples: Examples) -> str:
    """Tells two sets of examples apart."""
    digest = hashlib.blake2b(digest_size=8)
    for text, label in zip(examples.texts, examples.labels, strict=True):
        digest.update(repr((text, label)).encode("utf-8", "surrogatepass"))
    return f"{len(examples.texts)} examples, {digest.hexdigest()}"


def small_config(max_length: int) -> ALBERTConfig:
    """About 2 million parameters with a vocabulary of 8,000: for training from scratch on a CPU."""
    return ALBERTConfig(
        hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=4, embedding_size=128,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, max_position_embeddings=max(128, max_length),
    )  # fmt: skip


def _tokenizer(
    folder: Path, examples: Examples, vocab_size: int, init_from: str | Path | None, seed: int, resume: bool
) -> tuple[Tokenizer, bool]:
    """The vocabulary of the run to resume, of `init_from`, or one learnt from the training text; whether it is to be saved."""
    if resume and (folder / STATE_NAME).exists():  # written after the tokenizer
        return load_tokenizer(folder), False
    if init_from is not None:
        return load_tokenizer(resolve(init_from)), True
    lines = {line for text in examples.texts for line in ([text] if isinstance(text, str) else text)}
    return train_tokenizer(sorted(lines), vocab_size, at_most=True, seed=seed), True


def _complete(
    config: ALBERTConfig | None, tokenizer: Tokenizer, examples: Examples, init_from: str | Path | None, recipe: Recipe
) -> ALBERTConfig:
    """The sizes asked for, with the vocabulary, the special tokens and the labels of this run; checked against it."""
    if init_from is not None:
        config = ALBERTConfig.from_json_file(config_path(resolve(init_from)))
        checks.check_trainable(config, init_from)
        checks.check_vocabulary(tokenizer, config, init_from)
    else:
        config = (config or small_config(recipe.max_length + recipe.position_shift)).replace(
            vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        )  # fmt: skip
    checks.check_length(recipe.max_length, config, recipe.position_shift)
    if (recipe.piece_dropout or recipe.pretrain_epochs) and tokenizer.mask_token_id is None:
        raise ValueError("piece_dropout and pretrain_epochs need a tokenizer with a mask token")
    if examples.label_names is None:
        return config.replace(id2label=None, label2id=None, num_labels=1, problem_type="regression")
    names = dict(enumerate(examples.label_names))
    return config.replace(id2label=names, label2id=None, problem_type="single_label_classification")


def _pretrain(
    run: Run, config: ALBERTConfig, tokenizer: Tokenizer, examples: Examples, init_from: str | Path | None
) -> ALBERTModel:
    """Masked language modelling on the training text; the encoder that comes of it."""
    recipe = run.recipe
    lines = drop_contained_lines([text if isinstance(text, str) else " ".join(text) for text in examples.texts])
    data = MaskedTextDataset(
        lines, tokenizer, recipe.max_length, mask_probability=recipe.mask_probability, with_wanted_tokens=True
    )
    model = ALBERTForMaskedLM(config).float()
    if init_from is not None:
        _start_from(model, init_from)
    rate = recipe.pretrain_learning_rate
    run.epochs("pretrain", model, data, None, recipe.pretrain_epochs, recipe.pretrain_batch_size, rate)
    return model.albert


def _start_from(model: ALBERTForMaskedLM | ALBERTForSequenceClassification, init_from: str | Path) -> None:
    """The weights of a checkpoint; a classifier for other labels than the model's is left behind."""
    folder = resolve(init_from)
    state = rename_old_names(load_checkpoint(folder), "albert.")
    old, new = ALBERTConfig.from_json_file(config_path(folder)), model.config
    if (old.num_labels, old.id2label, old.problem_type) != (new.num_labels, new.id2label, new.problem_type):
        for key in ("classifier.weight", "classifier.bias"):
            state.pop(key, None)
    load_into(model, state, allow_missing_head=True)


def _classify(
    run: Run, config: ALBERTConfig, tokenizer: Tokenizer, examples: Examples, dev: Examples | None,
    encoder: ALBERTModel | None, init_from: str | Path | None,
) -> None:  # fmt: skip
    """The classifier (or regressor) on top of the pre-trained encoder, `init_from`, or random weights."""
    recipe = run.recipe
    model = ALBERTForSequenceClassification(config).float()
    if encoder is not None:
        left = model.albert.load_state_dict(encoder.state_dict(), strict=False)
        assert not left.unexpected_keys, left
        assert all(key.startswith("pooler.") for key in left.missing_keys), left
    elif init_from is not None and run.saved is None:
        _start_from(model, init_from)
    data = TextDataset(
        examples.texts, examples.labels, tokenizer, recipe.max_length,
        piece_dropout=recipe.piece_dropout, position_shift=recipe.position_shift,
    )  # fmt: skip
    regression = examples.label_names is None
    criterion = nn.MSELoss() if regression else nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    dev_loader = None
    if dev is not None:
        dev_data = TextDataset(dev.texts, dev.labels, tokenizer, recipe.max_length)
        sampler = LengthBucketSampler(dev_data.lengths, recipe.batch_size, shuffle=False)
        dev_loader = DataLoader(dev_data, batch_sampler=sampler, collate_fn=dev_data.collate)
    rate = recipe.learning_rate
    assert rate is not None, "the recipe is a completed one"
    run.epochs("classify", model, data, criterion, recipe.epochs, recipe.batch_size, rate, dev_loader, keep=True)


__all__ = ["FitResult", "Recipe", "fit", "small_config"]
