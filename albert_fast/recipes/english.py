"""A small English ALBERT, from raw files to figures: pre-trained, then fine-tuned to tell good opinions from bad ones.

    python -m albert_fast.recipes.english DATA OUT [--opinions FILE]

DATA holds the data sets that english_texts.py names. Each stage continues where it stopped, so the same command goes on after an
interruption.

| in OUT | what |
|---|---|
| texts/, opinions/ | what is read, in plain files |
| pretrained/ | the pre-trained model; its log.jsonl and curves.png show masked and order accuracy on held-out documents |
| opinions-model/ | the classifier of opinions, the best epoch on the dev set |
| report.json | every figure, with machine, versions, seed and seconds |

The only teachers are the text and the labels of SST-2 and of the Large Movie Review Dataset's training reviews. The linear model
that the classifier is compared with learns from the same lines, and its settings are chosen on the same dev set.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..training.evaluate import evaluate
from ..training.fit import fit
from ..training.pretrain import pretrain
from ..training.pretrain_config import DataConfig, OptimizerConfig, PretrainConfig, VocabularyConfig
from ..training.recipe import Recipe
from ..training.sources import rows_of
from .baselines import LinearModel
from .english_texts import write_documents, write_opinions
from .report import Report

# 4.4 million weights, 18 MB: layers that differ cost memory and no time, so a small model does not share them.
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_hidden_groups": 3,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "embedding_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}


# A few thousand steps are all that two cores have time for, so they are small ones.
BATCH_TOKENS = 4096


def pretraining(files: Sequence[Path], output: Path, steps: int, seed: int) -> PretrainConfig:
    """The run that makes pretrained/."""
    return PretrainConfig(
        output=str(output),
        data=DataConfig(files=[str(file) for file in files], documents="lines", max_length=256, mask_probability=0.2),
        vocabulary=VocabularyConfig(size=14_000, lines=400_000),
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.01),
        start="counts",
        steps=steps,
        batch_tokens=BATCH_TOKENS,
        save_steps=400,
        evaluate_steps=500,
        log_steps=50,
        evaluation_tokens=100_000,
        seed=seed,
    )


def fine_tuning(seed: int) -> Recipe:
    """The recipe that makes opinions-model/."""
    return Recipe(
        epochs=3,
        batch_size=32,
        learning_rate=3e-4,
        max_length=512,
        label_smoothing=0.05,
        ema_decay=0.998,
        checkpoint_steps=500,
        seed=seed,
    )


def run(data: Path, output: Path, *, steps: int, seed: int, opinions: Path | None) -> None:
    """Runs every stage that is not done.

    Args:
        opinions: a TSV file with the columns text, label (positive or negative) and form, by which accuracy is told apart.

    Raises:
        OSError: a data set is missing. Others as `pretrain`, `fit` and `Report.stage`.
    """
    report = Report(output / "report.json")
    documents = write_documents(data, output / "texts")
    files = write_opinions(data, output / "opinions")
    pretrained, classifier = output / "pretrained", output / "opinions-model"
    config = pretraining(documents, pretrained, steps, seed)
    report.stage("pretrained", lambda: pretrain(config, resume=True).figures, steps=steps, seed=seed)

    def fine_tuned() -> Any:
        names = ["negative", "positive"]
        given: dict[str, Any] = {"init_from": pretrained, "label_names": names, "recipe": fine_tuning(seed)}
        return fit(files["train"], classifier, dev_file=files["dev"], resume=True, **given).history

    report.stage("fine-tuned", fine_tuned, seed=seed)
    for test in ("sst2", "imdb"):
        report.stage(test, partial(_figures, classifier, files[test]))
    report.stage("linear model", partial(_linear, files, opinions))
    if opinions is not None:
        report.stage("opinions", lambda: _by_form(classifier, opinions))


def _figures(model: Path, file: Path) -> dict[str, Any]:
    found = evaluate(model, file, metrics=["accuracy"])
    return {"examples": found.examples, **found.metrics, "interval_95": found.interval}


def _linear(files: dict[str, Path], opinions: Path | None) -> dict[str, Any]:
    """Accuracies of TF-IDF of words and pairs with logistic regression, fitted to the lines that the classifier learnt from."""
    tests = {"sst2": files["sst2"], "imdb": files["imdb"]} | ({} if opinions is None else {"opinions": opinions})
    train, dev = ([row for _, row in rows_of(files[part])] for part in ("train", "dev"))
    model = LinearModel(train, dev, "accuracy", strengths=(3.0, 10.0, 30.0))
    accuracies = {name: model.measured([row for _, row in rows_of(file)]) for name, file in tests.items()}
    return accuracies | model.settings


def _by_form(model: Path, file: Path) -> dict[str, Any]:
    found = evaluate(model, file, text_column="text", label_column="label", metrics=["accuracy"])
    forms = [values["form"] for _, values in rows_of(file)]
    right = Counter(form for form, a, b in zip(forms, found.expected, found.predicted, strict=True) if a == b)
    return {"all": found.metrics["accuracy"]} | {form: f"{right[form]} of {n}" for form, n in Counter(forms).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m albert_fast.recipes.english", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("output", type=Path, help="the folder to write to; the same command continues in it")
    parser.add_argument(
        "--steps",
        type=int,
        default=6000,
        help=f"of pre-training, {BATCH_TOKENS:,} tokens each (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opinions", type=Path, help="a TSV file with text, label and form: more opinions to test on")
    options = parser.parse_args(arguments)
    run(options.data, options.output, steps=options.steps, seed=options.seed, opinions=options.opinions)


if __name__ == "__main__":
    main()
