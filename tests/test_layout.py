"""The laws of the repository: operators are complete, files are on floors and import from below, files are short."""

from __future__ import annotations

import ast
import importlib
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
# Operators that are made of others on a CPU, and so have no C++ source: a library multiplies and bias_gelu activates;
# embedding_layer_norm looks up and linear multiplies.
WITHOUT_CPP_SOURCE = {"linear_gelu", "embedding_projection"}
# The only libraries that modules import when they are loaded.
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


# A source without an operator: the C++ product that runtime/linear.py calls.
SHARED_SOURCES = {"linear"}


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


def test_triton_has_the_operators_numbers():
    pytest.importorskip("triton")
    from albert_fast.kernels import _common, _labelled_rows, encoder

    from albert_fast.ops import _dropout
    from albert_fast.ops.linear_cross_entropy import IGNORED

    assert _common.HEAD_STRIDE.value == _dropout.HEAD_STRIDE
    assert _labelled_rows.IGNORED.value == IGNORED
    assert encoder.MAX_HEAD_DIM == ops.MAX_KERNEL_HEAD_DIM


@pytest.mark.parametrize(
    ("op", "file", "lists"),
    [
        ("encoder", "_encoder_weights", ["WEIGHTS"]),
        ("quantized_encoder", "quantized_encoder", ["VECTORS", "PRODUCTS", "PRODUCT_TENSORS"]),
    ],
)
def test_a_triton_kernel_with_tensors_in_another_order_is_refused(op, file, lists, monkeypatch):
    pytest.importorskip("triton")
    kernel = importlib.import_module(f"albert_fast.kernels.{file}")
    load = importlib.import_module(f"albert_fast.ops.{op}")._triton_kernel.__wrapped__
    assert load() is importlib.import_module(f"albert_fast.kernels.{op}")
    for name in lists:
        with monkeypatch.context() as patch:
            patch.setattr(kernel, name, getattr(kernel, name)[::-1])
            with pytest.raises(ImportError, match=rf"{kernel.__name__} has {name} = "):
                load()


# Folder of the package -> its floor. A file imports from floors below its own and from its own folder, and nothing else of
# the package. `_C` is the extension. Serving will stand on floor 8 too.
FLOORS = {
    "_C": 0,
    "kernels": 0,
    "runtime": 1,
    "ops": 2,
    "layers": 3,
    "text": 3,
    "checkpoints": 4,
    "execution": 4,
    "generation": 4,
    "quantization": 4,
    "models": 5,
    "accelerate": 6,
    "inspect": 6,
    "tasks": 7,
    "training": 7,
    "recipes": 8,
    "commands": 9,
    "cli": 9,
}
# Top-level files that are public import paths: they re-export, and no file of the package imports them.
PUBLIC_MODULES = {"info", "tokenization", "reference", "config", "weights", "dispatch"}
# Every file at the top of the package; `albert_fast` is its __init__.py, from which no file imports.
TOP_FILES = PUBLIC_MODULES | {"cli", "albert_fast"}
TEST_ONLY = "testing"  # on no floor: only tests and benchmarks import it

# Every file of the package, by folder, beside its __init__.py. A new file needs its name here, so that no file is added unseen.
FILES = {
    "albert_fast": "cli config dispatch info reference tokenization weights",
    "albert_fast/accelerate": "api calls families forward masks padded patching plans reduced samples stacks state view",
    "albert_fast/checkpoints": (
        "families hub saving sentence_modules tensorflow_files tensorflow_names tensorflow_process weights"
    ),
    "albert_fast/commands": (
        "_compare _errors _lines _options _progress _sinks answer bench choose classify convert demo encode evaluate "
        "fill_mask info pretrain quantize rerank tag train translate"
    ),
    "albert_fast/execution": "capture graphs",
    "albert_fast/generation": "options search",
    "albert_fast/inspect": "explain info profiling timing",
    "albert_fast/layers": (
        "adapters attention cache embeddings encoded inputs layer packed packing prepared quantized run single_layers "
        "spec stack wanted watched"
    ),
    "albert_fast/models": (
        "albert auto bert config config_attributes config_checks decoder distilbert electra encoder_config "
        "encoder_model execution head_model heads load_arguments losses model_methods outputs pretrained roberta "
        "seq2seq seq2seq_config task_models"
    ),
    "albert_fast/models/reference": "albert heads losses",
    "albert_fast/ops": (
        "_columns _dropout _dtypes _encoder_call _graph_inputs _integers _lookup _reports _schema _stages "
        "_token_errors _torch add_layer_norm attention bias_gelu embedding_layer_norm embedding_projection encoder "
        "gelu_layer_norm linear_cross_entropy linear_gelu quantized_encoder"
    ),
    "albert_fast/quantization": "calibration rounding",
    "albert_fast/recipes": "baselines english english_texts multi30k report task_texts tasks",
    "albert_fast/runtime": (
        "derived devices dispatch files kept_operands linear locking modes operands progress registration "
        "unused_gradients user_warnings version"
    ),
    "albert_fast/tasks": (
        "answer choose classify convert embed errors fill_mask loading output_folder parquet_vectors pooling quantize "
        "score sentence_steps tag token_batches translate vector_files"
    ),
    "albert_fast/testing": (
        "accelerated_models case cases covering encoder_cases family_pairs google_checkpoints hostile model_pairs "
        "parity seq2seq_pairs small_checkpoints tolerances"
    ),
    "albert_fast/testing/gpu": "compile_check costs coverage cubins fake_graphs floors launches recording tf32",
    "albert_fast/text": (
        "aligned_files batching conll_files documents line_reader normalization parquet_files saved_datasets spans "
        "squad_files text_files tokenizer vocabulary vocabulary_training windows words"
    ),
    "albert_fast/training": (
        "baseline checkpointing checks corpus curves data distill distributed evaluate fit interrupts loop masking "
        "metrics optimization plots pretrain pretrain_config pretrain_run progress recipe run segments sources "
        "starting_weights"
    ),
    "albert_fast/training/tasks": "answer base choose tag texts translate",
    "kernels": (
        "_attention_gradients _attention_tiles _capture _common _encoder_phases _encoder_weights _graph_inputs "
        "_labelled_rows _layer_norm _matmul _precision _rounding _tuning _vocabulary add_layer_norm attention "
        "attention_bwd bias_gelu embedding_layer_norm encoder gelu_layer_norm linear_cross_entropy linear_gelu "
        "quantized_encoder"
    ),
}


def package_imports(path: Path, modules: set[str]) -> Iterator[str]:
    """The modules of the package that a file imports, inside functions and for types too."""
    for name, _ in imports(path):
        if within(name, {"albert_fast"}):
            # the last part of `from .stack import LayerStack` is no module
            yield name if name in modules or name == "albert_fast._C" else name.rpartition(".")[0]


def package_modules() -> dict[str, Path]:
    return {module_name(path): path for path in python_files(*PACKAGE_FOLDERS)}


def folder_of(module: str) -> str:
    """The folder of a module, or the name of a file at the top."""
    return module.split(".")[1] if "." in module else module


def test_every_folder_of_the_package_has_a_floor():
    folders = {folder_of(module) for module in package_modules()}
    assert folders == set(FLOORS) - {"_C"} | TOP_FILES | {TEST_ONLY}


def test_every_file_of_the_package_is_listed():
    found: dict[str, set[str]] = {}
    for path in python_files(*PACKAGE_FOLDERS):
        found.setdefault(str(path.parent.relative_to(ROOT)), set()).add(path.stem)
    for folder in sorted({*found, *FILES}):
        assert found.get(folder, set()) == {"__init__", *FILES.get(folder, "").split()}, f"FILES, of {folder}"


def test_every_file_says_what_it_is_for():
    paths = python_files(*PACKAGE_FOLDERS, "tests", "benchmarks")
    assert [str(path) for path in paths if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_files_import_from_floors_below():
    modules = package_modules()
    wrong = set()
    for module, path in modules.items():
        folder = folder_of(module)
        if folder in PUBLIC_MODULES or folder in (TEST_ONLY, "albert_fast"):
            continue
        for name in package_imports(path, set(modules)):
            target = folder_of(name)
            if target != folder and FLOORS.get(target, len(FLOORS)) >= FLOORS[folder]:
                wrong.add(f"{module} imports {name}")
    assert sorted(wrong) == []


def test_no_file_imports_itself_in_a_circle():
    modules = package_modules()
    graph = {module: set(package_imports(path, set(modules))) & set(modules) for module, path in modules.items()}
    done: set[str] = set()
    circles: list[str] = []

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            circles.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    assert circles == []


def test_only_operators_import_kernels():
    modules = package_modules()
    for module, path in modules.items():
        if folder_of(module) not in ("kernels", "ops", TEST_ONLY):
            wanted = {name for name in package_imports(path, set(modules)) if folder_of(name) in ("kernels", "_C")}
            assert wanted == set(), f"{module} imports {wanted}: ops/ is the way to kernels"


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


def test_pyproject_lists_every_package_that_users_need():
    folders = {path.parent for path in python_files(*PACKAGE_FOLDERS)}
    found = sorted(module_name(folder / "__init__.py") for folder in folders)
    found = [name for name in found if not within(name, {f"albert_fast.{TEST_ONLY}"})]
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
