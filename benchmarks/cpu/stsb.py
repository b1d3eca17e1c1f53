"""Measures what fewer bits do to sentence embeddings: Spearman's correlation on the STS benchmark's test set.

    python benchmarks/cpu/stsb.py [--side SIDE ...]

The real all-MiniLM-L6-v2 in sentence-transformers, with every engine of hosts.py as its encoder. Speed is not measured here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

import torch
from tabulate import tabulate

from cpu.hosts import BATCH_SIZE, Sentences, Texts, stsb_rows


def spearman(side: str) -> float:
    """100 times the rank correlation of cosine similarities and the test set's scores."""
    from scipy.stats import spearmanr

    rows = stsb_rows("test")
    texts = [text for one, other, _ in rows for text in (one, other)]
    model = Sentences("stsb", Texts("stsb", 1)).model(side, torch.get_num_threads())
    vectors = model.encode(texts, batch_size=BATCH_SIZE, normalize_embeddings=True)
    cosines = (vectors[::2] * vectors[1::2]).sum(1)
    return 100 * float(spearmanr(cosines, [score for *_, score in rows]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", nargs="+", default=Sentences.engines, help="default: every side")
    table = []
    for side in parser.parse_args().side:
        try:
            table.append([side, f"{spearman(side):.2f}"])
        except ImportError as error:
            table.append([side, f"not measured: {error}"])
    print(tabulate(table, ["side", "STS-B test, Spearman"], tablefmt="github"))


if __name__ == "__main__":
    main()
