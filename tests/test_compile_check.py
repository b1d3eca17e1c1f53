"""Every GPU kernel compiles for three generations of chips without spills, and the check of that fails for bad kernels."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from albert_fast.runtime import dispatch
from albert_fast.testing.gpu import compile_check, coverage, launches

pytestmark = pytest.mark.xdist_group("compile check")  # one process, which compiles every kernel once
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
NEEDS = {"embedding_projection": [needs_triton, needs_nvcc]}  # cuobjdump comes with triton
KERNELS = [pytest.param(name, marks=NEEDS.get(name, needs_triton)) for name in compile_check.KERNELS]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def skipped(item: pytest.Item) -> bool:
    return any(mark.args[0] for mark in item.iter_markers("skipif"))


def run_apart(*command: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """A fresh interpreter, in which Triton compiles: this process has it interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), env.get("PYTHONPATH", "")]))
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def check(kernels: list[str], folder: Path) -> dict[str, list[dict]]:
    file = folder / f"{kernels[0]}.json"
    done = run_apart("-m", "albert_fast.testing.gpu.compile_check", "--kernel", *kernels, "--json", str(file))
    said = done.stdout + done.stderr
    assert done.returncode in (0, 1), said
    found = json.loads(file.read_text())
    assert done.returncode == any(row["problem"] for row in found), said
    return {kernel: [row for row in found if row["kernel"] == kernel] for kernel in kernels}


@pytest.fixture(scope="module")
def rows(request, tmp_path_factory):
    """kernel -> its rows, compiled once: those of the selected tests together, another one when it is asked for."""
    ours = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = {item.callspec.params.get("kernel") for item in ours if not skipped(item)}
    together = [kernel for kernel in compile_check.KERNELS if kernel in selected]
    folder, found = tmp_path_factory.mktemp("compile_check"), {}

    def of(kernel: str) -> list[dict]:
        if kernel not in found:
            found.update(check(together if kernel in together else [kernel], folder))
        return found[kernel]

    return of


RECORDED = """
import json, sys
from albert_fast.testing.gpu import compile_check, coverage, launches
capabilities = [chip.capability for chip in compile_check.CHIPS]
recorded = launches.recorded_launches(*launches.CASES)
chosen = coverage.covering(recorded, capabilities)
assert chosen == coverage.covering(recorded, capabilities), "the choice is the same every time"
names = ("kernel", "label", "tiles", "function", "numbers", "multiplies", "flags")
json.dump(
    [
        {name: getattr(launch, name) for name in names} | {"compiled": [c for c in capabilities if (launch, c) in chosen]}
        for launch in recorded
    ],
    sys.stdout,
)
"""


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    """Every launch that `--all` compiles, with the capabilities of the chips for which the short check compiles it."""
    done = run_apart("-c", RECORDED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tiles_of(recorded: list[dict], kernel: str) -> set[tuple[str, str, str]]:
    """(type of operands, last word of the label, tiles) of a kernel's launches."""
    own = [launch for launch in recorded if launch["kernel"] == kernel]
    return {(launch["label"].split()[0], launch["label"].split()[-1], launch["tiles"]) for launch in own}


def test_every_operator_is_checked():
    on_gpu = [op for op, devices in dispatch.TABLE.items() if {"triton", "cuda"} & set(devices["cuda"])]
    assert sorted(compile_check.OPERATORS) == sorted(on_gpu)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles_without_spills(rows, kernel):
    chips = {chip.name: chip for chip in compile_check.CHIPS}
    assert {row["chip"] for row in rows(kernel)} == set(chips)
    for row in rows(kernel):
        assert row["problem"] == ""
        assert row["spills"] == row["stack_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= chips[row["chip"]].shared_bytes
        if kernel == "embedding_projection":  # its launches are not recorded
            assert row["bytes"] is row["operations"] is row["floor_us"] is None
        else:
            assert row["bytes"] > 0
            assert row["floor_us"]["H100"] >= row["bytes"] / 3.35e12 * 1e6
            assert (row["floor_us"]["A100"] is None) == (row["label"].startswith("fp8") and "product" in row["label"])


@needs_triton
def test_attention_multiplies_on_each_chips_own_tensor_cores(rows):
    best = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for row in rows("attention"):
        if row["label"].startswith("f32"):
            assert row["tensor_cores"] == "", "float32 must not be rounded to TF32"
        elif " Q16 " in row["label"] and not row["label"].endswith("dkdv"):
            assert "HMMA" in row["tensor_cores"], "16 queries are too few for a warpgroup"
        else:
            assert best[row["chip"]] in row["tensor_cores"].split(), row


@needs_triton
def test_quantized_products_are_on_tensor_cores_of_8_bits(rows):
    # Triton has no int8 product for Blackwell's tcgen05: there it is Ampere's.
    best = {("int8", "sm_80"): "IMMA", ("int8", "sm_90"): "IGMMA", ("int8", "sm_100"): "IMMA",
            ("fp8", "sm_90"): "QGMMA", ("fp8", "sm_100"): "UTCQMMA"}  # fmt: skip
    products = [row for row in rows("quantized_encoder") if row["label"].endswith("product")]
    assert {(row["label"].split()[0], row["chip"]) for row in products} == set(best)
    for row in products:
        assert row["tensor_cores"].split()[0] == best[row["label"].split()[0], row["chip"]], row


@needs_triton
@needs_nvcc
def test_embedding_projection_multiplies_on_tensor_cores_but_float32(rows):
    forward = [row for row in rows("embedding_projection") if row["label"].startswith("fwd<")]
    assert len(forward) < len(rows("embedding_projection")), "the gradient, whose products are torch's"
    for row in forward:
        assert row["label"].startswith("fwd<float") == (row["tensor_cores"] == ""), row


@needs_triton
def test_every_tile_of_attention_is_recorded(recorded):
    from albert_fast.kernels._attention_tiles import MAX_HEAD_DIM, attention_bwd_tiles, attention_tiles

    def candidates(numbers, head_dim, queries, keys):
        dtype, tf32 = launches.NUMBERS[numbers], numbers == "tf32"
        dq, dkdv = attention_bwd_tiles(head_dim, dtype, queries, keys, tf32=tf32)
        return {"fwd": attention_tiles(head_dim, dtype, queries, tf32=tf32), "bwd_dq": dq, "bwd_dkdv": dkdv}

    wanted, lengths = set(), (1, 16, 17, 64, 65, 128, 512, 100_000)
    for head_dim, queries, keys in itertools.product(range(1, MAX_HEAD_DIM + 1), lengths, lengths):
        for name in ("f32", "bf16", "tf32"):
            for part, choice in candidates(name, head_dim, queries, keys).items():
                for tiles in choice:
                    sizes = [f"{size[-1]}{tiles[size]}" for size in ("BLOCK_D", "BLOCK_M", "BLOCK_N", "CHUNK_D")]
                    shape = " ".join([*sizes, f"warps{tiles['num_warps']}", f"stages{tiles['num_stages']}"])
                    wanted.add((name, part, shape))
        assert candidates("f16", head_dim, queries, keys) == candidates("bf16", head_dim, queries, keys)
    assert {launch for launch in tiles_of(recorded, "attention") if launch[0] != "f16"} == wanted


@needs_triton
def test_every_tile_of_linear_cross_entropy_is_recorded_and_on_tensor_cores_but_float32(rows, recorded):
    from albert_fast.kernels._vocabulary import MAX_WIDTH, linear_cross_entropy_tiles

    products = [row for row in rows("linear_cross_entropy") if " N" in row["tiles"]]
    assert {row["label"].split()[-1] for row in products} == {"fwd", "bwd_x", "bwd_weight"}
    for row in products:
        assert row["label"].startswith("f32") == (row["tensor_cores"] == ""), row
    for name in ("f32", "bf16", "tf32"):
        numbers = launches.NUMBERS[name], name == "tf32"
        tiles = [linear_cross_entropy_tiles(width, *numbers) for width in range(1, MAX_WIDTH + 1)]
        sizes = ("BLOCK_M", "BLOCK_N", "BLOCK_E", "CHUNK_E", "BLOCK_O")
        options = ("num_warps", "num_stages")
        wanted = {" ".join([*(f"{s[-1]}{t[s]}" for s in sizes), *(f"{o[4:]}{t[o]}" for o in options)]) for t in tiles}
        found = {tiles for numbers, part, tiles in tiles_of(recorded, "linear_cross_entropy") if numbers == name}
        assert {tiles for tiles in found if " N" in tiles} == wanted
    assert linear_cross_entropy_tiles(128, torch.float16) == linear_cross_entropy_tiles(128, torch.bfloat16)


@needs_triton
def test_every_tile_of_linear_gelu_is_recorded_and_on_each_chips_own_tensor_cores(rows, recorded):
    from albert_fast.kernels._matmul import matmul_tiles

    best = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    found = rows("linear_gelu")
    for name, others in (("f32", ("f32",)), ("bf16", ("bf16", "f16")), ("tf32", ("tf32",))):
        of_dtype = [row for row in found if row["label"].split()[0] in others]
        for row in of_dtype:
            kinds = [kind for kind in row["tensor_cores"].split() if not kind.isdigit()]
            assert kinds == ([] if name == "f32" else [best[row["chip"]]]), row
        tiles = [
            t
            for n in (1, 128, 32768)
            for dt in others
            for t in matmul_tiles(n, 3072, launches.NUMBERS[dt], dt == "tf32")
        ]
        wanted = {"M{BLOCK_M} N{BLOCK_N} K{BLOCK_K} warps{num_warps} stages{num_stages}".format(**t) for t in tiles}
        own = [launch for launch in recorded if launch["label"].split()[0] in others]
        assert {launch["tiles"] for launch in own if launch["label"].endswith("gelu_erf sums fwd")} == wanted


@needs_triton
def test_two_programs_of_the_tile_that_linear_gelu_starts_with_fit_one_multiprocessor(rows):
    from albert_fast.kernels._matmul import matmul_tiles

    guess = matmul_tiles(32768, 3072, torch.bfloat16)[0]
    shape = f"M{guess['BLOCK_M']} N{guess['BLOCK_N']} "
    fits = [row for row in rows("linear_gelu") if row["tiles"].startswith(shape) and row["chip"] != "sm_80"]
    fits = [row for row in fits if not row["label"].startswith(("f32", "tf32"))]
    assert {row["chip"] for row in fits} == {"sm_90", "sm_100"}
    for row in fits:
        assert 2 * row["registers"] * 32 * guess["num_warps"] <= 65536, row
        assert 2 * row["shared_bytes"] <= 227 * 1024, row


@needs_triton
def test_every_tile_of_the_encoder_s_products_is_recorded_and_on_each_chips_own_tensor_cores(rows, recorded):
    from albert_fast.kernels.encoder import MAX_HEAD_DIM, encoder_tiles

    shape = "M{BLOCK_M} N{BLOCK_N} K{BLOCK_K} warps{num_warps} stages{num_stages}"
    for name in ("f32", "bf16", "tf32"):
        found = [tiles for numbers, _, tiles in tiles_of(recorded, "encoder") if numbers == name]
        sizes = itertools.product(range(1, MAX_HEAD_DIM + 1), (1, 16, 17, 512))
        tiles = [encoder_tiles(d, launches.NUMBERS[name], n, name == "tf32") for d, n in sizes]
        assert {tiles[tiles.index("M") :] for tiles in found} == {shape.format(**choice) for choice in tiles}
    assert encoder_tiles(64, torch.float16, 99) == encoder_tiles(64, torch.bfloat16, 99)
    best = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for row in rows("encoder"):
        if row["label"].startswith("f32"):
            assert row["tensor_cores"] == "", "float32 must not be rounded to TF32"
        else:  # 16 rows are too few for a warpgroup
            assert ("HMMA" if " T16 " in row["label"] else best[row["chip"]]) in row["tensor_cores"].split(), row


@needs_triton
@pytest.mark.parametrize("kernel", ["add_layer_norm", "gelu_layer_norm"])
def test_every_tile_of_the_row_kernels_is_checked(rows, kernel):
    from albert_fast.kernels._common import MAX_ROW, bwd_row_tiles, row_tiles

    for direction, tiles_of in (("fwd", row_tiles), ("bwd", bwd_row_tiles)):
        wanted = {"M{} N{} warps{}".format(*tiles_of(n)) for n in range(1, MAX_ROW + 1)}
        found = [row for row in rows(kernel) if row["label"].endswith(direction)]
        assert {row["tiles"] for row in found} == wanted
        assert {row["label"].split()[0] for row in found} >= {"f32", "bf16"}


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("add_layer_norm", "bf16 N768"),
        ("add_layer_norm", "bf16 N1024 dropout"),
        ("bias_gelu", "bf16 N3072 gelu_tanh"),
        ("bias_gelu", "bf16 N3072 gelu_tanh dropout"),
    ],
)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_rows_move_in_words_of_16_bytes(rows, kernel, case, direction):
    """All but single numbers: a row's statistics, and the bias of few columns that stays for all rows of a program."""
    found = [row for row in rows(kernel) if row["label"] == f"{case} {direction}"]
    assert len(found) == len(compile_check.CHIPS)
    for row in found:
        words = row["accesses"].split()
        counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        wide = {"LDG.128", "STG.128"} if direction == "fwd" else {"LDGSTS.128", "STG.128"}
        single = {"LDG.64"} if kernel == "bias_gelu" else {"STG.32" if direction == "fwd" else "LDGSTS.32"}
        assert wide <= counts.keys() <= wide | single | {"LDG.128"}, row
        assert all(counts.get(name, 0) <= 6 for name in single), row


@needs_triton
def test_the_short_check_covers_every_kind_of_code_with_few_compilations(recorded):
    chosen = [launch for launch in recorded if launch["compiled"]]
    capabilities = {chip.capability for chip in compile_check.CHIPS}

    def fast(launches: list[dict]) -> set[tuple]:
        """The tiles of the types in which models are fast, and of kernels that multiply nothing."""
        kept = [one for one in launches if not one["multiplies"] or one["numbers"] in coverage.TILE_NUMBERS]
        return {(one["function"], one["tiles"], one["numbers"] if one["multiplies"] else None) for one in kept}

    def flags(launches: list[dict]) -> set[tuple]:
        return {(one["function"], *flag) for one in launches for flag in one["flags"]}

    assert fast(chosen) == fast(recorded)
    assert flags(chosen) == flags(recorded)
    kinds = {(one["function"], one["numbers"]) for one in recorded if one["multiplies"]}
    assert {(one["function"], one["numbers"]) for one in chosen if one["multiplies"]} == kinds
    for function, numbers in kinds:
        own = [one["compiled"] for one in chosen if (one["function"], one["numbers"]) == (function, numbers)]
        if numbers in ("bf16", "int8"):
            assert set(itertools.chain(*own)) == capabilities, f"{function} {numbers}"
    for function in {one["function"] for one in recorded}:
        own = [one["compiled"] for one in chosen if one["function"] == function]
        assert set(itertools.chain(*own)) == capabilities, function
    assert sum(len(one["compiled"]) for one in chosen) <= 280


def test_dtypes_of_the_check_are_those_of_the_kernels():
    assert sorted(map(str, launches.DTYPES.values())) == sorted(map(str, DTYPES))


BAD_KERNELS = """
import sys

import torch
import triton
import triton.language as tl

from albert_fast.testing.gpu import compile_check, recording


@triton.jit
def spilling_kernel(x_ptr, out_ptr, BLOCK_N: tl.constexpr):
    cols = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + cols)
    tl.store(out_ptr + cols, x / tl.sum(x))


fine_kernel = lazy_kernel = spilling_kernel


@triton.jit
def greedy_kernel(x_ptr, out_ptr, n, BLOCK_N: tl.constexpr):
    cols = tl.arange(0, BLOCK_N)
    at = cols[:, None] * BLOCK_N + cols[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for i in range(n):
        total = tl.dot(tl.load(x_ptr + i * BLOCK_N + at), tl.load(out_ptr + i * BLOCK_N + at), total)
    tl.store(out_ptr + at, total.to(tl.float16))


@triton.jit
def broken_kernel(x_ptr, out_ptr, BLOCK_N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK_N), x_ptr)


def launch(name, *arguments, tensor_cores=False, **options):
    kernel = lambda: getattr(sys.modules["bad_kernels"], name)[(1,)](*arguments, **options)
    return recording.record(name, "case", ["bad_kernels"], kernel, tensor_cores)


def main():
    x = torch.empty(2**14, dtype=torch.float16)
    rows = compile_check.check([
        *launch("spilling_kernel", x, x, BLOCK_N=2**14, num_warps=1),
        *launch("greedy_kernel", x, x, 7, BLOCK_N=128, num_warps=8, num_stages=7),
        *launch("lazy_kernel", x, x, BLOCK_N=1024, num_warps=4, tensor_cores=True),
        *launch("broken_kernel", x, x, BLOCK_N=16, num_warps=4),
        *launch("fine_kernel", x, x, BLOCK_N=1024, num_warps=4),
    ])
    return compile_check.report(rows)
"""


@needs_triton
def test_bad_triton_kernels_fail_the_check(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    script = tmp_path / "run_bad_kernels.py"
    script.write_text("if __name__ == '__main__':\n    import sys, bad_kernels\n    sys.exit(bad_kernels.main())\n")
    done = run_apart(str(script), path=tmp_path)
    complaints = [line for line in done.stderr.splitlines() if " case " in line and " on sm_" in line]
    problems = {
        "spilling_kernel": "spills: ",
        "greedy_kernel": "shared memory: ",
        "lazy_kernel": "no tensor-core instruction",
        "broken_kernel": "does not compile: ",
    }
    wanted = [
        f"{kernel} case {kernel.removesuffix('_kernel')} on {chip.name}: {text}"
        for kernel, text in problems.items()
        for chip in compile_check.CHIPS
    ]
    assert len(complaints) == len(wanted), done.stdout + done.stderr
    assert all(line.startswith(start) for line, start in zip(complaints, wanted, strict=True)), complaints
    assert done.returncode == 1
    assert "15 compiled kernels, 12 with a problem" in done.stdout


SPILLING_CUDA = """
__global__ void __launch_bounds__(1024) spilling_kernel(float* x) {
    float kept[200];
#pragma unroll
    for (int i = 0; i < 200; ++i) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = kept[i] * kept[199 - i];
}
"""


@needs_triton
@needs_nvcc
@pytest.mark.parametrize(
    ("source", "problem"),
    [(SPILLING_CUDA, "spills: "), ("__global__ void kernel() { undeclared(); }", "does not compile: ")],
)
def test_a_bad_cuda_kernel_fails_the_check(tmp_path, source, problem, capsys):
    file = tmp_path / "kernel.cu"
    file.write_text(source)
    found = [row for chip in compile_check.CHIPS for row in compile_check.compile_cuda(file, chip)]
    assert len(found) == 3
    assert all(problem in row.problem for row in found)
    assert compile_check.report(found) == 1
    assert "3 compiled kernels, 3 with a problem" in capsys.readouterr().out


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(compile_check.MissingToolError, match="nvcc was not found"):
        compile_check.check_kernels(["embedding_projection"])
    with pytest.raises(ValueError, match="'convolution' has no GPU kernel; known: attention"):
        compile_check.check_kernels(["convolution"])
