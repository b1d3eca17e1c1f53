"""Embeds the lines of a file and finds the ones nearest to a query.

    python examples/search_sentences.py MODEL FILE "a query" [--top 5]

MODEL is a sentence-transformers folder, or a name on the hub such as sentence-transformers/all-MiniLM-L6-v2; any other
encoder's vectors are the means of its tokens. Neither transformers nor sentence-transformers is needed.
"""

import argparse
import sys
import time
from pathlib import Path

from albert_fast import TextEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("file", type=Path, help="text, one sentence on each line")
    parser.add_argument("query")
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()

    sentences = [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    encoder = TextEncoder(options.model)
    start = time.perf_counter()
    vectors = encoder.encode(sentences, normalize=True)  # (N, D), each of length 1: a product is a cosine
    seconds = time.perf_counter() - start
    print(f"{len(sentences)} sentences in {seconds:.2f} s, {len(sentences) / seconds:.0f} a second")
    scores = vectors @ encoder.encode([options.query], normalize=True)[0]
    for row in (-scores).argsort()[: options.top]:
        print(f"{scores[row]:.3f}  {sentences[row]}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:  # a missing file, an unsuitable model
        sys.exit(f"error: {error}")
