"""Seven small tasks, each against a simple baseline, from raw files to a table of figures.

    python -m albert_fast.recipes.tasks DATA OUT --init-from PRETRAINED [--seeds 3] [--only trec stsb]

DATA holds the data sets that task_texts.py names; PRETRAINED is a small English ALBERT such as recipes/english.py makes. The
Chinese task starts from random weights. The same command continues where it stopped. In OUT: report.json with every figure,
machine, versions, seed and seconds, and table.md.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..models.config import ALBERTConfig
from ..runtime.files import replacing
from ..training.evaluate import evaluate
from ..training.fit import fit
from ..training.recipe import Recipe
from . import task_texts as texts
from .baselines import Baseline, cosine_of_words, known_entities, likest_sentence, linear_model, no_answer
from .report import Report


@dataclass(frozen=True)
class Experiment:
    """A data set, what a model is to do with it, and what it is compared with.

    Attributes:
        compared: what the baseline is, for the table.
        epochs, max_length, recipe: of `Recipe`.
        from_scratch: a vocabulary and weights of its own.
    """

    name: str
    title: str
    read: Callable[[Path], texts.Split]
    task: str
    metric: str
    compared: str
    baseline: Baseline
    epochs: int
    max_length: int = 64
    recipe: dict[str, Any] = field(default_factory=dict)
    from_scratch: bool = False


WORDS = "TF-IDF of words and pairs, logistic regression"
CHARACTERS = "TF-IDF of characters and pairs, logistic regression"
# fmt: off
EXPERIMENTS = (
    Experiment("trec", "TREC, 6 classes", texts.trec, "classify", "accuracy", WORDS, linear_model("accuracy"), 20),
    Experiment("cola", "CoLA, out of domain", texts.cola, "classify", "matthews", WORDS, linear_model("matthews"), 10),
    Experiment("stsb", "STS-B", texts.stsb, "regress", "spearman", "cosine of TF-IDF of words", cosine_of_words, 10, 96),
    Experiment("wnut17", "WNUT17", texts.wnut17, "tag", "f1", "entities of the training text", known_entities, 15, 96),
    Experiment("subjqa", "SubjQA, electronics", texts.subjqa, "answer", "f1", "no answer at all", no_answer, 4, 256),
    Experiment("xquad", "XQuAD, English", texts.xquad, "answer", "f1", "the likest sentence", likest_sentence, 20, 256),
    Experiment(
        "chnsenticorp", "ChnSentiCorp", texts.chnsenticorp, "classify", "accuracy", CHARACTERS,
        linear_model("accuracy", "char"), 8, 192, {"learning_rate": 1e-3, "ema_decay": 0.99}, from_scratch=True,
    ),
)
# fmt: on
# Twice the rate that `fit` takes for this width: the data sets are small.
LEARNING_RATE = 3e-4


def chinese_model() -> ALBERTConfig:
    """Sizes of the Chinese classifier: two layers that share nothing."""
    return ALBERTConfig(
        embedding_size=128,
        hidden_size=256,
        num_hidden_layers=2,
        num_hidden_groups=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=256,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        initializer_range=0.05,
    )


def train_and_test(experiment: Experiment, split: texts.Split, folder: Path, init_from: Path, seed: int) -> Any:
    """The figure of one run on the test set. The model is not kept: only figures are wanted."""
    settings: dict[str, Any] = {"learning_rate": LEARNING_RATE, **experiment.recipe}
    recipe = Recipe(epochs=experiment.epochs, max_length=experiment.max_length, seed=seed, **settings)
    start: dict[str, Any] = {"init_from": init_from}
    if experiment.from_scratch:
        start = {"config": chinese_model(), "vocab_kind": "wordpiece", "vocab_size": 6000}
    fit(split.train, folder, task=experiment.task, dev_file=split.dev, recipe=recipe, resume=True, **start)
    found = evaluate(folder, split.test, metrics=[experiment.metric])
    shutil.rmtree(folder)
    return found.metrics[experiment.metric]


def run(data: Path, output: Path, *, init_from: Path, seeds: int, only: Sequence[str] = ()) -> None:
    """Runs what is not done, one seed of every task after the other, and writes the table of what is.

    Raises:
        OSError: a data set is missing. Others as `fit` and `Report.stage`.
    """
    report = Report(output / "report.json")
    chosen = [one for one in EXPERIMENTS if not only or one.name in only]
    for seed in range(seeds):
        for one in chosen:
            split = one.read(data)
            report.stage(f"{one.name}, baseline", partial(one.baseline, split), rows=[len(part) for part in split])
            work = partial(train_and_test, one, split, output / f"{one.name}-{seed}", init_from, seed)
            report.stage(f"{one.name}, seed {seed}", work, epochs=one.epochs)
            with replacing(output / "table.md") as file:
                file.write(table(report).encode())


def table(report: Report) -> str:
    """What is done, as Markdown."""
    rows = ["| data set | metric | this library's small ALBERT | baseline | which is |", "|---|---|---|---|---|"]
    for one in EXPERIMENTS:
        stages = {name: stage["result"] for name, stage in report.stages.items() if name.startswith(f"{one.name}, ")}
        figures = [value for name, value in stages.items() if "seed" in name]
        if figures:
            spread = f" ± {stdev(figures):.3f}" if len(figures) > 1 else ""
            what = f"{mean(figures):.3f}{spread} ({len(figures)} seed{'s' * (len(figures) > 1)})"
            rows.append(
                f"| {one.title} | {one.metric} | {what} | {stages[f'{one.name}, baseline']:.3f} | {one.compared} |"
            )
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m albert_fast.recipes.tasks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("output", type=Path, help="the folder to write to; the same command continues in it")
    parser.add_argument("--init-from", type=Path, required=True, help="the pre-trained model of the English tasks")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each task (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=(), choices=[one.name for one in EXPERIMENTS])
    options = parser.parse_args(arguments)
    run(options.data, options.output, init_from=options.init_from, seeds=options.seeds, only=options.only)
    print((options.output / "table.md").read_text(), end="")


if __name__ == "__main__":
    main()
