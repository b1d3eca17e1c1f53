"""Sorts passages by how well they answer a query, with a cross-encoder.

    python examples/rerank.py MODEL "a query" FILE [--top 3]

MODEL is a folder or a name on the hub, such as cross-encoder/ms-marco-MiniLM-L6-v2. Neither transformers nor
sentence-transformers is needed.
"""

import argparse
import sys
from pathlib import Path

from albert_fast import TextScorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("query")
    parser.add_argument("file", type=Path, help="text, one passage on each line")
    parser.add_argument("--top", type=int, default=3)
    options = parser.parse_args()

    passages = [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row, score in TextScorer(options.model).rank(options.query, passages, top_k=options.top):
        print(f"{score:.3f}  {passages[row]}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:  # a missing file, an unsuitable model
        sys.exit(f"error: {error}")
