"""A whole training run, from labelled text to a checkpoint: what `albert-fast train` does.

    fit("train.tsv", "out", dev_file="dev.tsv", recipe=Recipe(epochs=5, pretrain_epochs=10))

    vocabulary (learnt from the training text, or taken over) -> masked language modelling on the same text, if wanted
    -> classification; after each epoch the dev set, the log and the state of the run; the best epoch's model is kept

| in output_dir | what |
|---|---|
| config.json, model.safetensors | the best model so far, for from_pretrained |
| tokenizer.json, tokenizer_config.json | the vocabulary |
| log.jsonl | an object for each epoch |
| training_state.pt | all that `resume=True` needs to go on with the same losses |
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel
from ..tokenization import Tokenizer, load_tokenizer, train_tokenizer
from ..weights import config_path, load_checkpoint, load_into, rename_old_names, resolve
from .checkpointing import STATE_NAME
from .data import Examples, LengthBucketSampler, TextDataset, read_examples
from .masking import MaskedTextDataset, drop_contained_lines
from .run import Recipe, Run


@dataclass
class FitResult:
    """output_dir; the best epoch (from 1; the last where there is no dev set) and its figure; the log's records."""

    output_dir: Path
    best_epoch: int
    best_value: float | None
    history: list[dict[str, Any]]


def fit(
    train_file: str | Path,
    output_dir: str | Path,
    *,
    dev_file: str | Path | None = None,
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
) -> FitResult:
    """Trains a text classifier (or, where labels are numbers to predict, a regressor) and keeps the best epoch's model.

    Args:
        train_file, dev_file, label_names, *_column: labelled text, see `read_examples`.
        output_dir: gets the files of the table at the top; made if need be.
        config: sizes of a new model; vocabulary, labels and special tokens are filled in. Default: a small one,
            `small_config`. Not with `init_from`.
        vocab_size: pieces of the new vocabulary. Not used with `init_from`.
        init_from: a checkpoint folder whose weights and vocabulary are the start, such as a pre-trained ALBERT.
        resume: go on with the run in output_dir if there is one; the settings must be the same.
        device: default: a GPU if there is one.
        progress: bars on standard error.

    Raises:
        FileExistsError: output_dir holds a run and `resume` is off.
        ValueError: files that do not fit, a state that belongs to other settings; FloatingPointError: the loss is not
            finite any more (the state on disk is that of the last good epoch).
    """
    recipe = recipe or Recipe()
    if config is not None and init_from is not None:
        raise ValueError("config is for a new model, init_from for one that has its sizes; give one of them")
    folder = Path(output_dir)
    if not resume and any((folder / name).exists() for name in (STATE_NAME, "model.safetensors")):
        raise FileExistsError(
            f"{folder} holds a model or an unfinished run; resume it (--resume, resume=True) or choose another"
        )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    examples = read_examples(train_file, label_names=label_names, **columns)
    dev = None if dev_file is None else read_examples(dev_file, label_names=examples.label_names, **columns)
    folder.mkdir(parents=True, exist_ok=True)
    known = resume and (folder / "tokenizer_config.json").exists()  # the file that is written last
    tokenizer = load_tokenizer(folder) if known else _new_tokenizer(examples, vocab_size, init_from, recipe.seed)
    tokenizer.split_special_tokens = True  # as `classify` reads texts
    config = _complete(config, tokenizer, examples, init_from, recipe)
    if not known:
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.settings["model_max_length"] = config.max_position_embeddings
        tokenizer.save(folder)
    settings = dataclasses.asdict(recipe) | {
        "config": config.to_dict(), "init_from": None if init_from is None else str(init_from),
        "train_examples": len(examples.texts), "dev_examples": 0 if dev is None else len(dev.texts),
    }  # fmt: skip
    run = Run(folder, recipe, settings, place, progress)
    if resume:
        run.load()
    torch.manual_seed(recipe.seed)
    encoder = None
    if recipe.pretrain_epochs and run.stage == "pretrain":
        encoder = _pretrain(run, config, tokenizer, examples, init_from)
    _classify(run, config, tokenizer, examples, dev, encoder, init_from)
    return FitResult(folder, run.best_epoch, run.best_value, run.history)


def small_config(max_length: int) -> ALBERTConfig:
    """About 2 million parameters with a vocabulary of 8,000: for training from scratch on a CPU."""
    return ALBERTConfig(
        hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=4, embedding_size=128,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, max_position_embeddings=max(128, max_length),
    )  # fmt: skip


def _new_tokenizer(examples: Examples, vocab_size: int, init_from: str | Path | None, seed: int) -> Tokenizer:
    """The vocabulary of `init_from`, or one learnt from the training text."""
    if init_from is not None:
        return load_tokenizer(resolve(init_from))
    lines = {line for text in examples.texts for line in ([text] if isinstance(text, str) else text)}
    return train_tokenizer(sorted(lines), vocab_size, seed=seed)


def _complete(
    config: ALBERTConfig | None, tokenizer: Tokenizer, examples: Examples, init_from: str | Path | None, recipe: Recipe
) -> ALBERTConfig:
    """The sizes asked for, with the vocabulary, the special tokens and the labels of this run."""
    if init_from is not None:
        config = ALBERTConfig.from_json_file(config_path(resolve(init_from)))
    else:
        config = (config or small_config(recipe.max_length + recipe.position_shift)).replace(
            vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        )  # fmt: skip
    needed = recipe.max_length + recipe.position_shift
    if needed > config.max_position_embeddings:
        raise ValueError(
            f"max_length {recipe.max_length} and position_shift {recipe.position_shift} need {needed} positions, "
            f"the model has {config.max_position_embeddings}"
        )
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
        lines, tokenizer, recipe.max_length, mask_probability=recipe.mask_probability, with_output_tokens=True
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
    run.epochs("classify", model, data, criterion, recipe.epochs, recipe.batch_size, rate, dev_loader, keep=True)


__all__ = ["FitResult", "Recipe", "fit", "small_config"]
