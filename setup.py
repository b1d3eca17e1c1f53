"""Builds `albert_fast._C` from csrc/ with a C++ compiler, pybind11 and, where nvcc is found, CUDA; never with torch.

ALBERT_FAST_BUILD says what to build; pyproject.toml says everything else about the package.

| value | what is built | what happens where it cannot be |
|---|---|---|
| auto (default) | C++, and CUDA where nvcc works | left out with a message; `python -m albert_fast.info` names it |
| cpu | C++ alone | error |
| cuda | C++ and CUDA | error |
| off | nothing: Python and Triton alone | |

A compiler that works but fails on our sources is an error in every mode. CXX (or CC), CXXFLAGS, LDFLAGS, CUDA_HOME,
NVCC_APPEND_FLAGS and MAX_JOBS are obeyed. ALBERT_FAST_BUILD_ISAS ("portable avx2") limits the instruction sets that the C++
kernels are compiled for, which otherwise are all that the compiler knows.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
# Relative paths, since compilers run in ROOT: objects do not depend on where the sources are.
CSRC = Path("csrc")
OBJECTS = ROOT / "build" / "objects"  # setuptools' own build_temp is thrown away after an editable install
MODES = ("auto", "cpu", "cuda", "off")

# Each csrc/cpu/*.cpp is compiled once per row (but see ISA_SOURCES); csrc/bindings.cpp chooses among them at run time.
# Portable stays first: templates of the standard library appear in every object and the linker keeps the first copy, which
# must not need AVX-512.
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
ISA_FLAGS["avx512_vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni"]
# Instruction sets that help only some sources; all others are for every source of csrc/cpu.
ISA_SOURCES = {"avx512_vnni": "cpu/quantized_*.cpp"}
# (architecture compiled for, name of the machine code). 80 also serves 86 and 89, 90a has wgmma, later ones take PTX.
CUDA_ARCHS = (("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_100", "sm_100"))


class CannotBuild(Exception):
    """This machine lacks something that the build needs; the message says what and how to get it."""


def build_mode() -> str:
    mode = os.environ.get("ALBERT_FAST_BUILD", "auto").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(f"ALBERT_FAST_BUILD={mode!r}: must be one of {', '.join(MODES)}")
    return mode


def job_count() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(command: list[str]) -> str:
    """Standard output of a command run in ROOT; RuntimeError with the command and what it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\nexit status {done.returncode}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr.rstrip(), file=sys.stderr)
    return done.stdout


def compiles(command: list[str], source: str, suffix: str, link: bool = False) -> str | None:
    """None if `source` compiles with `command`, else what the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe" + suffix)
        path.write_text(source)
        action = ["-shared"] if link else ["-c"]
        try:
            run([*command, *action, str(path), "-o", str(path.with_suffix(".out"))])
        except (RuntimeError, OSError) as error:
            return str(error)
    return None


@dataclass
class Toolchain:
    """The compilers of this machine and their flags."""

    cxx: list[str]
    flags: list[str]
    python: list[str]  # where the headers of pybind11 and Python are; only bindings.cpp sees them
    openmp: list[str] = field(default_factory=list)
    isas: list[str] = field(default_factory=lambda: ["portable"])
    nvcc: list[str] = field(default_factory=list)
    cuda_archs: list[str] = field(default_factory=list)


def cxx_command() -> list[str]:
    """The C++ compiler: $CXX, else the C++ sibling of $CC, else c++, g++ or clang++ from the PATH."""
    if os.environ.get("CXX"):
        wanted = [os.environ["CXX"]]
    elif os.environ.get("CC"):
        sibling = re.sub(r"gcc(?=[^/]*$)", "g++", os.environ["CC"])
        sibling = re.sub(r"clang(?=[^/+]*$)", "clang++", sibling)
        wanted = [re.sub(r"(^|/)cc$", r"\1c++", sibling)]
    else:
        wanted = ["c++", "g++", "clang++"]
    for command in map(shlex.split, wanted):
        if command and shutil.which(command[0]):
            return command
    raise CannotBuild(
        f"no C++ compiler found (looked for {', '.join(wanted)}). Install one, for example with "
        "'apt-get install g++', 'dnf install gcc-c++' or 'xcode-select --install'."
    )


def find_cpp() -> Toolchain:
    """The C++ toolchain, tried on a small program. Raises CannotBuild with the reason."""
    if os.name == "nt":
        raise CannotBuild("the C++ part is built with GCC or Clang, on Linux or macOS; on Windows use WSL.")
    cxx = cxx_command()
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 is not installed. Use 'pip install pybind11', or pip's build isolation.") from None
    include = dict.fromkeys([pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")])
    python = [f"-isystem{folder}" for folder in include]
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG"]
    flags += ["-Wall", "-Wextra", "-Icsrc", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    if said := compiles([*cxx, *flags], "#include <cstdint>\nstd::int32_t zero = 0;\n", ".cpp"):
        raise CannotBuild(f"the C++ compiler does not work: {said}")
    if said := compiles([*cxx, *flags, *python], "#include <Python.h>\n", ".cpp"):
        get = "'apt-get install python3-dev' or 'dnf install python3-devel'"
        raise CannotBuild(f"Python's headers are missing: {get}. {said}")
    return Toolchain(cxx, flags, python)


def add_cpu_features(tools: Toolchain) -> None:
    """Tries OpenMP and the instruction sets that the compiler can be asked for."""
    base = [*tools.cxx, *tools.flags]
    threads = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    if compiles([*base, "-fopenmp"], threads, ".cpp", link=True) is None:
        tools.openmp = ["-fopenmp"]
    else:
        print("albert_fast: this compiler has no OpenMP; the C++ kernels will run on one thread", file=sys.stderr)
    if run([*tools.cxx, "-dumpmachine"]).startswith(("x86_64", "amd64")):
        simd = "#include <immintrin.h>\n__m256i zero() { return _mm256_setzero_si256(); }\n"
        wanted = os.environ.get("ALBERT_FAST_BUILD_ISAS", "").split() or list(ISA_FLAGS)
        extras = {isa: ISA_FLAGS[isa] for isa in ISA_FLAGS if isa in wanted and isa != "portable"}
        tools.isas += [isa for isa, extra in extras.items() if not compiles([*base, *extra], simd, ".cpp")]


def add_cuda(tools: Toolchain) -> None:
    """Adds nvcc and its architectures to the toolchain. Raises CannotBuild with the reason."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        raise CannotBuild("nvcc was not found on the PATH. Install the CUDA toolkit 12 or newer, or set CUDA_HOME.")
    try:
        known = set(run([nvcc, "--list-gpu-code"]).split())
    except (OSError, RuntimeError) as error:
        raise CannotBuild(f"{nvcc} does not work: {error}") from error
    archs = [(virtual, real) for virtual, real in CUDA_ARCHS if real.rstrip("a") in known]
    if not archs:
        raise CannotBuild(f"{nvcc} is too old: it knows none of {', '.join(real for _, real in CUDA_ARCHS)}.")
    command = [nvcc, "-ccbin", tools.cxx[0], "-std=c++17", "-O3", "-DNDEBUG", "-cudart", "static", "-Icsrc"]
    command += ["--threads", str(min(job_count(), len(archs))), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for virtual, real in archs:
        command += ["-gencode", f"arch={virtual},code={real}"]
    newest = next(virtual for virtual, _ in reversed(archs) if not virtual.endswith("a"))
    command += ["-gencode", f"arch={newest},code={newest}"]
    if said := compiles(command, "#include <cstdint>\n__global__ void k(int *x) { *x = 1; }\n", ".cu"):
        raise CannotBuild(f"nvcc does not work with this C++ compiler: {said}")
    tools.nvcc, tools.cuda_archs = command, [real for _, real in archs]


def find_tools(mode: str) -> Toolchain | None:
    """What to build with, or None for an install without the extension."""
    if mode == "off":
        return None
    try:
        return find_cpp()
    except CannotBuild as error:
        if mode != "auto":
            raise SystemExit(f"ALBERT_FAST_BUILD={mode}, but the C++ extension cannot be built: {error}") from None
        print(f"albert_fast: installing without the C++ extension: {error}", file=sys.stderr)
        return None


class BuildExtension(build_ext):
    """Compiles what changed, several files at a time, and links it."""

    def build_extension(self, ext: Extension) -> None:
        assert TOOLS is not None
        add_cpu_features(TOOLS)
        if MODE != "cpu":
            try:
                add_cuda(TOOLS)
            except CannotBuild as error:
                if MODE == "cuda":
                    raise SystemExit(f"ALBERT_FAST_BUILD=cuda, but the CUDA part cannot be built: {error}") from None
                print(f"albert_fast: building without CUDA: {error}", file=sys.stderr)
        units = compile_commands(TOOLS)
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(job_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked in another folder and moved, so that a process which has mapped the old file keeps it.
        with tempfile.TemporaryDirectory(dir=OBJECTS) as folder:
            linked = Path(folder, target.name)
            run([*link_command(TOOLS), *map(str, objects), "-o", str(linked)])
            os.replace(shutil.copy2(linked, target.with_suffix(".new")), target)


def sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in Path(ROOT, CSRC).glob(pattern))


def compile_commands(tools: Toolchain) -> list[tuple[Path, str, list[str]]]:
    """(source, label, command without output) of every object, in the order in which they are linked."""
    defines = [f"-DALBERT_FAST_HAS_{isa.upper()}" for isa in tools.isas]
    if tools.nvcc:
        defines += ["-DALBERT_FAST_CUDA", f'-DALBERT_FAST_CUDA_ARCHS="{",".join(tools.cuda_archs)}"']
    base = [*tools.cxx, *tools.flags, *tools.openmp]
    units = [(CSRC / "bindings.cpp", "bindings", [*base, *tools.python, *defines])]
    for isa in tools.isas:
        command = [*base, *ISA_FLAGS[isa], f"-DALBERT_FAST_ISA={isa}"]
        units += [(source, isa, command) for source in sources(ISA_SOURCES.get(isa, "cpu/*.cpp"))]
    if tools.nvcc:
        units += [(source, "cuda", tools.nvcc) for source in sources("cuda/*.cu")]
    return units


@cache
def compiler_version(compiler: str) -> str:
    return run([compiler, "--version"])


def compile_unit(unit: tuple[Path, str, list[str]]) -> Path:
    """Compiles one source unless its object is newer than everything that went into it. Returns the object's path."""
    source, label, command = unit
    key = hashlib.sha256("\0".join([*command, compiler_version(command[0])]).encode()).hexdigest()[:12]
    target = OBJECTS / f"{source.stem}.{label}.{key}.o"
    depends = target.with_suffix(".d")
    if is_fresh(target, depends):
        return target
    with tempfile.TemporaryDirectory(dir=OBJECTS) as folder:
        made, listed = Path(folder, target.name), Path(folder, depends.name)
        started = time.time()
        run([*command, "-c", str(source), "-MMD", "-MF", str(listed), "-o", str(made)])
        os.utime(made, (started, started))  # a file that is saved while it is being compiled counts as newer
        os.replace(listed, depends)
        os.replace(made, target)
    return target


def is_fresh(target: Path, depends: Path) -> bool:
    """Whether an object exists and none of the files in its make-style dependency list is newer."""
    if not (target.exists() and depends.exists()):
        return False
    names = depends.read_text().replace("\\\n", " ").partition(": ")[2]
    built = target.stat().st_mtime
    files = [ROOT / name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names) if name]
    return all(file.exists() and file.stat().st_mtime < built for file in files)


def link_command(tools: Toolchain) -> list[str]:
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    extra = shlex.split(os.environ.get("LDFLAGS", ""))
    if not tools.nvcc:
        return [*tools.cxx, *shared, *tools.openmp, *extra]
    # nvcc links, since it knows where the toolkit keeps the static run-time library.
    host = [option for flag in [*tools.openmp, *extra] for option in ("-Xcompiler", flag)]
    return [tools.nvcc[0], "-ccbin", tools.cxx[0], *shared, "-cudart", "static", *host]


class EditableInstall(editable_wheel):
    """An editable install without the extension also deletes the one that an earlier install put into the sources."""

    def run(self) -> None:
        if TOOLS is None:
            for stale in (ROOT / "albert_fast").glob("_C.*"):
                if stale.suffix in (".so", ".dylib"):
                    stale.unlink()
        super().run()


MODE = build_mode()
TOOLS = find_tools(MODE)

setup(
    license="Apache-2.0",
    ext_modules=[Extension("albert_fast._C", sources=["csrc/bindings.cpp"])] if TOOLS else [],
    cmdclass={"build_ext": BuildExtension, "editable_wheel": EditableInstall},
)
