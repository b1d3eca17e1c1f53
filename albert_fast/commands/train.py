"""`albert-fast train`: the command line of `albert_fast.training.fit`.

The defaults repeat those of `albert_fast.training.Recipe`, which costs too much to import for a help text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as options
from ._errors import UsageError, reports_errors, warn


@reports_errors
def command(
    train_file: Annotated[
        Path, typer.Argument(metavar="TRAIN", help=".tsv, .csv or .jsonl, also as .gz: text and label.")
    ],
    output_dir: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder for the best model, the log and the state.")
    ],
    dev_file: Annotated[Path | None, typer.Option("--dev", help="Chooses the best epoch.")] = None,
    test_file: Annotated[Path | None, typer.Option("--test", help="Measured once, at the end.")] = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", help="Start from this checkpoint.", show_default="a new model")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUTPUT; --epochs may be another number than before.")
    ] = False,
    text_column: options.TextColumn = None,
    pair_column: options.PairColumn = None,
    label_column: options.LabelColumn = None,
    label_names: Annotated[
        str | None, typer.Option(help="Classes in order of their ids: negative,positive.", show_default="as in TRAIN")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 32,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", "--lr", min=0.0, help="The highest.", show_default="5e-5 with --init-from, else 5e-4"
        ),
    ] = None,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.01,
    warmup_ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps that warm up.")] = 0.06,
    max_grad_norm: Annotated[float, typer.Option(min=0.0)] = 1.0,
    max_length: Annotated[int, typer.Option(min=3, help="Cut texts to this many tokens.")] = 128,
    label_smoothing: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    piece_dropout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of tokens masked while training.")
    ] = 0.0,
    position_shift: Annotated[
        int, typer.Option(min=0, help="Training texts start at a random position up to this.")
    ] = 0,
    ema_decay: Annotated[float | None, typer.Option(help="Keep a running average of the weights.")] = None,
    pretrain_epochs: Annotated[int, typer.Option(min=0, help="Masked language modelling on TRAIN first.")] = 0,
    pretrain_batch_size: Annotated[int, typer.Option(min=1)] = 32,
    pretrain_learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    mask_probability: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.15,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Chooses the best epoch: accuracy, f1, matthews, mse, pearson, loss ...",
            show_default="accuracy; mse for numbers",
        ),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Save the state every so many steps too.", show_default="every epoch")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=10, help="New model: pieces of its vocabulary, at most.")] = 8000,
    layers: Annotated[int | None, typer.Option(min=1, help="New model.", show_default="4")] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, help="New model.", show_default="256")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="New model.", show_default="4")] = None,
    intermediate_size: Annotated[int | None, typer.Option(min=1, help="New model.", show_default="1024")] = None,
    embedding_size: Annotated[int | None, typer.Option(min=1, help="New model.", show_default="128")] = None,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="New model: in layers and attention.", show_default="0.1")
    ] = None,
    progress: Annotated[
        bool | None,
        typer.Option("--progress/--no-progress", help="Bars on standard error.", show_default="on a terminal"),
    ] = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Train a text classifier, or a regressor where labels are numbers, from scratch or from a checkpoint.

    OUTPUT is a checkpoint folder for classify, encode and transformers. A run that was stopped goes on with --resume
    and the same options; with more --epochs, a finished one does too. Everything is checked before the first step.

    \b
    Examples:
      albert-fast train train.tsv my-model --dev dev.tsv
      albert-fast train train.csv my-model --init-from my-albert --epochs 5 --lr 2e-5
      albert-fast train train.jsonl my-model --dev dev.jsonl --pretrain-epochs 10 --layers 6
      albert-fast classify new.txt --model my-model
    """
    sizes = {
        "num_hidden_layers": layers, "hidden_size": hidden_size, "num_attention_heads": heads,
        "intermediate_size": intermediate_size, "embedding_size": embedding_size,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
    }  # fmt: skip
    chosen = {name: value for name, value in sizes.items() if value is not None}
    if init_from is not None and chosen:
        raise UsageError(f"--init-from has its own sizes; leave out what sets {', '.join(chosen)}")
    from ..training import Recipe, fit, small_config

    options.set_threads(threads)
    bars = sys.stderr.isatty() if progress is None else progress
    columns: dict[str, Any] = {
        "text_column": options.column(text_column),
        "pair_column": options.column(pair_column),
        "label_column": options.column(label_column),
    }
    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay,
        warmup_ratio=warmup_ratio, max_grad_norm=max_grad_norm, max_length=max_length, label_smoothing=label_smoothing,
        piece_dropout=piece_dropout, position_shift=position_shift, ema_decay=ema_decay, pretrain_epochs=pretrain_epochs,
        pretrain_batch_size=pretrain_batch_size, pretrain_learning_rate=pretrain_learning_rate,
        mask_probability=mask_probability, metric=metric, seed=seed, checkpoint_steps=checkpoint_steps,
    )  # fmt: skip
    try:
        result = fit(
            train_file, output_dir, dev_file=dev_file, test_file=test_file, recipe=recipe,
            config=small_config(max_length + position_shift).replace(**chosen) if chosen else None, vocab_size=vocab_size,
            init_from=init_from, label_names=None if label_names is None else label_names.split(","), resume=resume,
            device=device, progress=bars, report=warn, **columns,
        )  # fmt: skip
    except KeyboardInterrupt as interrupt:
        from ..training.checkpointing import STATE_NAME

        saved = (output_dir / STATE_NAME).exists()
        after = "the same command with --resume continues" if saved else "nothing was saved yet"
        raise KeyboardInterrupt(f"{f'interrupted {interrupt}'.strip()}; {after}") from None
    for record in result.history:
        sys.stdout.write(json.dumps(record) + "\n")
    best = "" if result.best_value is None else f", {result.metric} {result.best_value:.4f} on {dev_file}"
    sys.stdout.write(f"{output_dir}: the model of epoch {result.best_epoch}{best}\n")
    if result.test is not None:
        figures = {"examples": result.test.examples, "loss": result.test.loss, **result.test.metrics}
        sys.stdout.write(f"{test_file}: {json.dumps(figures)}\n")
