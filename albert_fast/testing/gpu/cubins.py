"""Reads compiled GPU code: registers, spills, shared memory, tensor-core instructions and memory accesses of every kernel."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tensor-core products in SASS (16-bit, integer, float8), as Ampere, Hopper's warpgroups and Blackwell's tcgen05 name them.
_TENSOR_CORE = re.compile(r"\b([HIQ]G?MMA|UTC[A-Z]*MMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")
# Loads, stores and asynchronous copies of global memory. The last part of the name is the number of bits; 32 if it has none.
_GLOBAL_MEMORY = re.compile(r"\b(LDG|STG|LDGSTS)\b([\w.]*)")
# The size on every chip here; the disassembler writes one instruction per line, after its address.
_INSTRUCTION_BYTES = 16
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/.*", re.MULTILINE)


@dataclass(frozen=True)
class Chip:
    """A target: its names in Triton, nvcc and nvdisasm, and the bytes of shared memory that one block may take."""

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


class MissingToolError(RuntimeError):
    """Triton or nvcc is needed and not installed; the message says which one, and how to get it."""


def _tool(name: str) -> str:
    """The path of a CUDA binary tool: the one in Triton's package, otherwise the one on the PATH."""
    triton = importlib.util.find_spec("triton")
    shipped = Path(str(triton.origin)).parent / "backends/nvidia/bin" / name if triton else None
    found = str(shipped) if shipped and shipped.exists() else shutil.which(name)
    if found is None:
        raise MissingToolError(f"{name} was found neither in Triton's package nor on the PATH: `pip install triton`")
    return found


def _run_tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def read_cubins(cubins: list[bytes], chip: Chip) -> list[dict[str, dict[str, Any]]]:
    """For each cubin: mangled kernel name -> the fields of `compile_check.Row` that its code tells.

    `shared_bytes` is the shared memory that is fixed at compile time.
    """
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
    """Mangled kernel name -> its instructions: the sections .text.* of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, entries, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Each section has: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + entry * entry_bytes) for entry in range(entries)]
    code = {}
    for name, _, _, _, offset, size in sections:
        start = sections[names][4] + name
        title = cubin[start : cubin.index(b"\0", start)].decode()
        if title.startswith(".text."):
            code[title.removeprefix(".text.")] = cubin[offset : offset + size]
    return code


def _disassembled(codes: list[bytes], chip: Chip) -> list[str]:
    """The instructions of each piece of code as text. One call reads all of them: the tool takes 0.3 s to start."""
    if not codes:  # no launch is for this chip
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
    """The bits of an access by the end of its name: 128 for ".E.128.CONSTANT", 16 for ".E.U16", 32 for ".E"."""
    found = re.findall(r"\.[US]?(8|16|64|128|256)\b", suffix)
    return found[-1] if found else "32"
