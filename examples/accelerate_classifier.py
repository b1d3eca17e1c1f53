"""Accelerates a text classifier of transformers with one line, and shows that the answers are the same.

    python examples/accelerate_classifier.py [MODEL]

MODEL is any ALBERT, BERT, RoBERTa, DistilBERT or ELECTRA classifier: a folder or a name on the hub; default: the small ALBERT
that this package ships. Needs transformers.
"""

import sys
import time

from transformers import pipeline

import albert_fast
from albert_fast.weights import shipped_model

TEXTS = ["A quiet, generous film.", "What a mess.", "It is long, and it earns every minute of its length."] * 20


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(shipped_model())
    classify = pipeline("text-classification", model=model, device="cpu")

    def timed() -> tuple[list[dict], float]:
        classify(TEXTS[:3])  # the first call packs weights
        start = time.perf_counter()
        return classify(TEXTS, batch_size=32), time.perf_counter() - start

    before, slow = timed()
    albert_fast.accelerate(classify)
    after, fast = timed()
    largest = max(abs(one["score"] - other["score"]) for one, other in zip(before, after, strict=True))
    assert [one["label"] for one in before] == [one["label"] for one in after]
    print(f"{len(TEXTS)} texts: {slow:.3f} s before, {fast:.3f} s after; scores differ by at most {largest:.0e}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:  # a missing file, an unsuitable model
        sys.exit(f"error: {error}")
