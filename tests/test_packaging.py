"""Builds and installs the package as users do: wheel, source archive, editable install, and without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_C.*")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Libraries that are imported only where they are used.
LAZY = (
    *("transformers", "triton", "typer", "tokenizers", "sentencepiece", "sklearn", "huggingface_hub"),
    *("onnxruntime", "openvino", "matplotlib", "pytest"),
)
# One process for the tests that share the built wheel. They take minutes, so a quick run can leave them out.
environment_tests = [pytest.mark.slow_env, pytest.mark.xdist_group("packaging")]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, fails: bool = False) -> str:
    """Runs a command; returns its standard output, or with `fails` what the failing command printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ALBERT_FAST_BUILD")}
    variables = {**inherited, **(env or {})}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True)
    said = f"{done.stdout}\n{done.stderr}"
    assert (done.returncode != 0) == fails, said
    return said if fails else done.stdout


def pip(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None, fails: bool = False) -> str:
    return run(sys.executable, "-m", "pip", "--no-input", *arguments, cwd=cwd, env=env, fails=fails)


def copy_sources(target: Path) -> Path:
    """Copies the sources to `target`, with this checkout's objects, so that only changes are compiled."""
    shutil.copytree(ROOT, target, ignore=IGNORED)
    copy_objects(target)
    return target


def copy_objects(target: Path) -> None:
    if (ROOT / "build" / "objects").is_dir():
        shutil.copytree(ROOT / "build" / "objects", target / "build" / "objects", ignore=shutil.ignore_patterns("tmp*"))


def new_environment(folder: Path) -> Path:
    """The Python of an empty virtual environment; this test's pip installs into it (`pip --python`)."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def lend_libraries(python: Path) -> None:
    """Lets an environment import what this one has installed, after the package itself is in place.

    torch alone is hundreds of megabytes, so it is not installed again. A path file rather than --system-site-packages,
    which from inside a virtual environment would lead to the interpreter's own packages; and path files of a folder
    named in one are not read, so this environment's editable albert_fast stays out of sight.
    """
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=python.parent).strip()
    ours = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    Path(site, "lent.pth").write_text("\n".join(ours) + "\n")


def report(python: Path, cwd: Path, env: dict[str, str] | None = None) -> dict:
    return json.loads(run(python, "-m", "albert_fast.info", "--json", cwd=cwd, env=env))


def cpp_runs(described: dict) -> set[bool]:
    return {row["runs"] for row in described["operators"] if row["backend"] == "cpp"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Skips where pip cannot reach the packages that a build needs; on CI this fails."""
    try:
        pip("download", "-q", "--no-deps", "-d", tmp_path_factory.mktemp("registry"), "pybind11", cwd=ROOT)
    except AssertionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"pip reaches no package registry: {str(error)[-300:]}")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder / "out", cwd=copy_sources(folder / "source"))
    (made,) = (folder / "out").glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(sdist, registry, tmp_path_factory):
    """Built from the source archive, in an environment of pip's own."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.glob("albert_fast-*")
    copy_objects(source)
    pip("wheel", "-q", "--no-deps", "-w", folder / "out", source, cwd=folder)
    (made,) = (folder / "out").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory):
    """The environment of a machine without any compiler."""
    return {"PATH": str(tmp_path_factory.mktemp("empty_path")), "CC": "/nowhere/cc", "CXX": "", "CUDA_HOME": ""}


class TestArchives:
    pytestmark = environment_tests

    def test_wheel_holds_what_users_need_and_nothing_else(self, wheel):
        names = zipfile.ZipFile(wheel).namelist()
        tops = {name.partition("/")[0] for name in names}
        assert {top.partition("-")[0] for top in tops} == {"albert_fast"}, tops
        assert {top for top in tops if not top.endswith(".dist-info")} == {"albert_fast"}
        here = {str(path.relative_to(ROOT)) for path in (ROOT / "albert_fast").rglob("*.py")}
        here = {name for name in here if not name.startswith("albert_fast/testing/")}  # for tests and benchmarks alone
        here |= {f"albert_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
        data = [path for path in (ROOT / "albert_fast" / "data").rglob("*") if path.is_file()]
        here |= {str(path.relative_to(ROOT)) for path in data if "__pycache__" not in path.parts}
        extension = f"albert_fast/_C{SUFFIX}"
        inside = {name for name in names if ".dist-info/" not in name}
        assert inside == here | {extension, "albert_fast/py.typed"}

    def test_sdist_holds_what_a_build_and_a_test_run_need(self, sdist):
        with tarfile.open(sdist) as archive:
            inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
        folders = ("albert_fast", "kernels", "csrc", "tests", "benchmarks", "examples")
        kinds = (".py", ".cpp", ".h", ".cu", ".cuh", ".json", ".safetensors", ".typed")
        files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
        wanted = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
        wanted |= {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md"}
        assert wanted - inside == set()
        assert not [name for name in inside if name.endswith((".so", ".o", ".pyc"))]


class TestInstalls:
    pytestmark = environment_tests

    def test_wheel_in_a_new_environment(self, wheel, tmp_path):
        python = new_environment(tmp_path / "venv")
        pip("--python", python, "install", "-q", "--no-deps", wheel, cwd=tmp_path)
        lend_libraries(python)
        show = "import albert_fast, albert_fast.kernels, albert_fast._C as c; print(albert_fast.__file__, c.__file__)"
        for place in (tmp_path, Path("/")):
            files = run(python, "-c", f"from albert_fast import ALBERTModel; {show}", cwd=place).split()
            assert [Path(file).is_relative_to(tmp_path / "venv") for file in files] == [True, True], files
        described = report(python, tmp_path)
        assert cpp_runs(described) == {True}
        archs = ["sm_80", "sm_90a", "sm_100"] if shutil.which("nvcc") else []
        assert described["machine"]["extension"]["cuda_archs"] == archs, "CUDA is compiled in where nvcc is, GPU or not"
        version = run(python.parent / "albert-fast", "--version", cwd=tmp_path)
        assert version.split()[-1] == described["machine"]["albert_fast"]

    @pytest.mark.thorough  # the README's commands, which .ci/run runs, install like this
    def test_editable_install_under_build_isolation(self, registry, tmp_path):
        source = copy_sources(tmp_path / "source")
        python = new_environment(tmp_path / "venv")
        pip("--python", python, "install", "-q", "--no-deps", "-e", source, cwd=tmp_path)
        lend_libraries(python)
        assert cpp_runs(report(python, tmp_path)) == {True}
        # new modules appear without a reinstall, in the mapped folder too
        (source / "kernels" / "probe.py").write_text("WHERE = __name__\n")
        assert run(python, "-c", "import albert_fast.kernels.probe as p; print(p.WHERE)", cwd=tmp_path).strip() == (
            "albert_fast.kernels.probe"
        )

    @pytest.mark.thorough  # half a minute; TestModes has the error where a compiler was asked for
    def test_without_a_compiler(self, registry, bare_path, tmp_path):
        source = copy_sources(tmp_path / "source")
        python = new_environment(tmp_path / "venv")
        pip("wheel", "-q", "--no-deps", "-w", tmp_path / "out", source, cwd=tmp_path, env=bare_path)
        (made,) = (tmp_path / "out").glob("*.whl")
        assert made.name.endswith("-py3-none-any.whl"), "a wheel without machine code says so"
        pip("--python", python, "install", "-q", "--no-deps", made, cwd=tmp_path)
        lend_libraries(python)
        described = report(python, tmp_path, bare_path)
        assert cpp_runs(described) == {False}
        assert described["machine"]["extension"] is None
        on_cpu = [row for row in described["operators"] if row["device"] == "cpu" and row["chosen"]]
        assert {row["backend"] for row in on_cpu} == {"reference"}
        assert [line for line in described["advice"] if "no C++ compiler" in line and "apt-get install g++" in line]
        text = run(python, "-m", "albert_fast.info", cwd=tmp_path, env=bare_path)
        assert "no C++ compiler" in text
        model = "from albert_fast import ALBERTConfig, ALBERTModel; import torch; c = ALBERTConfig(vocab_size=9, "
        model += "embedding_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8); "
        model += "print(*ALBERTModel(c).eval()(torch.tensor([[2, 5, 3]])).last_hidden_state.shape)"
        assert run(python, "-c", model, cwd=tmp_path).split() == ["1", "3", "16"]

    def test_off_builds_nothing_and_drops_an_older_extension(self, tmp_path):
        source = copy_sources(tmp_path / "source")
        python = new_environment(tmp_path / "venv")
        stale = source / "albert_fast" / f"_C{SUFFIX}"
        stale.write_bytes(b"from an earlier install")
        install = ("--python", python, "install", "-q", "--no-deps", "--no-build-isolation", "-e", source)
        lend_libraries(python)  # setuptools, for a build without isolation
        pip(*install, cwd=tmp_path, env={"ALBERT_FAST_BUILD": "off"})
        assert not stale.exists()
        assert cpp_runs(report(python, tmp_path)) == {False}


class TestModes:
    """setup.py where ALBERT_FAST_BUILD asks for what this machine cannot build."""

    def setup(self, mode: str, env: dict[str, str], tmp_path: Path, fails: bool) -> str:
        command = ("setup.py", "-q", "bdist_wheel", "-d", tmp_path / "out", "-b", tmp_path / "bdist")
        variables = {**env, "ALBERT_FAST_BUILD": mode}
        return run(sys.executable, *command, cwd=tmp_path / "source", env=variables, fails=fails)

    @pytest.mark.parametrize("mode", ["cpu", "cuda"])
    def test_asked_for_without_a_compiler(self, mode, bare_path, tmp_path):
        copy_sources(tmp_path / "source")
        said = self.setup(mode, bare_path, tmp_path, fails=True)
        assert f"ALBERT_FAST_BUILD={mode}, but the C++ extension cannot be built" in said

    def test_unknown_mode(self, tmp_path):
        copy_sources(tmp_path / "source")
        assert "must be one of auto, cpu, cuda, off" in self.setup("fast", {}, tmp_path, fails=True)

    @pytest.mark.thorough  # it compiles and links the whole extension
    def test_an_nvcc_that_does_not_work(self, tmp_path):
        if shutil.which("c++") is None:
            pytest.skip("no C++ compiler on the PATH")
        copy_sources(tmp_path / "source")
        broken = tmp_path / "cuda" / "bin" / "nvcc"
        broken.parent.mkdir(parents=True)
        broken.write_text("#!/bin/sh\necho no device files >&2\nexit 1\n")
        broken.chmod(0o755)
        env = {"CUDA_HOME": str(tmp_path / "cuda")}
        said = self.setup("cuda", env, tmp_path, fails=True)
        assert "ALBERT_FAST_BUILD=cuda, but the CUDA part cannot be built" in said
        assert "no device files" in said
        self.setup("auto", env, tmp_path, fails=False)
        (made,) = (tmp_path / "out").glob("*.whl")
        assert f"albert_fast/_C{SUFFIX}" in zipfile.ZipFile(made).namelist()

    def test_cuda_asked_for_without_nvcc(self, tmp_path):
        if shutil.which("c++") is None:
            pytest.skip("no C++ compiler on the PATH")
        copy_sources(tmp_path / "source")
        said = self.setup("cuda", {"CUDA_HOME": str(tmp_path)}, tmp_path, fails=True)
        assert "ALBERT_FAST_BUILD=cuda, but the CUDA part cannot be built: nvcc was not found" in said


def loaded_by(statement: str, cwd: Path) -> set[str]:
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(run(sys.executable, "-c", code, cwd=cwd).split())


@pytest.mark.parametrize("statement", ["import albert_fast", "from albert_fast import ALBERTModel"])
def test_import_loads_nothing_heavy_from_any_directory(statement, tmp_path):
    from_torch = loaded_by("import torch", tmp_path)
    assert loaded_by(statement, tmp_path) & set(LAZY) - from_torch == set()


def test_describe_goes_into_json(tmp_path):
    described = report(Path(sys.executable), tmp_path)
    machine = described["machine"]
    assert machine["cpu"]["usable_cpus"] >= 1
    assert machine["threads"]["torch"] >= 1
    assert machine["libraries"]["torch"]
    assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
    for row in described["operators"]:
        assert row["runs"] == (row["reason"] is None)
    for op in {row["operator"] for row in described["operators"]}:
        rows = [row for row in described["operators"] if row["operator"] == op and row["device"] == "cpu"]
        assert [row["chosen"] for row in rows].count(True) == 1, "exactly one backend runs an operator on the CPU"
