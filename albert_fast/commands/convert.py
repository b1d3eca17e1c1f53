"""`albert-fast convert`: a TensorFlow checkpoint of Google's ALBERT or BERT, in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import reports_errors


@reports_errors
def command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a release, or a prefix such as model.ckpt-best.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="albert_config.json or bert_config.json.")
    ] = None,
    vocab: Annotated[
        Path | None, typer.Option("--vocab", metavar="FILE", help="Vocabulary: 30k-clean.model, vocab.txt.")
    ] = None,
    lower_case: Annotated[
        bool | None,
        typer.Option(
            "--lower-case/--keep-case",
            help="Whether the tokenizer lower-cases; without either it does unless vocab.txt has capitals.",
            show_default=False,
        ),
    ] = None,
    hidden_act: Annotated[
        str | None,
        typer.Option(
            "--hidden-act",
            metavar="NAME",
            help="The activation, instead of the configuration's: gelu_new for a BERT trained with gelu's tanh form.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert a TensorFlow checkpoint of Google's ALBERT (v1, v2, Chinese) or BERT to Hugging Face's layout.

    The configuration and the vocabulary are looked for beside the checkpoint. OUT gets all weights, heads as well, the
    configuration and the vocabulary; it appears when it is complete. This library and transformers load it. It needs
    TensorFlow: pip install 'albert-fast[tensorflow]'.

    \b
    Examples:
      albert-fast convert albert_base_v2 albert-base
      albert-fast convert run/model.ckpt-125000 my-albert --config albert_config.json --vocab 30k-clean.model
    """
    from ..tasks.convert import convert_checkpoint

    done = convert_checkpoint(
        checkpoint,
        output,
        config=config,
        vocab=vocab,
        lower_case=lower_case,
        hidden_act=hidden_act,
        overwrite=overwrite,
    )
    vocabulary = "no vocabulary" if done.vocabulary is None else f"vocabulary from {done.vocabulary}"
    typer.echo(f"{output}: {done.class_name}, {done.weights:,} weights, {vocabulary}")
