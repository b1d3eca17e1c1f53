"""Times two installations of this package in turns: what a change costs or gains.

    python benchmarks/cpu/compare_commits.py OLD/.venv/bin/python NEW/.venv/bin/python [--rounds 9]

Each argument is the Python of an environment with one commit installed. Both run as processes that wait for each other: every
round times each shape once in each, so that a slow moment of the machine slows both. The table has the median of each side in
milliseconds and the median of the rounds' ratios, old by new: above 1 the new one is faster. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

import torch
from shared.workers import Worker, serve

BASE = {"vocab_size": 30000, "embedding_size": 128, "hidden_size": 768, "num_attention_heads": 12,
        "intermediate_size": 3072, "num_hidden_layers": 12}  # fmt: skip
TINY = {"vocab_size": 100, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
        "num_hidden_layers": 2}  # fmt: skip
# Name -> configuration, lengths of the sequences, calls in a sample. The 32 lengths are those of sentences of SST-2.
REAL = [
    9,
    27,
    14,
    31,
    5,
    22,
    40,
    18,
    12,
    25,
    33,
    8,
    19,
    28,
    11,
    47,
    23,
    16,
    7,
    30,
    21,
    36,
    13,
    26,
    10,
    29,
    17,
    24,
    38,
    6,
    20,
    15,
]
SHAPES = {
    "tiny 1 x 8 (overhead of a call)": (TINY, [8], 200),
    "1 x 16": (BASE, [16], 20),
    "1 x 128": (BASE, [128], 5),
    "8 x 128": (BASE, [128] * 8, 1),
    "32 real lengths": (BASE, REAL, 1),
}
STEP = "training step, 8 x 64"


def timer() -> Callable[[str], float]:
    """The timed side: a function from a shape's name to milliseconds a call."""
    from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTModel

    torch.manual_seed(0)
    models = {id(sizes): ALBERTModel(ALBERTConfig(**sizes)).eval() for sizes in (TINY, BASE)}
    trained = ALBERTForMaskedLM(ALBERTConfig(**BASE)).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)

    def step() -> float:
        ids = torch.randint(5, 30000, (8, 64))
        started = time.perf_counter()
        trained(ids, labels=ids.masked_fill(ids % 7 != 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1e3 * (time.perf_counter() - started)

    def timed(name: str) -> float:
        if name == STEP:
            return step()
        sizes, lengths, calls = SHAPES[name]
        model, lengths = models[id(sizes)], torch.tensor(lengths)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(5, 100, mask.shape)
        with torch.inference_mode():
            started = time.perf_counter()
            for _ in range(calls):
                model(ids, mask)
        return 1e3 * (time.perf_counter() - started) / calls

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("python", nargs="*", help="the old environment's Python, then the new one's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write every sample here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(timer())
        return
    if len(options.python) != 2:
        parser.error("name two Pythons: the old environment's and the new one's")
    sides = [Worker(python, Path(__file__), "--serve") for python in options.python]
    samples: dict[str, list[list[float]]] = {}
    for name in (*SHAPES, STEP):
        for side in sides:
            side.ask(name=name)  # packs weights
        samples[name] = [[side.ask(name=name) for side in sides] for _ in range(options.rounds)]
    for side in sides:
        side.close()
    print(f"{'':34}{'old ms':>10}{'new ms':>10}{'old / new':>11}")
    for name, rounds in samples.items():
        old, new = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        print(f"{name:34}{old:10.2f}{new:10.2f}{ratio:11.3f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(samples, file, indent=1)


if __name__ == "__main__":
    main()
