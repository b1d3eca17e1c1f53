"""Loads one engine in a process of its own and prints the seconds and the MiB of resident memory as JSON.

`python load_engine.py SIDE FILE INPUTS.npz OUTPUT.npy THREADS`; LoadGroup in load_group.py runs it. Neither torch nor
another engine is imported unless `SIDE` needs it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

import numpy as np
from shared import engines
from shared.memory import peak_mib


def main(side: str, path: Path, inputs: Path, output: Path, threads: int) -> dict[str, float]:
    """Import, load, run once, write the answer (B, S, H)."""
    with np.load(inputs) as arrays:
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
    settings = engines.Settings(threads, shape=ids.shape)
    engines.import_engine(side, settings)
    imported = peak_mib()
    start = time.perf_counter()
    bind = engines.load(side, path, settings)
    loaded = time.perf_counter()
    answer: Any = bind(ids, mask)()
    answered = time.perf_counter()
    peak = peak_mib()
    np.save(output, np.asarray(answer))
    return {
        "load_seconds": loaded - start,
        "first_answer_seconds": answered - start,
        "import_mib": imported,
        "peak_mib": peak,
    }


if __name__ == "__main__":
    _, side, path, inputs, output, threads = sys.argv
    print(json.dumps(main(side, Path(path), Path(inputs), Path(output), int(threads))))
