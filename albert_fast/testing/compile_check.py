"""Turns every GPU kernel into machine code for three generations of chips, on a machine without any, and reads it.

    python -m albert_fast.testing.compile_check [--json FILE] [--kernel NAME ...]

Triton kernels are compiled in every way in which their own launchers start them (launches.py), CUDA sources with nvcc. Of
every result the table tells registers, spills, shared memory and tensor-core instructions; before it stand the floors in
time that follow from counts of bytes and operations (floors.py). The exit code is 1 where a kernel spills, wants more shared
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
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import floors
from .launches import CASES, Launch, recorded_launches

KERNELS = (
    "attention", "add_layer_norm", "bias_gelu", "gelu_layer_norm", "linear_cross_entropy", "embedding_projection",
    "quantized_encoder",
)  # fmt: skip
CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Tensor-core products in SASS (of halves, integers, float8): of Ampere, of Hopper's warpgroups, of Blackwell's tcgen05.
_TENSOR_CORE = re.compile(r"\b([HIQ]G?MMA|UTC[A-Z]*MMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")
# Loads, stores and asynchronous copies of global memory; the bits of one are its last part, 32 where it has none.
_GLOBAL_MEMORY = re.compile(r"\b(LDG|STG|LDGSTS)\b([\w.]*)")


@dataclass(frozen=True)
class Chip:
    """A target: its name, what Triton and nvcc call it, and the bytes of shared memory that one block may take."""

    name: str
    capability: int
    nvcc_arch: str
    shared_bytes: int


CHIPS = (
    Chip("sm_80", 80, "arch=compute_80,code=sm_80", 163 * 1024),
    Chip("sm_90", 90, "arch=compute_90a,code=sm_90a", 227 * 1024),
    Chip("sm_100", 100, "arch=compute_100,code=sm_100", 227 * 1024),
)


@dataclass(frozen=True)
class Row:
    """What one kernel became on one chip. `shared_bytes` of CUDA kernels is what is fixed at compile time."""

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
    accesses: str = ""  # of global memory, by their bits: "LDG.128 4 LDG.32 2 STG.128 1"


class MissingToolError(RuntimeError):
    """Triton or nvcc is needed and not installed; the message says which and how to get it."""


def _tool(name: str) -> str:
    """A CUDA binary tool, the one that Triton ships if it does."""
    triton = importlib.util.find_spec("triton")
    shipped = Path(str(triton.origin)).parent / "backends/nvidia/bin" / name if triton else None
    found = str(shipped) if shipped and shipped.exists() else shutil.which(name)
    if found is None:
        raise MissingToolError(f"{name} was found neither in Triton's package nor on the PATH: `pip install triton`")
    return found


def _read_cubin(path: Path) -> dict[str, dict[str, Any]]:
    """Mangled kernel name -> registers, stack_bytes, shared_bytes (static), spills and tensor_cores of a cubin file."""

    def dump(*options: str) -> str:
        return subprocess.run(
            [_tool("cuobjdump"), *options, str(path)], capture_output=True, text=True, check=True
        ).stdout

    found: dict[str, dict[str, Any]] = {}
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(usage, dump("--dump-resource-usage")):
        sizes = {"registers": int(registers), "stack_bytes": int(stack) + int(local), "shared_bytes": int(shared)}
        found[name] = sizes
    for part in re.split(r"\bFunction : ", dump("-sass"))[1:]:
        name, _, code = part.partition("\n")
        accesses = [f"{kind}.{_bits(suffix)}" for kind, suffix in _GLOBAL_MEMORY.findall(code)]
        found[name.strip()] |= {
            "spills": len(_LOCAL_MEMORY.findall(code)),
            "tensor_cores": _counted(_TENSOR_CORE.findall(code)),
            "accesses": _counted(accesses),
        }
    return found


def _counted(kinds: list[str]) -> str:
    return " ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds)))


def _bits(suffix: str) -> str:
    """ "128" of ".E.128.CONSTANT", "16" of ".E.U16", "32" of ".E"."""
    found = re.findall(r"\.[US]?(8|16|64|128|256)\b", suffix)
    return found[-1] if found else "32"


def _judged(row: Row, chip: Chip, wants_tensor_cores: bool) -> Row:
    problems = []
    if row.spills or row.stack_bytes:
        problems.append(f"spills: {row.spills} accesses, {row.stack_bytes} bytes of stack")
    if row.shared_bytes > chip.shared_bytes:
        problems.append(f"shared memory: {row.shared_bytes} bytes, {chip.name} has {chip.shared_bytes}")
    if wants_tensor_cores and not row.tensor_cores:
        problems.append("no tensor-core instruction")
    return Row(**{**asdict(row), "problem": "; ".join(problems)})


def compile_triton(launch: Launch, chip: Chip) -> list[Row]:
    """Compile one launch for one chip and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(launch.module), launch.function)
    attributes = {(position,): [["tt.divisibility", 16]] for position in launch.divisible}
    source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options=dict(launch.options))
    except Exception as error:  # whatever the compiler raises is the finding
        problem = f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}"
        return [Row(launch.kernel, launch.label, launch.tiles, chip.name, 0, 0, 0, 0, "", problem)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        (found,) = _read_cubin(path).values()
    # Triton asks for its shared memory at launch; what the file itself names is the chip's own reserve.
    found["shared_bytes"] = compiled.metadata.shared
    row = Row(launch.kernel, launch.label, launch.tiles, chip.name, **found)
    return [_judged(row, chip, launch.wants_tensor_cores)]


def compile_cuda(source: Path, chip: Chip) -> list[Row]:
    """Compile one CUDA source for one chip with the flags of setup.py, and read each of its kernels.

    Their dynamic shared memory is not in the file: the launchers fit it to the device they find.
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
        found = _read_cubin(path)
    rows = []
    for name, numbers in sorted(found.items()):
        label = _cuda_label(name, source.stem)
        row = Row(source.stem, label, "dynamic memory apart", chip.name, **numbers)
        rows.append(_judged(row, chip, bool(re.match(r"fwd<(?!float)", label))))
    return rows


def _cuda_label(mangled: str, op: str) -> str:
    """`fwd<float, 64>` of the kernel `<op>_fwd_kernel<float, 64>`, or the name as it is where nothing can tell."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return mangled
    readable = subprocess.run([demangler, mangled], capture_output=True, text=True, check=True).stdout.strip()
    found = re.search(rf"\b{op}_(\w+)_kernel(<[^()]*>)\(", readable)
    return "".join(found.groups()) if found else readable


def check(triton: Iterable[Launch] = (), cuda: Iterable[Path] = (), processes: int | None = None) -> list[Row]:
    """Compile everything for every chip, several at a time."""
    workers = processes or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_interpreter) as pool:
        jobs = [pool.submit(compile_cuda, source, chip) for source in cuda for chip in CHIPS]
        jobs += [pool.submit(compile_triton, launch, chip) for launch in triton for chip in CHIPS
                 if launch.is_for(chip.capability)]  # fmt: skip
        return [row for job in jobs for row in job.result()]


def check_kernels(kernels: Iterable[str] = KERNELS, processes: int | None = None) -> list[Row]:
    """Check the kernels of these operators, Triton and CUDA.

    Raises:
        MissingToolError: one of them needs Triton or nvcc, and it is not installed.
        ValueError: an operator without a GPU kernel.
    """
    launches, sources = [], []
    for kernel in kernels:
        if kernel in CASES:
            if importlib.util.find_spec("triton") is None:
                raise MissingToolError("triton is not installed: `pip install triton` (Linux only)")
            launches += recorded_launches(kernel)
        elif kernel in KERNELS:
            if shutil.which("nvcc") is None:
                raise MissingToolError("nvcc was not found on the PATH: install the CUDA toolkit 12 or newer")
            sources.append(CSRC / "cuda" / f"{kernel}.cu")
            if not sources[-1].exists():
                raise MissingToolError(
                    f"{sources[-1]} is absent: CUDA sources are checked in a checkout of the repository"
                )
        else:
            raise ValueError(f"{kernel!r} has no GPU kernel; known: {', '.join(KERNELS)}")
    return check(launches, sources, processes)


def _leave_interpreter() -> None:
    # Read when triton is imported, which has not happened yet: kernels would become Python functions.
    os.environ.pop("TRITON_INTERPRET", None)


def table(rows: Iterable[Row]) -> str:
    """One line a kernel, one column a chip."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        cell = f"{row.registers} regs, {row.spills} spills, {row.shared_bytes / 1024:.1f} KiB"
        cell += f", {row.tensor_cores}" if row.tensor_cores else ""
        cell += f" FAILS: {row.problem}" if row.problem else ""
        lines.setdefault((row.kernel, row.label, row.tiles), {})[row.chip] = cell
    head = ["kernel", "case", "tiles", *(chip.name for chip in CHIPS)]
    body = [[*names, *(cells.get(chip.name, "") for chip in CHIPS)] for names, cells in lines.items()]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    marked = [head, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in marked)


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
        prog="python -m albert_fast.testing.compile_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to FILE")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="check these operators alone")
    parser.add_argument("--processes", type=int, help="compile so many at a time (default: one a core)")
    options = parser.parse_args(arguments)
    _leave_interpreter()
    try:
        rows = check_kernels(options.kernel, options.processes)
        # Of whole layers no floor is counted: it is that of their parts.
        print(floors.table([kernel for kernel in options.kernel if kernel in floors.SHAPES]), end="\n\n")
        return report(rows, options.json)
    except MissingToolError as error:
        print(f"cannot check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
