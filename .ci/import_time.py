"""Measures how much longer `from albert_fast import ALBERTModel` takes than `import torch`, in fresh, interleaved processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

STATEMENTS = ("import torch", "import albert_fast", "from albert_fast import ALBERTModel")
ROUNDS = 7


def seconds(statement: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    for statement in STATEMENTS:  # files into the page cache, bytecode onto the disk
        seconds(statement)
    rounds = [[seconds(statement) for statement in STATEMENTS] for _ in range(ROUNDS)]
    torch_alone = statistics.median(times[0] for times in rounds)
    print(f"import torch: {torch_alone:.2f} s")
    for index, statement in enumerate(STATEMENTS[1:], start=1):
        whole = statistics.median(times[index] for times in rounds)
        more = statistics.median(times[index] - times[0] for times in rounds)
        print(f"{statement}: {whole:.2f} s, {more:+.2f} s against import torch")


if __name__ == "__main__":
    main()
