"""Turns every GPU kernel into machine code for three generations of chips, on a machine without any, and reads it.

    python -m albert_fast.testing.gpu.compile_check [--json FILE] [--kernel NAME ...]

Triton kernels are compiled in every way in which their own launchers start them (launches.py), CUDA sources with nvcc. Of
every result the table tells registers, spills, shared memory and tensor-core instructions; and of every launch, at the sizes
that it was recorded with, bytes, operations and the least time that they take an A100 and an H100 (costs.py). Before it
stand these floors of whole operators at a model's sizes (floors.py). The exit code is 1 where a kernel spills, wants more
shared memory than the chip has, or should use tensor cores and does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import costs, floors
from .launches import CASES, Launch, recorded_launches

OPERATORS = (
    "attention", "add_layer_norm", "bias_gelu", "linear_gelu", "gelu_layer_norm", "linear_cross_entropy",
    "encoder", "quantized_encoder", "embedding_projection",
)  # fmt: skip
# And what is launched beside them.
KERNELS = (*OPERATORS, "graph_inputs")
CSRC = Path(__file__).resolve().parents[3] / "csrc"
# Tensor-core products in SASS (of halves, integers, float8): of Ampere, of Hopper's warpgroups, of Blackwell's tcgen05.
_TENSOR_CORE = re.compile(r"\b([HIQ]G?MMA|UTC[A-Z]*MMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")
# Loads, stores and asynchronous copies of global memory; the bits of one are its last part, 32 where it has none.
_GLOBAL_MEMORY = re.compile(r"\b(LDG|STG|LDGSTS)\b([\w.]*)")
# On every chip here; the disassembler writes one a line, behind its address.
_INSTRUCTION_BYTES = 16
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/.*", re.MULTILINE)
# Launches that one process compiles and reads together: of 8, half the time for reading was the disassembler's start.
_BATCH = 24


@dataclass(frozen=True)
class Chip:
    """A target: what Triton, nvcc and nvdisasm call it, and the bytes of shared memory that one block may take."""

    name: str
    capability: int
    nvcc_arch: str
    nvdisasm_arch: str
    shared_bytes: int


CHIPS = (
    Chip("sm_80", 80, "arch=compute_80,code=sm_80", "SM80", 163 * 1024),
    Chip("sm_90", 90, "arch=compute_90a,code=sm_90a", "SM90a", 227 * 1024),
    Chip("sm_100", 100, "arch=compute_100,code=sm_100", "SM100a", 227 * 1024),
)


@dataclass(frozen=True)
class Row:
    """What one kernel became on one chip. `shared_bytes` of CUDA kernels is what is fixed at compile time.

    The last three are the launch's, alike on every chip, and None for CUDA kernels, whose launches are not recorded.
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
    accesses: str = ""  # of global memory, by their bits: "LDG.128 4 LDG.32 2 STG.128 1"
    bytes: int | None = None  # read and written
    operations: float | None = None
    floor_us: dict[str, float | None] | None = None  # of each of costs.CHIPS; None: it lacks such operations


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


def _run_tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def _read_cubins(cubins: list[bytes], chip: Chip) -> list[dict[str, dict[str, Any]]]:
    """Of each cubin, mangled kernel name -> what `Row` tells of it; `shared_bytes` is what is fixed at compile time."""
    code = [_machine_code(cubin) for cubin in cubins]
    texts = iter(_disassembled([section for sections in code for section in sections.values()], chip))
    found = [_resource_usage(cubin) for cubin in cubins]
    for kernels, sections in zip(found, code, strict=True):
        for name in sections:
            text = next(texts)
            accesses = [f"{kind}.{_bits(suffix)}" for kind, suffix in _GLOBAL_MEMORY.findall(text)]
            kernels[name] |= {
                "spills": len(_LOCAL_MEMORY.findall(text)),
                "tensor_cores": _counted(_TENSOR_CORE.findall(text)),
                "accesses": _counted(accesses),
            }
    return found


def _resource_usage(cubin: bytes) -> dict[str, dict[str, Any]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run_tool("cuobjdump", "--dump-resource-usage", file.name)
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: {"registers": int(registers), "stack_bytes": int(stack) + int(local), "shared_bytes": int(shared)}
        for name, registers, stack, shared, local in re.findall(usage, text)
    }


def _machine_code(cubin: bytes) -> dict[str, bytes]:
    """Mangled kernel name -> its instructions: the sections .text.* of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, entries, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + entry * entry_bytes) for entry in range(entries)]
    code = {}
    for name, _, _, _, offset, size in sections:
        start = sections[names][4] + name
        title = cubin[start : cubin.index(b"\0", start)].decode()
        if title.startswith(".text."):
            code[title.removeprefix(".text.")] = cubin[offset : offset + size]
    return code


def _disassembled(codes: list[bytes], chip: Chip) -> list[str]:
    """The instructions of each piece of code as text, all from one call: the tool takes 0.3 s to start, however short they are."""
    if not codes:  # a chip that none of the launches is for
        return []
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        lines = _INSTRUCTION.findall(_run_tool("nvdisasm", "--binary", chip.nvdisasm_arch, file.name))
    counts = [len(code) // _INSTRUCTION_BYTES for code in codes]
    if len(lines) != sum(counts):
        raise RuntimeError(f"nvdisasm wrote {len(lines)} instructions for {chip.name}, expected {sum(counts)}")
    ends = list(itertools.accumulate(counts))
    return ["\n".join(lines[end - count : end]) for count, end in zip(counts, ends, strict=True)]


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


def compile_triton(launches: list[Launch], chip: Chip) -> list[Row]:
    """Compile those of the launches that are for this chip and read the results, a row each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", chip.capability, 32)
    launches = [launch for launch in launches if launch.is_for(chip.capability)]
    compiled: list[Any] = []
    for launch in launches:
        function = getattr(importlib.import_module(launch.module), launch.function)
        attributes = {(position,): [["tt.divisibility", 16]] for position in launch.divisible}
        source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
        try:
            compiled.append(triton.compile(source, target=target, options=dict(launch.options)))
        except Exception as error:  # whatever the compiler raises is the finding
            compiled.append(f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}")
    contents = iter(_read_cubins([one.asm["cubin"] for one in compiled if not isinstance(one, str)], chip))
    rows = []
    for launch, one in zip(launches, compiled, strict=True):
        names = (launch.kernel, launch.label, launch.tiles, chip.name)
        if isinstance(one, str):
            rows.append(Row(*names, 0, 0, 0, 0, "", one, **_counted_of(launch)))
            continue
        (found,) = next(contents).values()
        # Triton asks for its shared memory at launch; what the file itself names is the chip's own reserve.
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
        (found,) = _read_cubins([path.read_bytes()], chip)
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
    launches = list(triton)
    batches = [launches[first : first + _BATCH] for first in range(0, len(launches), _BATCH)]
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_interpreter) as pool:
        cuda_jobs = [pool.submit(compile_cuda, source, chip) for source in cuda for chip in CHIPS]
        triton_jobs = [[pool.submit(compile_triton, batch, chip) for chip in CHIPS] for batch in batches]
        rows = [row for job in cuda_jobs for row in job.result()]
        for batch, jobs in zip(batches, triton_jobs, strict=True):
            found = [(chip, iter(job.result())) for chip, job in zip(CHIPS, jobs, strict=True)]
            # A launch's rows for all of its chips are neighbours.
            rows += [next(of_chip) for launch in batch for chip, of_chip in found if launch.is_for(chip.capability)]
        return rows


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
    """One line a kernel: what its launch takes at least, then one column a chip."""
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to FILE")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="check these alone")
    parser.add_argument("--processes", type=int, help="compile so many at a time (default: one a core)")
    options = parser.parse_args(arguments)
    _leave_interpreter()
    try:
        rows = check_kernels(options.kernel, options.processes)
        print(floors.table(options.kernel), end="\n\n")
        return report(rows, options.json)
    except MissingToolError as error:
        print(f"cannot check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
