"""Compiles GPU kernels to machine code for three generations of chips, on a machine without a GPU, and reads the result.

    python -m albert_fast.testing.gpu.compile_check [--all] [--json FILE] [--kernel NAME ...]

Triton kernels are compiled in the ways in which their own launchers start them (launches.py), CUDA sources with nvcc. Without
--all about a sixth of these compilations is chosen (coverage.py): every bfloat16 and 8-bit tile on one chip at least, every
type of operands, every pair of flags of a kernel (activations, dropout, padding, absent operands), the largest tile of every
type of operands, and the released models' launches on every chip.

The table shows for every result registers, spills, shared memory and tensor-core instructions; and for every launch, at its
recorded sizes, bytes, operations and the least time that an A100 and an H100 need for them (costs.py). A table of these least
times for whole operators at a model's sizes comes first (floors.py). The exit code is 1 if a kernel spills, needs more shared
memory than the chip has, or should use tensor cores and does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import costs, floors
from .coverage import Compilation, covering
from .cubins import CHIPS, Chip, MissingToolError, read_cubins
from .launches import CASES, recorded_launches
from .recording import Launch

OPERATORS = (
    "attention",
    "add_layer_norm",
    "bias_gelu",
    "linear_gelu",
    "gelu_layer_norm",
    "embedding_layer_norm",
    "linear_cross_entropy",
    "encoder",
    "quantized_encoder",
    "embedding_projection",
)
# The operators' kernels, and those that are launched apart from them.
KERNELS = (*OPERATORS, "graph_inputs")
CSRC = Path(__file__).resolve().parents[3] / "csrc"
# Launches that one process compiles and reads together: with 8, half the time for reading was the start of the disassembler.
_BATCH = 24


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one chip. `shared_bytes` of CUDA kernels is the part that is fixed at compile time.

    The last three fields belong to the launch and are the same on every chip; they are None for CUDA kernels, whose launches
    are not recorded.
    """

    kernel: str
    label: str
    tiles: str
    chip: str
    registers: int
    spills: int  # instructions that write or read local memory
    stack_bytes: int
    shared_bytes: int
    tensor_cores: str  # "HGMMA 16", or empty
    problem: str = ""
    accesses: str = ""  # accesses of global memory by their bits: "LDG.128 4 LDG.32 2 STG.128 1"
    bytes: int | None = None  # read and written
    operations: float | None = None
    floor_us: dict[str, float | None] | None = None  # for each of costs.CHIPS; None: the chip lacks such operations


def _judged(row: Row, chip: Chip, wants_tensor_cores: bool) -> Row:
    problems = []
    if row.spills or row.stack_bytes:
        problems.append(f"spills: {row.spills} accesses, {row.stack_bytes} bytes of stack")
    if row.shared_bytes > chip.shared_bytes:
        problems.append(f"shared memory: {row.shared_bytes} bytes, {chip.name} has {chip.shared_bytes}")
    if wants_tensor_cores and not row.tensor_cores:
        problems.append("no tensor-core instruction")
    return Row(**{**asdict(row), "problem": "; ".join(problems)})


def compile_triton(launches: list[Launch], chip: Chip) -> list[Row]:
    """Compile these launches for a chip and read the results, one row each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", chip.capability, 32)
    compiled: list[Any] = []
    for launch in launches:
        function = getattr(importlib.import_module(launch.module), launch.function)
        attributes = {path: [["tt.divisibility", 16]] for path in launch.divisible}
        source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
        try:
            compiled.append(triton.compile(source, target=target, options=dict(launch.options)))
        except Exception as error:  # any error of the compiler is a finding
            compiled.append(f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}")
    contents = iter(read_cubins([one.asm["cubin"] for one in compiled if not isinstance(one, str)], chip))
    rows = []
    for launch, one in zip(launches, compiled, strict=True):
        names = (launch.kernel, launch.label, launch.tiles, chip.name)
        if isinstance(one, str):
            rows.append(Row(*names, 0, 0, 0, 0, "", one, **_counted_of(launch)))
            continue
        (found,) = next(contents).values()
        # Triton requests its shared memory at launch; the file names only what the chip reserves for itself.
        found["shared_bytes"] = one.metadata.shared
        rows.append(_judged(Row(*names, **found | _counted_of(launch)), chip, launch.wants_tensor_cores))
    return rows


def _counted_of(launch: Launch) -> dict[str, Any]:
    cost, floors_us = launch.cost, {}
    for gpu in costs.CHIPS:
        floor = cost.seconds(gpu)
        floors_us[gpu.name] = None if floor is None else floor[0] * 1e6
    return {"bytes": cost.bytes, "operations": cost.operations, "floor_us": floors_us}


def compile_cuda(source: Path, chip: Chip) -> list[Row]:
    """Compile one CUDA source for one chip with the flags of setup.py, and read each of its kernels.

    Their dynamic shared memory is not in the file: the launchers choose it for the device at run time.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise MissingToolError("nvcc was not found on the PATH: install the CUDA toolkit 12 or newer")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        flags = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{CSRC}", "-gencode", chip.nvcc_arch]
        command = [nvcc, *flags, "-cubin", str(source), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            problem = f"does not compile: {done.stderr.strip()[:300]}"
            return [Row(source.stem, source.name, "", chip.name, 0, 0, 0, 0, "", problem)]
        (found,) = read_cubins([path.read_bytes()], chip)
    rows = []
    for name, numbers in sorted(found.items()):
        label = _cuda_label(name, source.stem)
        row = Row(source.stem, label, "dynamic memory apart", chip.name, **numbers)
        rows.append(_judged(row, chip, bool(re.match(r"fwd<(?!float)", label))))
    return rows


def _cuda_label(mangled: str, op: str) -> str:
    """`fwd<float, 64>` for the kernel `<op>_fwd_kernel<float, 64>`, or the mangled name without a demangler."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return mangled
    readable = subprocess.run([demangler, mangled], capture_output=True, text=True, check=True).stdout.strip()
    found = re.search(rf"\b{op}_(\w+)_kernel(<[^()]*>)\(", readable)
    return "".join(found.groups()) if found else readable


def check(
    launches: Sequence[Launch] = (),
    cuda: Iterable[Path] = (),
    processes: int | None = None,
    chosen: set[Compilation] | None = None,
) -> list[Row]:
    """Compile and read, several kernels at a time; `chosen` limits the launches that are compiled for each chip."""
    wanted = {
        chip: [
            launch
            for launch in launches
            if launch.is_for(chip.capability) and (chosen is None or (launch, chip.capability) in chosen)
        ]
        for chip in CHIPS
    }
    workers = processes or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_interpreter) as pool:
        cuda_jobs = [pool.submit(compile_cuda, source, chip) for source in cuda for chip in CHIPS]
        triton_jobs = {
            chip: [
                pool.submit(compile_triton, own[first : first + _BATCH], chip) for first in range(0, len(own), _BATCH)
            ]
            for chip, own in wanted.items()
        }
        rows = [row for job in cuda_jobs for row in job.result()]
        found = {
            (launch, chip): row
            for chip, jobs in triton_jobs.items()
            for launch, row in zip(wanted[chip], (row for job in jobs for row in job.result()), strict=True)
        }
    # The rows of a launch for all of its chips are neighbours.
    return rows + [found[launch, chip] for launch in launches for chip in CHIPS if (launch, chip) in found]


def check_kernels(
    kernels: Iterable[str] = KERNELS, processes: int | None = None, everything: bool = False
) -> list[Row]:
    """Check the kernels of these operators, Triton and CUDA.

    everything: compile every launch for every chip, not the part that `covering` chooses.

    Raises:
        MissingToolError: an operator needs Triton or nvcc, which is not installed.
        ValueError: an operator has no GPU kernel.
    """
    triton_kernels, sources = [], []
    for kernel in kernels:
        if kernel in CASES:
            if importlib.util.find_spec("triton") is None:
                raise MissingToolError("triton is not installed: `pip install triton` (Linux only)")
            triton_kernels.append(kernel)
        elif kernel in KERNELS:
            if shutil.which("nvcc") is None:
                raise MissingToolError("nvcc was not found on the PATH: install the CUDA toolkit 12 or newer")
            sources.append(CSRC / "cuda" / f"{kernel}.cu")
            if not sources[-1].exists():
                raise MissingToolError(f"{sources[-1]} does not exist: CUDA sources are checked in a checkout only")
        else:
            raise ValueError(f"{kernel!r} has no GPU kernel; known: {', '.join(KERNELS)}")
    launches = recorded_launches(*triton_kernels) if triton_kernels else []
    chosen = None if everything else covering(launches, [chip.capability for chip in CHIPS])
    return check(launches, sources, processes, chosen)


def _leave_interpreter() -> None:
    # Triton reads the variable when it is imported, which has not happened yet; with it kernels become Python functions.
    os.environ.pop("TRITON_INTERPRET", None)


def table(rows: Iterable[Row]) -> str:
    """One line per kernel: the least that its launch takes, then one column per chip."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cell = f"{row.registers} regs, {row.spills} spills, {row.shared_bytes / 1024:.1f} KiB"
        cell += f", {row.tensor_cores}" if row.tensor_cores else ""
        cell += f" FAILS: {row.problem}" if row.problem else ""
        lines.setdefault((row.kernel, row.label, row.tiles, *_least(row)), {})[row.chip] = cell
    least = ["MB", "GFLOP", *(f"{gpu.name} floor, us" for gpu in costs.CHIPS)]
    head = ["kernel", "case", "tiles", *least, *(chip.name for chip in CHIPS)]
    body = [[*names, *(cells.get(chip.name, "") for chip in CHIPS)] for names, cells in lines.items()]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    marked = [head, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in marked)


def _least(row: Row) -> tuple[str, ...]:
    if row.bytes is None or row.operations is None or row.floor_us is None:
        return ("",) * (2 + len(costs.CHIPS))
    times = (row.floor_us[gpu.name] for gpu in costs.CHIPS)
    times_text = ("" if time is None else costs.microseconds(time) for time in times)
    return (f"{row.bytes / 1e6:.3f}", f"{row.operations / 1e9:.3f}", *times_text)


def report(rows: list[Row], json_path: Path | None = None) -> int:
    """Print the table, write the rows as JSON if asked to, and return the exit code: 1 where a row has a problem."""
    print(table(rows))
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [row for row in rows if row.problem]
    for row in bad:
        print(f"{row.kernel} {row.label} on {row.chip}: {row.problem}", file=sys.stderr)
    print(f"{len(rows)} compiled kernels, {len(bad)} with a problem")
    return int(bool(bad))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m albert_fast.testing.gpu.compile_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--all", action="store_true", help="compile every launch for every chip (default: a covering part)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to FILE")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="check only these kernels")
    parser.add_argument("--processes", type=int, help="number of kernels compiled at a time (default: one per core)")
    options = parser.parse_args(arguments)
    _leave_interpreter()
    try:
        rows = check_kernels(options.kernel, options.processes, options.all)
        print(floors.table(options.kernel), end="\n\n")
        return report(rows, options.json)
    except MissingToolError as error:
        print(f"cannot check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
