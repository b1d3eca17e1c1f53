"""Runs operator cases, forward and backward, and wrong calls of all operators on an extension that .ci/sanitize built.

`python .ci/sanitize.py FOLDER` takes the extension in FOLDER and runs a part of the cases that holds every pair of an operator's
dtypes, shapes and options; `--isas` prints the instruction sets to run instead. `--thorough` stands for every case and every
instruction set of this CPU.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from pathlib import Path

import torch


def load_extension(folder: Path) -> None:
    """Makes the extension built in `folder` `albert_fast._C`."""
    (path,) = (folder / "albert_fast").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("albert_fast._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["albert_fast._C"] = module


def print_isas(thorough: bool) -> None:
    """The instruction sets that the installed extension can use on this CPU, the narrowest first; or first and last alone."""
    from albert_fast.runtime import dispatch

    info = dispatch.extension().build_info()
    usable = info["isa_compiled"][: info["isa_compiled"].index(info["isa"]) + 1]
    # Only quantized_encoder is compiled for avx512_vnni, so the set before it is needed for the others.
    wide = usable[1:] if thorough else usable[1:][-2 if info["isa"] == "avx512_vnni" else -1 :]
    print(*usable[:1], *wide)


def main() -> None:
    thorough = "--thorough" in sys.argv
    if sys.argv[1] == "--isas":
        print_isas(thorough)
        return
    torch.set_num_threads(2)
    load_extension(Path(sys.argv[1]))
    from albert_fast.runtime import dispatch
    from albert_fast.testing import hostile
    from albert_fast.testing.cases import ALL_CASES
    from albert_fast.testing.parity import check_backward, check_forward, parity_grid, without_thorough

    started, runs = time.perf_counter(), 0
    isa = dispatch.extension().build_info()["isa"]
    # Only this operator is compiled for avx512_vnni; the runs of the narrower sets cover the others.
    for op in ["quantized_encoder"] if isa == "avx512_vnni" else ALL_CASES:
        grid = parity_grid(op, "cpp")
        for _, *case in grid if thorough else without_thorough(grid):
            check_forward(*case)
            if case[0].gradients:
                check_backward(*case)
            runs += 1
    warnings.simplefilter("ignore")  # about backends that are not there
    wrong = [call for dtype in (torch.float32, torch.bfloat16) for call in hostile.hostile_calls(7, 120, dtype)]
    refused = sum(isinstance(hostile.run(name, arguments), Exception) for name, _, arguments in wrong)
    print(
        f"sanitizers: {isa}: {runs} cases clean, {len(wrong)} wrong calls, {refused} of them refused, "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
