"""The laws of the repository: an operator has all of its parts, layers import downwards only, files stay short."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import albert_fast
from albert_fast import ops
from albert_fast.inspect import info
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FOLDERS = ("albert_fast", "kernels")
MAX_LINES = 450
OPERATORS = sorted(dispatch.TABLE)
# On a CPU its product is a library's and its activation bias_gelu's: there is no source of its own to look for.
WITHOUT_CPP_SOURCE = {"linear_gelu"}
# Peers and heavy libraries: never needed to import albert_fast, so never imported where a module is loaded.
BASE_LIBRARIES = {"torch", "numpy", "safetensors"}


def module_name(path: Path) -> str:
    """The dotted name under which a source file of the package is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("albert_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module name, whether it is imported as soon as the file is loaded) of every import in a file."""
    tree = ast.parse(path.read_text())
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    typing_only = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    late = {id(inner) for node in (*functions, *typing_only) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            # `from .. import ops` names modules; `from ..ops import attention` names the function or the module
            yield from ((f"{name}.{alias.name}", id(node) not in late) for alias in node.names)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_has_all_of_its_parts(op):
    backends = {backend for choices in dispatch.TABLE[op].values() for backend in choices}
    wanted = [f"albert_fast/ops/{op}.py", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"]
    folders = {"cpp": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu", "triton": "kernels/{}.py"}
    borrowed = {"reference", "cpp"} if op in WITHOUT_CPP_SOURCE else {"reference"}
    wanted += [folders[backend].format(op) for backend in sorted(backends - borrowed)]
    assert [path for path in wanted if not (ROOT / path).is_file()] == []
    assert {"cpp", "reference"} <= backends, "every operator runs on a CPU, and has a reference"
    assert {"triton", "cuda"} & backends, "every operator has a GPU kernel"
    assert callable(getattr(ops, op)), "the public function"
    assert callable(getattr(ops, f"{op}_ref")), "the reference"
    assert hasattr(torch.ops.albert_fast, f"{op}_fwd"), "registered with torch.library"
    assert ALL_CASES[op].name == op
    shown = {(row["device"], row["backend"]) for row in info.operators() if row["operator"] == op}
    assert shown == {(device, backend) for device, choices in dispatch.TABLE[op].items() for backend in choices}


# Files of no operator: the C++ product of modules outside fused operators, which albert_fast/runtime/linear.py calls; and what
# a layer's weights are.
SHARED_SOURCES = {"linear", "schema"}


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [("albert_fast/ops", "[!_]*.py"), ("kernels", "[!_]*.py"), ("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu")],
)
def test_no_part_without_an_operator(folder, pattern):
    # a Triton backward may have a file of its own
    assert {path.stem.removesuffix("_bwd") for path in (ROOT / folder).glob(pattern)} <= set(OPERATORS) | SHARED_SOURCES


def test_every_case_is_an_operator():
    assert sorted(ALL_CASES) == OPERATORS


def test_triton_launchers_are_named_after_their_operator():
    for op in OPERATORS:
        if "triton" in dispatch.TABLE[op]["cuda"]:
            files = sorted((ROOT / "kernels").glob(f"{op}*.py"))
            trees = [ast.parse(path.read_text()) for path in files]
            names = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
            # All layers are the work of several kernels.
            kernels = set() if op in dispatch.WHOLE_ENCODERS else {f"_{op}_fwd_kernel"}
            assert {f"{op}_fwd"} | kernels <= names, f"{[path.name for path in files]} define {sorted(names)}"


def test_kernels_import_torch_and_triton_alone():
    for path in python_files("kernels"):
        for name, _ in imports(path):
            allowed = within(name, {"torch", "triton", "albert_fast.kernels"})
            assert allowed or name.partition(".")[0] in sys.stdlib_module_names, f"{path}: {name}"


ABOVE = {"training", "commands", "cli", "testing"}
BELOW = {"kernels", "_C"}  # reached through ops alone
# layer -> the parts of albert_fast that it may not import
TOP = {"modeling", "fast_model", "graphs", "capture", "encoder", "heads", "reference", "pretrained", "weights", "tokenization",
       "plan", "info"}  # fmt: skip
APART = {
    "dispatch.py": ABOVE | TOP | {"ops", "kernels", "packing", "gemm"},
    "registration.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch"},
    "derived.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration"},
    "operands.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration"},
    "gemm.py": ABOVE | BELOW | TOP | {"ops", "packing"},
    "unused_gradients.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration"},
    "packing.py": ABOVE | BELOW | TOP | {"ops", "gemm"},
    "locking.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration", "config"},
    "line_reader.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration", "text_files"},
    "text_files.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration"},
    "losses.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm"},
    "config.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration"},
    "weights.py": ABOVE
    | BELOW
    | {"ops", "packing", "gemm", "dispatch", "pretrained", "modeling", "encoder", "heads", "reference", "tokenization"},
    "_hub.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "config"},
    "sentence_modules.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "config"},
    "config_attributes.py": ABOVE | BELOW | (TOP - {"weights"}) | {"ops", "packing", "gemm", "dispatch"},
    "load_arguments.py": ABOVE | BELOW | (TOP - {"weights"}) | {"ops", "packing", "gemm", "dispatch"},
    "model_methods.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch"},
    "head_model.py": ABOVE | BELOW | {"heads", "reference", "tokenization"},
    "pretrained.py": ABOVE
    | BELOW
    | {"ops", "packing", "gemm", "modeling", "encoder", "heads", "reference", "tokenization"},
    "files.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration", "config"},
    "_config_checks.py": ABOVE | BELOW | TOP | {"ops", "packing", "gemm", "dispatch", "registration"},
    "calibration.py": ABOVE | BELOW | {"graphs", "fast_model", "heads", "reference", "tokenization", "weights"},
    "quantized_checkpoint.py": ABOVE | BELOW | {"ops", "packing", "gemm", "dispatch", "reference"},
    "quantization.py": ABOVE | BELOW | TOP | {"packing", "gemm", "dispatch"},
    "plan.py": ABOVE | BELOW | {"reference", "tokenization", "weights"},
    "info.py": ABOVE | BELOW | {"ops", "modeling", "encoder", "heads", "reference", "tokenization", "weights"},
    "ops": ABOVE | TOP,
    "capture.py": ABOVE | BELOW | {"graphs", "fast_model", "encoder", "heads", "reference", "tokenization"},
    "graphs.py": ABOVE | BELOW | {"fast_model", "heads", "reference", "tokenization"},
    "fast_model.py": ABOVE | BELOW | {"heads", "reference", "tokenization"},
    "modeling.py": ABOVE | BELOW | {"heads", "reference", "tokenization"},
    "encoder.py": ABOVE | BELOW | {"reference", "tokenization"},
    "heads.py": ABOVE | BELOW | {"reference", "tokenization"},
    "reference.py": ABOVE | BELOW | {"ops", "modeling", "encoder", "heads"},
    "tokenization.py": ABOVE | BELOW | {"ops", "modeling", "encoder", "heads"},
    "training": BELOW | {"ops", "registration", "commands", "cli"},
    "commands": BELOW | {"ops", "registration"},
}


@pytest.mark.parametrize("layer", sorted(APART))
def test_layers_import_downwards(layer):
    place = ROOT / "albert_fast" / layer
    forbidden = {f"albert_fast.{part}" for part in APART[layer]}
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files, f"{place} is gone: move its rule along with it"
    for path in files:
        for name, _ in imports(path):
            assert not within(name, forbidden), f"{path}: {name}"


def test_only_torch_numpy_and_safetensors_load_with_the_package():
    apart = {ROOT / "albert_fast" / folder for folder in ("commands", "testing")}  # typer and pytest belong to these
    for path in python_files("albert_fast"):
        if apart.intersection(path.parents):
            continue
        for name, at_load in imports(path):
            top = name.partition(".")[0]
            fine = top in BASE_LIBRARIES or top == "albert_fast" or top in sys.stdlib_module_names
            assert fine or not at_load, f"{path}: {name} is imported when the module is loaded"
            assert top != "triton", f"{path}: {name}: Triton belongs to kernels/"


def test_tests_and_benchmarks_do_not_import_each_other():
    names = {"tests": set(), "benchmarks": set()}
    for folder, found in names.items():
        found.update({folder}, (path.stem for path in python_files(folder)))
    for folder, other in (("tests", "benchmarks"), ("benchmarks", "tests"), ("tests", "tests")):
        for path in python_files(folder):
            for name, _ in imports(path):
                assert name.partition(".")[0] not in names[other] - {"conftest"}, f"{path}: {name}"


def test_nobody_imports_kernels_by_its_folder():
    # the name on PyPI belongs to another package, which transformers looks for
    for path in python_files("albert_fast", "kernels", "tests", "benchmarks"):
        assert not any(within(name, {"kernels"}) for name, _ in imports(path)), path
    assert not (ROOT / "tests" / "__init__.py").exists(), "it would put the root, and so kernels/, on sys.path"


def test_csrc_includes_no_torch_and_pybind11_in_one_place():
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.*")) if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert len(sources) > 5
    for path in sources:
        headers = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)
        assert not [name for name in headers if re.match(r"(torch|ATen|c10|caffe2)/", name)], path
        if path.name != "bindings.cpp":
            assert not [name for name in headers if name.startswith(("pybind11/", "Python.h"))], path


def test_files_stay_short():
    files = python_files("albert_fast", "kernels", "tests", "benchmarks")
    files += [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in [ROOT / "setup.py", *files]}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_pyproject_lists_every_package():
    folders = {path.parent for path in python_files(*PACKAGE_FOLDERS)}
    found = sorted(module_name(folder / "__init__.py") for folder in folders)
    assert pyproject()["tool"]["setuptools"]["packages"] == found
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_one_version():
    version = pyproject()["project"]["version"]
    assert albert_fast.__version__ == version
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_what_the_extras_name(python):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    machine = {"python_version": python, "sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    pinned: dict[str, str] = {}
    for pin in pins:
        if pin.marker is None or pin.marker.evaluate(machine):
            assert pin.name not in pinned, f"{pin.name} is pinned twice for Python {python}"
            assert re.fullmatch(r"==[^*]+", str(pin.specifier)), f"{pin} is no pin"
            pinned[pin.name] = str(pin.specifier).removeprefix("==")
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *pyproject()["build-system"]["requires"]]
    wanted += [line for extra in project["optional-dependencies"].values() for line in extra]
    for need in map(Requirement, wanted):
        name = need.name.lower().replace("_", "-")
        if name != project["name"]:
            assert need.specifier.contains(pinned[name]), f"{need}: constraints.txt has {pinned.get(name)}"
    assert pinned["torch"] == "2.13.0"


def test_readme_and_ci_install_with_the_same_command():
    install = 'pip install -c constraints.txt -e ".[test]"'
    for name in ("README.md", ".ci/run", "CONTRIBUTING.md"):
        assert install in (ROOT / name).read_text(), f"{name} lacks {install}"
