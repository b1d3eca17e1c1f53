"""Every operator case, forward and backward, and wrong calls of all operators, on the extension found in a folder: run by
.ci/sanitize on its own build."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from pathlib import Path

import torch


def load_extension(folder: Path) -> str | None:
    """Makes `albert_fast._C` the extension built in `folder`; why it does not load, if so."""
    (path,) = (folder / "albert_fast").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("albert_fast._C", path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        if "ALBERT_FAST_ISA" not in str(error):
            raise
        return str(error)
    sys.modules["albert_fast._C"] = module
    return None


def main() -> None:
    torch.set_num_threads(2)
    reason = load_extension(Path(sys.argv[1]))
    if reason is not None:
        print(f"sanitizers: skipped, {reason}")
        return
    from albert_fast.runtime import dispatch
    from albert_fast.testing import hostile
    from albert_fast.testing.cases import ALL_CASES
    from albert_fast.testing.parity import check_backward, check_forward, parity_grid

    started, runs = time.perf_counter(), 0
    isa = dispatch.extension().build_info()["isa"]
    # The other operators are compiled for the sets below this one alone, whose runs cover them.
    for op in ["quantized_encoder"] if isa == "avx512_vnni" else ALL_CASES:
        for _, *case in parity_grid(op, "cpp"):
            check_forward(*case)
            if case[0].gradients:
                check_backward(*case)
            runs += 1
    warnings.simplefilter("ignore")  # of backends that are asked for and are not there
    wrong = [call for dtype in (torch.float32, torch.bfloat16) for call in hostile.hostile_calls(7, 120, dtype)]
    refused = sum(isinstance(hostile.run(name, arguments), Exception) for name, _, arguments in wrong)
    print(
        f"sanitizers: {isa}: {runs} cases clean, {len(wrong)} wrong calls, {refused} of them refused, "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
