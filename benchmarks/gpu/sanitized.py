"""Calls our CUDA kernels and some Triton kernels under compute-sanitizer, and checks each answer on the CPU.

    compute-sanitizer --tool memcheck --kernel-name kns=embedding_projection python benchmarks/gpu/sanitized.py memcheck

Inputs are drawn and answers compared on the CPU, so that the GPU runs little else; what it does run, copies, a sort and
cuBLAS's products, is not checked where the filter names our kernels. `--device cpu` is a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Operators in CUDA; and calls of Triton kernels that the parity tests have compiled already.
CUDA = ("embedding_projection",)
TRITON: dict[str, tuple[Any, dict[str, Any]]] = {
    "attention": (((7, 1, 13), None, 3, 26), {"dropout_p": 0.2}),
    "bias_gelu": ((67, 312), {"act": "gelu_tanh", "dropout_p": 0.2}),
    "add_layer_norm": ((67, 312), {"dropout_p": 0.2}),
    "gelu_layer_norm": ((67, 312), {"act": "gelu_tanh"}),
    "embedding_layer_norm": ((513, 64, 300, 128, 2), {"dropout_p": 0.2}),
}
OPERATORS = {"memcheck": (*CUDA, *TRITON), "racecheck": CUDA}  # Triton's compiler places its own barriers
# Odd sizes, for the code beside whole vectors and tiles; and several tiles, for the products by FMAs and by tensor cores.
_ODD, _TILED = (7, 13, 29, 11, 17, 3), (513, 64, 96, 300, 128, 2)
_WIDE = (131, 2100, 200, 50, 40, 2)  # rows that do not fit shared memory
_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"dropout_p": 0.2}, {"padding_idx": 0}, {"from_embeds": True})


def cases(check: str, multiprocessors: int) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    """(operator, shape, options, dtype) of every call, the CUDA operators first."""
    many = (128 * multiprocessors + 5, *_TILED[1:])  # more than 128 tokens for each multiprocessor, the kernel's chunk
    if check == "racecheck":
        chosen = [(shape, {"dropout_p": 0.2}) for shape in (_TILED, _ODD)]
    else:
        chosen = [(shape, options) for shape in (_TILED, _ODD) for options in _OPTIONS] + [(many, {}), (_WIDE, {})]
    for shape, options in chosen:
        for dtype in ("bf16", "f32"):
            yield "embedding_projection", shape, options, dtype
    if check == "memcheck":
        for op, (shape, options) in TRITON.items():
            yield op, shape, options, "bf16"


def run(op: str, shape: Any, options: dict[str, Any], dtype: str, device: str) -> None:
    """Compare the operator and its gradients on `device` with plain torch on the CPU; raises where they differ."""
    import torch

    from albert_fast.testing import ALL_CASES, assert_close_calibrated
    from albert_fast.testing.parity import DTYPES

    case, generator = ALL_CASES[op], torch.Generator().manual_seed(11)
    inputs = case.make_inputs(shape, DTYPES[dtype], torch.device("cpu"), generator, **options)
    names = [name for name in case.gradients if torch.is_tensor(inputs.get(name))]
    grad = torch.randn(case.output_like(inputs).shape, generator=generator).to(DTYPES[dtype])

    def results(compute: Any, place: str) -> list[torch.Tensor]:
        given = {name: value.to(place) if torch.is_tensor(value) else value for name, value in inputs.items()}
        given |= {name: given[name].detach().requires_grad_() for name in names}
        output = compute(**given)
        leaves = [given[name] for name in names]
        found = torch.autograd.grad(
            output, leaves, grad.to(place, output.dtype), allow_unused=True, materialize_grads=True
        )
        return [t.detach().cpu() for t in (output, *found)]

    backend = "auto" if device == "cpu" else "triton" if op in TRITON else "cuda"
    actual = results(lambda **given: case.run(given, backend), device)
    same = results(case.eager, "cpu")
    exact = results(lambda **given: case.exact(given), "cpu")
    for name, *tensors in zip(["output", *names], actual, same, exact, strict=True):
        assert_close_calibrated(*tensors, f"{op} {name}", slack=case.slack(inputs) if name == "output" else 0.0)


def main() -> int:
    parser = argparse.ArgumentParser("sanitized")
    parser.add_argument("check", choices=list(OPERATORS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    on_gpu = options.device == "cuda"
    chip = torch.cuda.get_device_properties("cuda").multi_processor_count if on_gpu else 1
    listed = list(cases(options.check, chip))
    for number, (op, shape, chosen, dtype) in enumerate(listed, 1):
        run(op, shape, chosen, dtype, options.device)
        # The suite reads these lines where it ends this process after its time.
        print(f"{number} of {len(listed)} calls are right: {op} {dtype} {shape} {chosen}", flush=True)
    return 0


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    sys.exit(main())
