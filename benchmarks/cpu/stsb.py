"""Measures what fewer bits do to sentence embeddings: Spearman's correlation on the STS benchmark's test set.

    python benchmarks/cpu/stsb.py [--side SIDE ...] [--peer-python PYTHON ...] [--output FILE.md]

The real all-MiniLM-L6-v2 in sentence-transformers, with every engine of hosts.py as its encoder, and the libraries of
peer_sides.py. What is calibrated sees 128 sentences of the training set. Speed is not measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

import torch
from report import machine_table
from shared import sides
from tabulate import tabulate

from albert_fast.inspect.info import describe
from cpu import peer_sides
from cpu.hosts import BATCH_SIZE, Sentences
from cpu.texts import Texts, stsb_rows

_UNCALIBRATED = (f"{sides.FAST}-{sides.INT16}-uncalibrated", f"{sides.FAST}-{sides.INT8}-uncalibrated")
SIDES = (*Sentences.engines, *_UNCALIBRATED)
EXACT = "hf"


@dataclass(frozen=True)
class Embedder:
    """The model on one side after another."""

    pythons: Sequence[str]
    threads: int
    host: Sentences

    def embed(self, side: str, texts: Sequence[str]) -> torch.Tensor:
        """Vectors (N, D) of length 1.

        Raises:
            ImportError: a module is missing. RuntimeError: no environment has the library, or it failed.
        """
        if side in peer_sides.EMBEDDERS:
            arguments = (self.host.folder(), texts, self.host.calibration(), self.threads)
            peer = peer_sides.PeerCall(side, self.pythons, *arguments)
            try:
                vectors = peer().answer()
            finally:
                peer.close()
        else:
            model = self.host.model(side, self.threads)
            vectors = torch.as_tensor(model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False)).float()
        return torch.nn.functional.normalize(vectors)


def spearman(vectors: torch.Tensor, scores: Sequence[float]) -> float:
    """100 times the rank correlation of the cosines of neighbouring vectors with `scores`."""
    from scipy.stats import spearmanr

    return 100 * float(spearmanr((vectors[::2] * vectors[1::2]).sum(1), scores).statistic)


def table(names: Sequence[str], embedder: Embedder) -> str:
    """One line a side: Spearman, its difference to float32, the relative error of the vectors; versions elsewhere."""
    rows = stsb_rows("test")
    texts = [text for one, other, _ in rows for text in (one, other)]
    scores = [score for *_, score in rows]
    exact = embedder.embed(EXACT, texts)
    reference = spearman(exact, scores)
    body, environments = [], []
    for side in names:
        print(side, file=sys.stderr, flush=True)
        try:
            vectors = exact if side == EXACT else embedder.embed(side, texts)
        except (ImportError, RuntimeError) as error:
            body.append([side, str(error).strip().splitlines()[-1]])
            continue
        found = spearman(vectors, scores)
        difference = round(found - reference, 2) + 0.0  # never -0.00
        error = float((vectors - exact).norm() / exact.norm())
        body.append([side, f"{found:.2f}", f"{difference:+.2f}", f"{error:.1e}"])
        if versions := peer_sides.version_text(side, embedder.pythons):
            environments.append([side, versions])
    heads = ["side", "Spearman x 100", "difference to float32", "relative error of the vectors"], ["side", "ran with"]
    tables = zip((body, environments), heads, strict=True)
    return "\n\n".join(tabulate(rows, head, tablefmt="github", disable_numparse=True) for rows, head in tables if rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", nargs="+", default=SIDES, help="default: every side")
    parser.add_argument("--peer-python", action="append", default=[], help="as for pytest (README.md)")
    parser.add_argument("--output", type=Path, help="also write the table, the machine and the versions here")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    found = table(options.side, Embedder(options.peer_python, threads, Sentences("stsb", Texts("stsb", 1))))
    print(found)
    if options.output:
        title = "# Sentence embeddings with fewer bits"
        about = (
            "all-MiniLM-L6-v2 on the test set of the STS benchmark: 1,379 pairs of sentences. "
            "What is calibrated saw 128 sentences\nof the training set; `uncalibrated` saw none of them, "
            "and dynamic int8 (`onnxruntime-int8`, `st-onnx-int8`) needs none.\n"
            "`python benchmarks/cpu/stsb.py` makes this page; `benchmarks/README.md` says what a side is."
        )
        machine = machine_table({"albert_fast": describe()}, threads)
        options.output.write_text("\n\n".join([title, about, machine, found]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
