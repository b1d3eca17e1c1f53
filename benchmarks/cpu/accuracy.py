"""Measures what fewer bits do to a classifier's answers: accuracy and logits on a whole test set.

    python benchmarks/cpu/accuracy.py
    python benchmarks/cpu/accuracy.py --model DIR --data imdb --limit 2000 --output results.json
    python benchmarks/cpu/accuracy.py --encoder 16 --side albert_fast-int8-emulated --side albert_fast-fp8-emulated

Sides that end in `emulated` compute on the CPU what the GPU's kernels compute: their arithmetic, not their speed. Every
side reads the same tokens in the same padded batches and is compared with albert_fast in float32. Sides that
calibrate see the same texts of the training set. Speed is not measured here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

import torch
from shared import artifacts, engines, sides
from shared.models import PLBERT
from shared.shapes import Batch
from tabulate import tabulate
from torch import Tensor, nn

from albert_fast import ALBERTConfig, ALBERTForSequenceClassification, ALBERTModel
from albert_fast.checkpoints.saving import config_path
from albert_fast.checkpoints.weights import resolve, shipped_model
from albert_fast.inspect.info import describe
from albert_fast.runtime.dispatch import BackendUnavailableError
from albert_fast.testing import data_dir
from albert_fast.text.tokenizer import load_tokenizer
from albert_fast.training.data import read_examples
from albert_fast.training.metrics import confidence_interval

EXACT = sides.FAST
# bfloat16 is the yardstick of the GPU's kernels; these sides run only where --side names them.
_BF16 = f"{sides.FAST}-bf16"
_EMULATED = tuple(f"{sides.FAST}-{precision}-{sides.EMULATED}" for precision in (sides.INT8, sides.FP8))
# Side -> the modules that it needs beside torch.
SIDES: Mapping[str, tuple[str, ...]] = {
    EXACT: (),
    f"{sides.FAST}-{sides.INT16}": (),
    f"{sides.FAST}-{sides.INT8}": (),
    "onnxruntime-int8": ("transformers", "onnx", "onnxruntime"),
    "openvino": ("transformers", "onnx", "openvino"),
    "openvino-int8": ("transformers", "onnx", "openvino", "nncf"),
    _BF16: (),
    **dict.fromkeys(_EMULATED, ()),
}
_DEFAULT = [side for side in SIDES if side not in (_BF16, *_EMULATED)]
_SEED = 0
_OPSET = 17
Logits = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Source:
    """A labelled file and its columns (None: by their names, see `read_examples`)."""

    path: Path
    text_column: str | int | None = None
    label_column: str | int | None = None


def sources(options: argparse.Namespace) -> tuple[Source, Source]:
    """The sources of the test and of the calibration texts, for "sst2", "imdb" or a file (calibrated with SST-2 by default)."""
    folder, columns = data_dir(), (options.text_column, options.label_column)
    if options.data == "imdb":
        columns = (3, 0)
    test, train = {
        "sst2": (folder / "SST-2/test.tsv", folder / "SST-2/train.tsv"),
        "imdb": (folder / "aclImdb/test.tsv.gz", folder / "aclImdb/train.tsv.gz"),
    }.get(options.data, (Path(options.data), None))
    if options.calibration is not None or train is not None:
        return Source(test, *columns), Source(options.calibration or train, *columns)
    return Source(test, *columns), Source(folder / "SST-2/train.tsv")


@dataclass(frozen=True)
class Texts:
    """The test: batches sorted by length, labels (N,) in the same order, and training texts to calibrate with.

    calibration: (ids, mask), one text each, so that no padding takes part in any range.
    """

    batches: list[Batch]
    labels: Tensor
    calibration: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, folder: Path, config: ALBERTConfig, options: argparse.Namespace) -> Texts:
        """Reads the texts and tokenises them with the tokenizer in `folder`.

        Raises:
            FileNotFoundError, ValueError: a file that is not there, or whose labels are not the model's classes.
        """
        tokenizer = load_tokenizer(folder)

        def read(source: Source, limit: int | None) -> tuple[list[list[int]], list[Any]]:
            names = [config.label(i) for i in range(config.num_labels)]
            columns = {"text_column": source.text_column, "label_column": source.label_column}
            examples = read_examples(source.path, label_names=names, **columns)
            count = len(examples.texts)
            # Drawn at random: a file may be sorted by its labels.
            chosen = range(count) if limit is None else random.Random(_SEED).sample(range(count), min(limit, count))
            ids = tokenizer([examples.texts[i] for i in chosen], max_length=config.max_position_embeddings)["input_ids"]
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
            return [ids[i] for i in order], [examples.labels[chosen[i]] for i in order]

        test, train = sources(options)
        rows, labels = read(test, options.limit)
        parts = [rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size)]
        singles = (torch.tensor([row]) for row in read(train, options.calibration_texts)[0])
        return cls(
            [Batch.of(part, config.pad_token_id or 0, torch.device("cpu")) for part in parts],
            torch.tensor(labels),
            [(ids, torch.ones_like(ids)) for ids in singles],
        )


@dataclass
class Classifiers:
    """One checkpoint in every engine. `scratch` is a folder for files that are not kept."""

    folder: Path
    config: ALBERTConfig
    calibration: list[tuple[Tensor, Tensor]]
    threads: int
    scratch: Path

    def load(self, side: str) -> Logits:
        """A batch -> logits (B, C). BackendUnavailableError where albert_fast cannot run such a model here."""
        if sides.engine(side) == sides.FAST:
            return self._albert_fast(side)
        bind = engines.load(side, self._file(side), engines.Settings(self.threads))
        return lambda batch: torch.tensor(bind(batch.ids, batch.mask)())

    def _albert_fast(self, side: str) -> Logits:
        model = fast_model(ALBERTForSequenceClassification, self.folder, side, self.calibration)

        @torch.no_grad()
        def logits(batch: Batch) -> Tensor:
            found: Tensor = model(batch.ids, batch.mask).logits
            return found.float()

        return logits

    def _file(self, side: str) -> Path:
        """The file that an engine reads; for int8 the whole classifier is quantised, as the engine's users would do it."""
        if side == "onnxruntime-int8":
            return artifacts.quantize_onnx(artifacts.fuse(self._exported, self.config))
        ir = artifacts.openvino_ir(self._exported)
        return ir if sides.precision(side) == sides.FLOAT else artifacts.quantize_openvino(ir, self.calibration)

    @cached_property
    def _exported(self) -> Path:
        """The classifier as ONNX. Its folder's name holds the weights' hash, since files made from it are kept under that name."""
        from transformers import AlbertForSequenceClassification

        versions = map(importlib.metadata.version, ("torch", "transformers", "onnx"))
        place = self.scratch / "-".join([weights_hash(self.folder), "classifier", *versions])
        place.mkdir()
        model = AlbertForSequenceClassification.from_pretrained(self.folder, attn_implementation="eager")
        return export_logits(model, place / "model.onnx")


def fast_model(kind: Any, folder: Path, side: str, calibration: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Our model of class `kind` in the precision and backend of `side`."""
    precision = sides.precision(side)
    if precision in (sides.FLOAT, sides.BF16):
        return kind.from_pretrained(folder, precision="bf16" if precision == sides.BF16 else "fp32")
    backend = "reference" if side in _EMULATED else "auto"
    model = kind.from_pretrained(folder, precision=precision, calibration=calibration, backend=backend)
    return model.bfloat16() if side in _EMULATED else model


@torch.no_grad()
def encoder_errors(sequences: int, names: Sequence[str]) -> dict[str, Any]:
    """Errors of our sides' hidden states of the real encoder against float32: the norm of all errors over that of all states,
    and the largest. Calibrated on half as many sequences. Prints a table."""
    encoder = PLBERT()
    folder = data_dir() / "plbert"
    batch = Batch.of(encoder.rows(str(sequences)), encoder.config.pad_token_id or 0, torch.device("cpu"))
    calibration = [
        (ids, torch.ones_like(ids))
        for ids in map(torch.tensor, ([row] for row in encoder.calibration(max(1, sequences // 2))))
    ]
    found: dict[str, dict[str, float]] = {}
    exact: Tensor | None = None
    for name in dict.fromkeys((EXACT, *names)):
        if sides.engine(name) != sides.FAST:
            continue
        model = fast_model(ALBERTModel, folder, name, calibration)
        states = batch.real(model(batch.ids, batch.mask).last_hidden_state).double()
        exact = states if exact is None else exact
        errors = (states - exact).abs()
        relative = float(errors.norm() / exact.norm())
        found[name] = {"relative_error": relative, "max_abs_error": float(errors.max())}
        print(name, found[name], file=sys.stderr, flush=True)
    body = [[name, f"{e['relative_error']:.4f}", f"{e['max_abs_error']:.2f}"] for name, e in found.items()]
    head = ["side", "relative error", "largest error"]
    title = f"plbert, hidden states of {sequences} sequences, {sum(batch.lengths)} tokens"
    print(f"\n{title}\n\n{tabulate(body, head, tablefmt='github', disable_numparse=True)}", flush=True)
    return {"sequences": sequences, "calibration_sequences": len(calibration), "sides": found}


class _LogitsOf(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, attention_mask=attention_mask).logits
        return logits


def export_logits(model: nn.Module, path: Path) -> Path:
    """`artifacts.export` for a classifier: logits (B, C), batch and length left open."""
    ids = torch.full((2, 8), 5)
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's; a wrong trace shows in the row of OpenVINO's float32
        torch.onnx.export(
            _LogitsOf(model).eval(),
            (ids, torch.ones_like(ids)),
            path,
            input_names=names,
            output_names=["logits"],
            dynamic_axes={"logits": {0: "batch"}, **{name: {0: "batch", 1: "sequence"} for name in names}},
            opset_version=_OPSET,
            dynamo=False,
        )
    artifacts.share_initializers(path)
    return path


def weights_hash(folder: Path) -> str:
    """The first digits of a hash of the checkpoint, which tells whose figures they are."""
    digest = hashlib.sha256()
    weights = (path for pattern in ("*.safetensors", "*.bin") for path in sorted(folder.glob(pattern)))
    for path in (config_path(folder), *weights):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """A side's figures; errors are those of its logits against the float32 ones, points are percentage points.

    changed: texts that get another label than in float32; gained, lost: those of them that became right, wrong.
    relative_error: the L2 norm of all errors over that of all logits.
    """

    side: str
    accuracy: float
    interval_95: tuple[float, float]
    difference_points: float
    changed: int
    gained: int
    lost: int
    mean_abs_error: float
    max_abs_error: float
    relative_error: float

    @classmethod
    def of(cls, side: str, logits: Tensor, exact: Tensor, labels: Tensor) -> Row:
        """logits, exact (N, C), labels (N,). ValueError: logits that are not finite."""
        if not logits.isfinite().all():
            raise ValueError(f"{side}: logits that are not finite")
        right, was_right = logits.argmax(1) == labels, exact.argmax(1) == labels
        errors = (logits.double() - exact.double()).abs()
        correct, before = int(right.sum()), int(was_right.sum())
        return cls(
            side=side,
            accuracy=correct / len(labels),
            interval_95=confidence_interval(correct, len(labels)),
            difference_points=100 * (correct - before) / len(labels),
            changed=int((logits.argmax(1) != exact.argmax(1)).sum()),
            gained=int((right & ~was_right).sum()),
            lost=int((~right & was_right).sum()),
            mean_abs_error=float(errors.mean()),
            max_abs_error=float(errors.max()),
            relative_error=float(errors.norm() / exact.double().norm()),
        )


def evaluate(models: Classifiers, texts: Texts, names: Sequence[str]) -> Iterator[Row | tuple[str, str]]:
    """A row for each side, float32 first, as soon as it is known; (side, reason) for one that cannot run here."""
    exact: Tensor | None = None
    for name in dict.fromkeys((EXACT, *names)):
        missing = [module for module in SIDES[name] if importlib.util.find_spec(module) is None]
        if missing:
            yield name, f"{' and '.join(missing)} not installed: pip install 'albert-fast[bench]'"
            continue
        try:
            with redirect_stdout(sys.stderr):  # NNCF's progress bars
                logits_of = models.load(name)
        except BackendUnavailableError as error:
            yield name, str(error)
            continue
        logits = torch.cat([logits_of(batch) for batch in texts.batches])
        exact = logits if exact is None else exact
        yield Row.of(name, logits, exact, texts.labels)


def table(rows: Sequence[Row], unavailable: Mapping[str, str]) -> str:
    """The rows in markdown, and a line for every side that could not run."""
    head = ["side", "accuracy", "difference", "changed", "mean error", "largest error", "relative error"]
    body = [
        [
            row.side,
            f"{100 * row.accuracy:.2f} %",
            f"{row.difference_points:+.2f}",
            f"{row.changed} (+{row.gained} -{row.lost})",
            *(f"{error:.1e}" for error in (row.mean_abs_error, row.max_abs_error, row.relative_error)),
        ]
        for row in rows
    ]
    lines = [str(tabulate(body, head, tablefmt="github", disable_numparse=True))]
    return "\n".join([*lines, *(f"{side}: not measured: {reason}" for side, reason in unavailable.items())])


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one checkpoint, prints its table and returns what goes into the JSON."""
    config = ALBERTConfig.from_json_file(config_path(folder))
    texts = Texts.of(folder, config, options)
    rows: list[Row] = []
    unavailable: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = Classifiers(folder, config, texts.calibration, torch.get_num_threads(), Path(scratch))
        for result in evaluate(models, texts, options.side or _DEFAULT):
            print(result, file=sys.stderr, flush=True)  # making the engines' files may take minutes
            if isinstance(result, Row):
                rows.append(result)
            else:
                unavailable[result[0]] = result[1]
    data = "/".join(sources(options)[0].path.parts[-2:])
    print(f"\n{folder.name}, {len(texts.labels)} texts of {data}\n\n{table(rows, unavailable)}", flush=True)
    return {
        "model": folder.name,
        "checkpoint_sha256": weights_hash(folder),
        "config": config.to_dict(),
        "data": data,
        "texts": len(texts.labels),
        "calibration_texts": len(texts.calibration),
        "batch_size": options.batch_size,
        "rows": [asdict(row) for row in rows],
        "unavailable": unavailable,
    }


def _column(name: str) -> str | int:
    return int(name) if name.isdigit() else name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a classifier beside the shipped one; repeatable")
    parser.add_argument("--data", default="sst2", help="sst2, imdb or a labelled file (default: %(default)s)")
    parser.add_argument("--text-column", type=_column, help="of a file: name, or number from 0 without a header")
    parser.add_argument("--label-column", type=_column, help="the same for the labels")
    parser.add_argument("--limit", type=int, help="at most so many texts, drawn at random")
    parser.add_argument(
        "--calibration", type=Path, help="training texts, columns as in --data (default: imdb's for imdb, else sst2's)"
    )
    parser.add_argument("--calibration-texts", type=int, default=300, help="so many of them (default: %(default)s)")
    parser.add_argument(
        "--side", action="append", choices=SIDES, help="beside float32; repeatable (default: all that are not emulated)"
    )
    parser.add_argument("--encoder", type=int, metavar="N", help="hidden states of N sequences of plbert, too")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, help="of every side (default: torch's)")
    parser.add_argument("--output", type=Path, help="JSON: the machine and all figures")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if any(side in _EMULATED for side in options.side or ()):
        print(f"{sides.EMULATED}: on a CPU, the arithmetic of the GPU kernels, not their speed")
    encoder = None if options.encoder is None else encoder_errors(options.encoder, options.side or _DEFAULT)
    measured = [run(folder, options) for folder in (shipped_model(), *map(resolve, options.model))]
    if options.output is not None:
        options.output.write_text(
            json.dumps({"machine": describe(), "encoder": encoder, "runs": measured}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
