"""`albert-fast demo`: checks that this installation gives the right answers, and shows how fast."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options as options
from ._compare import check_floats, compare, plain_model, table, transformers_model
from ._errors import UsageError, reports_errors
from ._lines import Lines, given_text

if TYPE_CHECKING:
    import torch

    from ..tasks.classify import TextClassifier

SENTENCES = (
    "A generous, quietly funny film that earns every one of its tears.",
    "The plot makes no sense and the jokes land with a thud.",
    "I went in expecting little and came out humming the songs.",
    "Two hours of talented people wasting each other's time.",
    "The first half drags, but the last scene is worth the wait.",
    "Not good, not bad, just there.",
)
# Largest difference of float32 logits, relative to the largest logit, that another order of rounding explains.
TOLERANCE = 1e-4


@reports_errors
def command(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Sentences to label.", show_default="built-in ones")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="Sentences, one a line; - is standard input.")
    ] = None,
    model: options.ClassifierModel = None,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Compare numbers and speed.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of the comparison.")] = 7,
    backend: options.Backend = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Check this installation: label a few sentences, then compare numbers and speed with transformers.

    The comparison is with transformers' model in float32, with scaled dot-product attention; without transformers,
    with this package's plain PyTorch reference. Exit code 1 if the numbers differ by more than rounding.

    \b
    Examples:
      albert-fast demo
      albert-fast demo "What a mess." "What a joy."
      albert-fast demo --file sentences.txt --no-bench
    """
    if texts and file is not None:
        raise UsageError("give sentences or --file, not both")
    given = [given_text(text, f"text {position}") for position, text in enumerate(texts or SENTENCES, 1)]
    sentences = given if file is None else _read(file)
    from ..tasks.classify import TextClassifier, best_label

    options.set_threads(threads)
    classifier = TextClassifier(model, backend=backend, device=device)
    if bench:
        check_floats(classifier.folder)
    answers = classifier(sentences)
    rows = [
        (text, best_label(answer), *(f"{answer[label]:.3f}" for label in classifier.labels))
        for text, answer in zip(sentences, answers, strict=True)
    ]
    sys.stdout.write(table(("sentence", "label", *classifier.labels), rows) + "\n")
    sys.stdout.flush()
    if bench:
        _bench(classifier, sentences, rounds)


def _read(file: str) -> list[str]:
    with Lines(file) as lines:
        sentences = [record.text for record in lines.window(1000, patience=None)]
    if not sentences:
        raise ValueError(f"{lines.name} holds no sentence")
    return sentences


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**batch).logits
    return logits


def _peer(classifier: TextClassifier) -> tuple[str, str, Any]:
    """The model to compare with, on the classifier's weights: (short name, description, model)."""
    plain = plain_model(classifier.folder, "ForSequenceClassification", device=classifier.device)
    try:
        theirs = transformers_model(plain, "ForSequenceClassification")
    except ImportError:
        what = "this library's plain PyTorch reference (pip install transformers to compare with it)"
        return "reference", what, plain
    return "transformers", f"transformers' {type(theirs).__name__} (sdpa)", theirs.to(classifier.device)


def _machine(device: torch.device) -> str:
    """Processor, threads and versions, in one line."""
    import torch

    from ..inspect.info import describe

    found = describe()
    libraries = {"albert_fast": found["albert_fast"], "Python": found["python"]}
    libraries |= {name: found["libraries"][name] for name in ("torch", "transformers")}
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items() if version is not None)
    threads = torch.get_num_threads()
    processor = f"{found['cpu']['model']}, {threads} thread{'s' * (threads != 1)}"
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return f"{processor}; {versions}"


def _bench(classifier: TextClassifier, sentences: list[str], rounds: int) -> None:
    import torch

    device = classifier.device
    name, what, peer = _peer(classifier)
    many = (sentences * 32)[:32]
    rows, worst = [], 0.0
    for size, texts in (("1 sentence", sentences[:1]), ("32 sentences", many)):
        batch = classifier.tokenizer(texts, max_length=classifier.max_length, return_tensors="pt")
        left_out = () if classifier.takes_types else ("token_type_ids",)
        batch = {key: value.to(device) for key, value in batch.items() if key not in left_out}
        with torch.inference_mode():
            expected = peer(**batch).logits
        sides = {name: partial(_logits, peer, batch), "albert_fast": partial(_logits, classifier.model, batch)}
        theirs, ours = compare(sides, expected, rounds, device)
        worst = max(worst, ours.relative_error)
        times = (f"{theirs.seconds * 1e3:.2f}", f"{ours.seconds * 1e3:.2f}")
        rows.append((size, *times, f"{ours.speedup:.2f}x", f"{ours.error:.1e}"))
    header = ("float32", f"{name} ms", "albert_fast ms", "speed-up", "largest difference")
    sys.stdout.write(f"\n{table(header, rows)}\n\n{_machine(device)}\n")
    if not worst <= TOLERANCE:  # a NaN fails too
        raise RuntimeError(
            f"the logits differ from those of {what} by {worst:.1e} of their size, more than rounding explains "
            f"({TOLERANCE:.0e}); `albert-fast info` shows what ran"
        )
    sys.stdout.write(f"Same answers as {what}, within {worst:.0e} of the largest logit.\n")
