"""Translators of short descriptions of pictures, from the raw files of Multi30k (Elliott et al. 2016) to BLEU and chrF.

    python -m albert_fast.recipes.multi30k DATA OUT [--pair en-de]

DATA holds {train,val,test_2016_flickr}.{en,de,fr}.gz. The same command continues where it stopped. In OUT: the translator, in a
folder with the name of the pair, and report.json with every figure, machine, versions, seed and seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.seq2seq_config import ALBERTSeq2SeqConfig
from ..tasks.translate import Translator
from ..text.aligned_files import read_aligned
from ..training.fit import fit
from ..training.metrics import translation_metrics
from ..training.recipe import Recipe
from .report import Report

TEST = "test_2016_flickr"


def new_model() -> ALBERTSeq2SeqConfig:
    """Sizes for 29,000 pairs of sentences: much dropout, and layers that share weights in twos."""
    return ALBERTSeq2SeqConfig(
        embedding_size=256,
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_hidden_groups=2,
        num_decoder_layers=4,
        num_decoder_groups=2,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=128,
    )


def training(epochs: int, seed: int) -> Recipe:
    """The recipe of every pair of languages."""
    return Recipe(
        epochs=epochs,
        batch_size=128,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        max_length=96,
        label_smoothing=0.1,
        ema_decay=0.995,
        seed=seed,
    )


def run(data: Path, output: Path, *, pair: str, epochs: int, seed: int) -> None:
    """Trains the translator of a pair such as "en-de" and measures it, unless that is done.

    Raises:
        OSError: a file is missing. Others as `fit` and `Report.stage`.
    """
    report, languages, folder = Report(output / "report.json"), pair.split("-"), output / pair
    train, val, test = (
        tuple(data / f"{part}.{language}.gz" for language in languages) for part in ("train", "val", TEST)
    )

    def trained() -> Any:
        options: dict[str, Any] = {"recipe": training(epochs, seed), "config": new_model(), "resume": True}
        return fit(train, folder, task="translation", dev_file=val, vocab_size=8000, **options).history

    def measured(beams: int) -> dict[str, float]:
        pairs = read_aligned(*test)
        written = Translator(folder).translate([source for source, _ in pairs], num_beams=beams)
        return translation_metrics(["bleu", "chrf"], [target for _, target in pairs], written)

    report.stage(f"{pair} trained", trained, epochs=epochs, seed=seed)
    for beams in (1, 4):
        report.stage(f"{pair} {TEST}, {beams} beam{'s' if beams > 1 else ''}", lambda beams=beams: measured(beams))  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m albert_fast.recipes.multi30k", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("data", type=Path, help="the folder with Multi30k's files")
    parser.add_argument("output", type=Path, help="the folder to write to; the same command continues in it")
    parser.add_argument("--pair", default="en-de", help="source and target language (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    run(options.data, options.output, pair=options.pair, epochs=options.epochs, seed=options.seed)


if __name__ == "__main__":
    main()
