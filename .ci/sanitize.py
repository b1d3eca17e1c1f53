"""Runs every operator case, forward and backward, and wrong calls of all operators on an extension that .ci/sanitize built.

`python .ci/sanitize.py FOLDER` takes the extension in FOLDER; `--isas` prints the instruction sets of this CPU instead.
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


def print_isas() -> None:
    """The instruction sets that the installed extension can use on this CPU, the narrowest first."""
    from albert_fast.runtime import dispatch

    info = dispatch.extension().build_info()
    print(*info["isa_compiled"][: info["isa_compiled"].index(info["isa"]) + 1])


def main() -> None:
    if sys.argv[1] == "--isas":
        print_isas()
        return
    torch.set_num_threads(2)
    load_extension(Path(sys.argv[1]))
    from albert_fast.runtime import dispatch
    from albert_fast.testing import hostile
    from albert_fast.testing.cases import ALL_CASES
    from albert_fast.testing.parity import check_backward, check_forward, parity_grid

    started, runs = time.perf_counter(), 0
    isa = dispatch.extension().build_info()["isa"]
    # Only this operator is compiled for avx512_vnni; the runs of the narrower sets cover the others.
    for op in ["quantized_encoder"] if isa == "avx512_vnni" else ALL_CASES:
        for _, *case in parity_grid(op, "cpp"):
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
