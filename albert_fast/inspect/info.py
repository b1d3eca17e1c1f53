"""Lists what runs on this machine, what does not, why, and how to get it: `python -m albert_fast.info [--json]`.

`describe()` names the machine and the libraries for the record of a benchmark; `operators()` asks the dispatch table
about every operator; `advice()` says how to get what is missing. Nothing here needs more than the package's own
dependencies.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from ..runtime import dispatch
from ..runtime.version import __version__

# Flags that decide which kernels can run or how fast; the rest of the CPU's list only hides them.
_CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx_vnni", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_LIBRARIES = (
    *("torch", "numpy", "safetensors", "triton", "transformers", "tokenizers", "sentencepiece"),
    *("sentence-transformers", "onnxruntime", "openvino", "nncf", "scikit-learn"),
)
# extra -> the modules that it brings and what each is for
_EXTRAS = {
    "text": {"tokenizers": "fast tokenisation", "sentencepiece": "tokenisation from a spiece.model"},
    "cli": {"typer": "the albert-fast command", "tqdm": "progress bars"},
    "train": {"sklearn": "evaluation metrics"},
    "hub": {"huggingface_hub": "checkpoints by hub id"},
}
_REINSTALL = "run `pip install --force-reinstall --no-deps .` (or `-e .`) in the source folder again"


def _read(path: str) -> str:
    """The text of a small system file, stripped; empty where it does not exist."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a short command prints, stripped; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> dict[str, Any]:
    """Model, flags that matter, caches (KiB by level) and core counts."""
    blocks = [dict(_cpu_lines(block)) for block in _read("/proc/cpuinfo").split("\n\n") if block.strip()]
    first = blocks[0] if blocks else {}
    model = first.get("model name") or _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    known = set((first.get("flags") or first.get("Features") or "").split())
    cores = {(block.get("physical id"), block.get("core id")) for block in blocks if "core id" in block}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (kind := _read(f"{index}/type")) != "Instruction":
            caches[f"L{_read(f'{index}/level')}{'d' if kind == 'Data' else ''}"] = _read(f"{index}/size")
    return {
        "model": model or "unknown",
        "architecture": platform.machine(),
        "cores": len(cores) or int(_output("sysctl", "-n", "hw.physicalcpu") or 0) or os.cpu_count(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": usable,
        "flags": [flag for flag in _CPU_FLAGS if flag in known],
        "caches": caches,
    }


def _cpu_lines(block: str) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def extension() -> tuple[dict[str, Any] | None, str | None]:
    """`albert_fast._C.build_info()` (compiler, instruction sets, OpenMP, CUDA) and None; or None and the reason."""
    try:
        return dict(dispatch.extension().build_info()), None
    except dispatch.BackendUnavailableError as error:
        return None, str(error)


def describe() -> dict[str, Any]:
    """The machine and the software as plain values for JSON; benchmarks store them with their figures.

    Returns:
        albert_fast, python, system: versions;
        cpu: model, architecture, cores, logical_cpus, usable_cpus, flags, caches; memory_gib;
        threads: torch's two settings and the variables that steer them;
        libraries: version by name, None where not installed;
        gpus: name, compute_capability, multiprocessors, memory_gib; cuda, driver: versions or None;
        extension: the build_info() of albert_fast._C or None.
    """
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "ALBERT_FAST_ISA")
    return {
        "albert_fast": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "memory_gib": _memory_gib(),
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            **{name: os.environ[name] for name in variables if name in os.environ},
        },
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "driver": driver[0] if driver else None,
        "extension": extension()[0],
    }


def _no_device(device_type: str) -> str | None:
    if device_type != "cuda" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no CUDA device"


def operators() -> list[dict[str, Any]]:
    """One row per operator, device and backend of the dispatch table, best backend first.

    Each row: operator, device, backend, runs (whether it can run here), chosen (whether backend="auto" takes it),
    reason (why it cannot run; None where it can).
    """
    rows = []
    for op, devices in dispatch.TABLE.items():
        for device, backends in devices.items():
            taken = False
            for backend in backends:
                reason = _no_device(device) or dispatch.why_not(op, device, backend)
                chosen = reason is None and not taken
                taken = taken or chosen
                row = {"operator": op, "device": device, "backend": backend, "runs": reason is None, "chosen": chosen}
                rows.append({**row, "reason": reason})
    return rows


def _extension_advice() -> list[str]:
    """How to get the C++ extension, or the parts that it was built without."""
    built, reason = extension()
    if built is None:
        if importlib.util.find_spec("albert_fast._C") is not None:
            return [f"C++ kernels: {reason}"]
        compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if os.name == "nt":
            return ["C++ kernels: on Windows, install albert_fast inside WSL"]
        if compiler is None:
            get = "`apt-get install g++`, `dnf install gcc-c++` or `xcode-select --install`"
            return [f"C++ kernels: no C++ compiler is on the PATH; {get}, then {_REINSTALL}"]
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            get = "`apt-get install python3-dev` or `dnf install python3-devel`"
            return [f"C++ kernels: Python's headers are missing; {get}, then {_REINSTALL}"]
        return [f"C++ kernels: {compiler} is here; {_REINSTALL} with ALBERT_FAST_BUILD=cpu to see what fails"]
    said = []
    if not built["openmp"]:
        get = "install one that has it (GCC, or Clang with libomp)"
        said.append(f"C++ threads: the compiler had no OpenMP; {get}, then {_REINSTALL}")
    if not built["cuda"]:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            said.append(f"CUDA kernels: put nvcc of the CUDA toolkit 12 or newer on the PATH, then {_REINSTALL}")
        else:
            said.append(f"CUDA kernels: {nvcc} is here; {_REINSTALL} with ALBERT_FAST_BUILD=cuda to see what fails")
    return said


def advice() -> list[str]:
    """What is missing on this machine and the command that gets it, one line each; empty where nothing is."""
    said = _extension_advice()
    if sys.platform == "linux" and importlib.util.find_spec("triton") is None:
        said.append("Triton kernels: `pip install 'albert-fast[gpu]'`")
    if reason := _no_device("cuda"):
        get = "a GPU needs a CUDA build of torch (see pytorch.org) and NVIDIA's driver; check with `nvidia-smi`"
        said.append(f"GPU: {reason}; {get}")
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            uses = ", ".join(f"{name} ({modules[name]})" for name in missing)
            said.append(f"optional: {uses}: `pip install 'albert-fast[{extra}]'`")
    return said


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Operators down, device and backend across; reasons as numbered notes below."""
    columns = list(dict.fromkeys((row["device"], row["backend"]) for row in rows))
    columns.sort(key=lambda column: (column[0], dispatch.BACKENDS.index(column[1])))
    reasons = list(dict.fromkeys(row["reason"] for row in rows if row["reason"]))
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        mark = "runs" if row["chosen"] else "can run" if row["runs"] else f"no ({reasons.index(row['reason']) + 1})"
        cells.setdefault(row["operator"], {})[row["device"], row["backend"]] = mark
    head = ["operator", *(f"{device}: {backend}" for device, backend in columns)]
    body = [[op, *(marks.get(column, "-") for column in columns)] for op, marks in cells.items()]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (head, *body)]
    return [*lines, *(f"  ({number}) {reason}" for number, reason in enumerate(reasons, start=1))]


def report() -> str:
    """The text that `python -m albert_fast.info` prints."""
    machine = describe()
    cpu, built, threads = machine["cpu"], machine["extension"], machine["threads"]
    lines = [
        f"albert_fast {machine['albert_fast']}, Python {machine['python']}, {machine['system']}",
        f"CPU        {cpu['model']} ({cpu['architecture']}), {cpu['cores']} cores, {cpu['usable_cpus']} usable CPUs, "
        f"{machine['memory_gib']} GiB, torch uses {threads['torch']} threads",
        f"           {' '.join(cpu['flags']) or 'no SIMD flags known'}",
    ]
    for gpu in machine["gpus"]:
        lines.append(
            f"GPU        {gpu['name']} (compute capability {gpu['compute_capability']}, "
            f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']} GiB), "
            f"driver {machine['driver']}, CUDA {machine['cuda']}"
        )
    if not machine["gpus"]:
        lines.append(f"GPU        none: {_no_device('cuda')}")
    if built is None:
        lines.append(f"extension  none: {extension()[1]}")
    else:
        cuda = f"CUDA for {', '.join(built['cuda_archs'])}" if built["cuda"] else "no CUDA"
        lines.append(
            f"extension  compiled for {', '.join(built['isa_compiled'])}, runs {built['isa']}; "
            f"{'OpenMP' if built['openmp'] else 'no OpenMP'}; {cuda}; compiler {built['compiler']}"
        )
    libraries = (f"{name} {version or 'missing'}" for name, version in machine["libraries"].items())
    lines += [f"libraries  {', '.join(libraries)}", "", *_table(operators())]
    wanted = advice()
    if wanted:
        lines += ["", "To get what is missing:", *(f"  {line}" for line in wanted)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry of `python -m albert_fast.info`; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m albert_fast.info", description="What runs on this machine and what does not."
    )
    parser.add_argument("--json", action="store_true", help="print machine, operators and advice as JSON")
    if parser.parse_args(argv).json:
        print(json.dumps({"machine": describe(), "operators": operators(), "advice": advice()}, indent=2))
    else:
        print(report())
    return 0
