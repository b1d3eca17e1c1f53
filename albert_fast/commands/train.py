"""`albert-fast train`: the command line of `albert_fast.training.fit`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as options
from ._errors import UsageError, reports_errors, warn


@dataclass(frozen=True)
class RecipeOptions:
    """The fields of `albert_fast.training.Recipe` with its defaults; that class takes too long to import for --help."""

    epochs: Annotated[int, typer.Option(min=1, help="Passes over TRAIN.")] = 3
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Texts in a training step.")] = 32
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            min=0.0,
            help="Peak learning rate.",
            show_default="5e-5 with a base model in --init-from, more with a narrower one; else 5e-4",
        ),
    ] = None
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay of AdamW.")] = 0.01
    warmup_ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps that warm up.")] = 0.06
    max_grad_norm: Annotated[float, typer.Option(min=0.0, help="Scale larger gradients down to this norm.")] = 1.0
    max_length: Annotated[int, typer.Option(min=3, help="Cut texts to this many tokens.")] = 128
    label_smoothing: Annotated[float, typer.Option(min=0.0, max=1.0, help="Label smoothing of the cross-entropy.")] = (
        0.0
    )
    class_weights: Annotated[
        str | None,
        typer.Option(
            help="balanced: rare classes and tags weigh as much as others.", show_default="all examples alike"
        ),
    ] = None
    piece_dropout: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of tokens masked while training.")] = 0.0
    position_shift: Annotated[
        int, typer.Option(min=0, help="Training texts start at a random position up to this.")
    ] = 0
    ema_decay: Annotated[float | None, typer.Option(help="Keep a running average of the weights, with this decay.")] = (
        None
    )
    pretrain_epochs: Annotated[int, typer.Option(min=0, help="Masked language modelling on TRAIN first.")] = 0
    pretrain_batch_size: Annotated[int, typer.Option(min=1, help="Texts in a pre-training step.")] = 32
    pretrain_learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate of pre-training.")] = 5e-4
    mask_probability: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of tokens to hide in pre-training.")
    ] = 0.15
    metric: Annotated[
        str | None,
        typer.Option(
            help="Chooses the best epoch: accuracy, f1, matthews, mse, pearson, exact_match, bleu, loss ...",
            show_default="accuracy; mse for numbers; f1 for entities, answers, several labels; bleu for translations",
        ),
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="End after so many epochs that were not better.", show_default="run all epochs"),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Also save the state every so many steps.", show_default="every epoch")
    ] = None


@dataclass(frozen=True)
class NewModel:
    """Sizes of a model that starts from random weights."""

    vocab_size: Annotated[int, typer.Option(min=10, help="Pieces of a new model's vocabulary, at most.")] = 8000
    vocab_kind: Annotated[
        str, typer.Option(help="unigram, or wordpiece, in which every Chinese character is a word.")
    ] = "unigram"
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of a new model.", show_default="4")] = None
    hidden_size: Annotated[int | None, typer.Option(min=1, help="Hidden size of a new model.", show_default="256")] = (
        None
    )
    groups: Annotated[
        int | None,
        typer.Option(min=1, help="Groups of layers with weights of their own.", show_default="1; 2 for translation"),
    ] = None
    decoder_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of a translator's decoder.", show_default="as --layers")
    ] = None
    decoder_groups: Annotated[
        int | None, typer.Option(min=1, help="The decoder's groups, as --groups.", show_default="2")
    ] = None
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of a new model.", show_default="4")] = None
    intermediate_size: Annotated[
        int | None, typer.Option(min=1, help="Intermediate size of a new model.", show_default="1024")
    ] = None
    embedding_size: Annotated[
        int | None, typer.Option(min=1, help="Embedding size of a new model.", show_default="128")
    ] = None
    dropout: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Dropout of a new model, in layers and attention.", show_default="0.1"),
    ] = None

    def config_fields(self) -> dict[str, Any]:
        """The fields of the configuration that were given."""
        sizes = {
            "num_hidden_layers": self.layers,
            "num_hidden_groups": self.groups,
            "num_decoder_layers": self.decoder_layers,
            "num_decoder_groups": self.decoder_groups,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "embedding_size": self.embedding_size,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
        }
        return {name: value for name, value in sizes.items() if value is not None}


@reports_errors
@options.expands_groups
def command(
    train_file: Annotated[Path, typer.Argument(metavar="TRAIN", help=options.EXAMPLES_HELP)],
    output_dir: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder for the best model, the log and the state.")
    ],
    *,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="classify, regress, multilabel, tag, answer, choose or translation.",
            show_default="told from TRAIN",
        ),
    ] = None,
    dev_file: Annotated[Path | None, typer.Option("--dev", help="A file like TRAIN; chooses the best epoch.")] = None,
    test_file: Annotated[
        Path | None, typer.Option("--test", help="A file like TRAIN; measured once, at the end.")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", help="Start from this checkpoint.", show_default="a new model")
    ] = None,
    pair_pooling: Annotated[
        str | None,
        typer.Option(
            help="aligned: a pair's representation without its [SEP] is pooled, and not [CLS]; cls.", show_default="cls"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUTPUT; the number of --epochs may change.")
    ] = False,
    columns: options.TableColumns,
    label_names: Annotated[
        str | None, typer.Option(help="Classes in order of their ids: negative,positive.", show_default="as in TRAIN")
    ] = None,
    recipe: RecipeOptions,
    new_model: NewModel,
    progress: Annotated[
        bool,
        typer.Option("--progress/--no-progress", help="A bar on a terminal, elsewhere a line now and then."),
    ] = True,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Train a model on labelled text, from scratch or from a checkpoint.

    classify: one class for each text or pair of texts. regress: a number. multilabel: any of several labels; a list in JSON lines,
    words separated by commas in other tables. tag: a tag for each word; TRAIN is a CoNLL file, or has lists of tokens and tags.
    answer: a span of a context for each question; TRAIN is SQuAD's JSON, or has question, context and answer; --text-column,
    --pair-column and --label-column name others. choose: one of several texts; TRAIN has text, choice0, choice1 ... and label,
    which is the number of the right choice from 0, or its text. translation: a text for each text; TRAIN is the names of two
    files with a comma between, of which line n of one belongs to line n of the other, or a table with source and target.

    OUTPUT is a checkpoint folder for classify, tag, answer, choose, translate, encode and transformers. Everything is checked
    before the first step. An interrupted run continues with --resume and the same options; a finished run continues with more
    --epochs.

    \b
    Examples:
      albert-fast train train.tsv my-model --dev dev.tsv
      albert-fast train train.csv my-model --init-from my-albert --epochs 5 --lr 2e-5
      albert-fast train train.conll my-tagger --dev dev.conll --init-from my-albert
      albert-fast train train.json my-answerer --dev dev.json --init-from my-albert --max-length 384
      albert-fast train train.jsonl my-model --dev dev.jsonl --pretrain-epochs 10 --layers 6
      albert-fast train train.en,train.de my-translator --dev val.en,val.de --epochs 20 --lr 1e-3 --label-smoothing 0.1
      albert-fast classify new.txt --model my-model
    """
    sizes = new_model.config_fields()
    if init_from is not None and sizes:
        raise UsageError(f"--init-from has its own sizes; leave out what sets {', '.join(sizes)}")
    from ..training import Recipe, fit

    options.set_threads(threads)
    config = _config(task, train_file, recipe, sizes) if sizes else None
    try:
        result = fit(
            train_file,
            output_dir,
            task=task,
            dev_file=dev_file,
            test_file=test_file,
            recipe=Recipe(**dataclasses.asdict(recipe)),
            config=config,
            vocab_size=new_model.vocab_size,
            vocab_kind=new_model.vocab_kind,
            init_from=init_from,
            pair_pooling=pair_pooling,
            label_names=None if label_names is None else label_names.split(","),
            resume=resume,
            device=device,
            progress=progress,
            report=warn,
            **columns.as_keywords(),
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_after_interrupt(str(interrupt), output_dir)) from None
    for record in result.history:
        sys.stdout.write(json.dumps(record) + "\n")
    best = "" if result.best_value is None else f", {result.metric} {result.best_value:.4f} on {dev_file}"
    sys.stdout.write(f"{output_dir}: the model of epoch {result.best_epoch}{best}\n")
    if result.test is not None:
        figures = {"examples": result.test.examples, "loss": result.test.loss, **result.test.metrics}
        sys.stdout.write(f"{test_file}: {json.dumps(figures)}\n")


def _config(task: str | None, train_file: Path, recipe: RecipeOptions, sizes: dict[str, Any]) -> Any:
    """The configuration of a new model with these sizes, as the task has it."""
    from ..training import small_config
    from ..training.tasks import aligned, task_named

    name = "translation" if task is None and aligned(train_file) is not None else task
    own = None if name is None else task_named(name).new_config(recipe.max_length, **sizes)
    if own is not None:
        return own
    if decoder := [name for name in sizes if "decoder" in name]:
        raise UsageError(f"--{decoder[0].removeprefix('num_').replace('_', '-')} is for --task translation")
    return small_config(recipe.max_length + recipe.position_shift).replace(**sizes)


def _after_interrupt(where: str, output_dir: Path) -> str:
    """Where the run was interrupted, and how it continues."""
    from ..training.checkpointing import STATE_NAME

    saved = (output_dir / STATE_NAME).exists()
    after = "the same command with --resume continues" if saved else "nothing was saved yet"
    return f"{f'interrupted {where}'.strip()}; {after}"
