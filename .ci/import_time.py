"""What `from albert_fast import ALBERTModel` costs beyond `import torch`: medians of interleaved fresh processes."""

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
    base = statistics.median(times[0] for times in rounds)
    for index, statement in enumerate(STATEMENTS):
        more = statistics.median(times[index] - times[0] for times in rounds)
        print(f"{statement}: {base + more:.2f} s" + (f", {more:+.2f} s beside torch alone" if index else ""))


if __name__ == "__main__":
    main()
