"""The CUDA source of embedding_projection, compiled as C++ and run thread by thread on the CPU (see cuda_on_cpu.h).

Checks what compiling for a GPU does not: every index, tail and barrier, the fragments of the tensor cores, and that an
id outside its table is never looked up.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from albert_fast.ops._dropout import keep_scale_2d
from albert_fast.testing.tolerances import assert_close_calibrated

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = pytest.mark.parametrize("dtype", CODES, ids=["f32", "bf16", "f16"])
EPS = 1e-12
NO_BAD = 2**63 - 1
FORWARDS, BACKWARDS, SHUFFLED = range(3)
A100, H100 = 166912, 232448  # bytes of shared memory that a block may take
WEIGHTS = ("word", "token_type", "position", "ln_weight", "ln_bias", "proj_weight", "proj_bias")

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="compiles C++ with ucontext: needs Linux and a C++ compiler"
)


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    for name in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).touch()  # what they declare stands in cuda_on_cpu.h
    library = folder / "kernels.so"
    command = [str(COMPILER), "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-Wl,-Bsymbolic"]
    # Unique symbols would be shared by all builds that one process loads.
    command += ["-fno-gnu-unique", "-fsanitize=undefined", "-fno-sanitize-recover=all", *flags, f"-I{folder}"]
    command += ["-include", str(ROOT / "tests/cuda_on_cpu.h"), "-x", "c++"]
    command += [str(ROOT / "csrc/cuda/embedding_projection.cu"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("cuda"))


def guarded(x: Tensor, margin: int = 64) -> Tensor:
    """A copy of `x` between margins of NaN (or of an impossible id), which show up in the results of a stray read."""
    filler = float("nan") if x.is_floating_point() else -(2**40)
    buffer = torch.full((x.numel() + 2 * margin,), filler, dtype=x.dtype)
    buffer[margin : margin + x.numel()] = x.flatten()
    return buffer[margin : margin + x.numel()].view(x.shape)


def make_inputs(dtype: torch.dtype, tokens: int, width: int, hidden: int, margin: int = 64) -> dict[str, Tensor]:
    vocabulary, types, positions = 50, 2, 40
    floats = {
        "word": torch.randn(vocabulary, width), "token_type": torch.randn(types, width),
        "position": torch.randn(positions, width), "ln_weight": torch.randn(width), "ln_bias": torch.randn(width),
        "proj_weight": torch.randn(hidden, width) / width**0.5, "proj_bias": torch.randn(hidden),
    }  # fmt: skip
    ids = {
        "ids": torch.randint(vocabulary, (tokens,)), "types": torch.randint(types, (tokens,)),
        "positions": torch.randint(positions, (tokens,)),
    }  # fmt: skip
    return {name: guarded(x.to(dtype), margin) for name, x in floats.items()} | {n: guarded(x) for n, x in ids.items()}


def run(
    library: ctypes.CDLL, x: dict[str, Tensor], dropout_p: float = 0.0, seed: int = 0, order: int = FORWARDS,
    shared_bytes: int = H100, multiprocessors: int = 2, margin: int = 64,
) -> tuple[Tensor, int, tuple[int, int, int]]:  # fmt: skip
    """out, first_bad and (blocks of tokens, blocks of columns, bytes of shared memory) of the launch."""
    tokens, (hidden, width) = len(x["types"]), x["proj_weight"].shape
    out = guarded(torch.full((tokens, hidden), float("nan"), dtype=x["word"].dtype), margin)
    margins = [out.flatten().as_strided((margin,), (1,), start) for start in (0, margin + out.numel())]
    for edge in margins:
        edge.fill_(7.0)
    first_bad = torch.tensor([NO_BAD])
    library.emulate_device(multiprocessors, shared_bytes, order)
    pointers = [x.get(name) for name in ("ids", "types", "positions", *WEIGHTS)]
    sizes = (tokens, width, hidden, len(x["word"]), len(x["token_type"]), len(x["position"]))
    status = library.embedding_projection_fwd_cuda(
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*pointers, out, first_bad)),
        *map(ctypes.c_int64, sizes), ctypes.c_double(EPS), ctypes.c_double(dropout_p), ctypes.c_int64(seed),
        CODES[out.dtype], None,
    )  # fmt: skip
    assert status == 0
    assert all((edge == 7.0).all() for edge in margins), "wrote outside of out"
    launch = (ctypes.c_int64 * 3)()
    library.emulated_launch(launch)
    return out, int(first_bad), tuple(launch)


def expected(
    x: dict[str, Tensor], dropout_p: float = 0.0, seed: int = 0, sums: torch.dtype = torch.float64,
    product: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """The operator with sums in one dtype and the normalised rows rounded to another before the product."""
    f = {name: x[name].to(sums) for name in WEIGHTS}
    z = (f["word"][x["ids"]] if "ids" in x else f["word"]) + f["token_type"][x["types"]] + f["position"][x["positions"]]
    normed = functional.layer_norm(z, z.shape[1:], f["ln_weight"], f["ln_bias"], EPS)
    if dropout_p:
        normed = normed * keep_scale_2d(seed, normed.shape, dropout_p, normed.device)
    return functional.linear(normed.to(product).to(sums), f["proj_weight"], f["proj_bias"])


def check(out: Tensor, x: dict[str, Tensor], dropout_p: float = 0.0, seed: int = 0) -> None:
    same_dtype = expected(x, dropout_p, seed, torch.float32, out.dtype).to(out.dtype)
    assert_close_calibrated(out, same_dtype, expected(x, dropout_p, seed))


# name -> tokens, E, H, shared memory, multiprocessors, expected (blocks of tokens, blocks of columns) for 2 and 4 bytes
SHAPES = {
    "one-token": (1, 128, 128, H100, 132, (1, 1), (1, 1)),
    "split-columns": (70, 128, 264, A100, 108, (2, 3), (2, 3)),
    "large-tiles": (131, 128, 200, H100, 1, (2, 1), (3, 1)),
    "narrow": (66, 24, 40, H100, 2, (2, 1), (2, 1)),
    "odd-width": (9, 50, 77, H100, 2, (1, 1), (1, 1)),
    "odd-hidden": (65, 64, 131, H100, 2, (2, 2), (2, 2)),
    "wide-rows": (67, 328, 136, H100, 2, (2, 2), (2, 2)),
    "odd-wide-rows": (5, 301, 9, H100, 2, (1, 1), (1, 1)),
    "rows-do-not-fit": (66, 456, 136, 100_000, 2, (2, 2), (2, 2)),
    "odd-rows-do-not-fit": (3, 401, 130, 95_000, 2, (1, 2), (1, 2)),
    "width-one": (3, 1, 3, H100, 2, (1, 1), (1, 1)),
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_torch_in_every_order_of_threads(library, dtype, shape):
    tokens, width, hidden, shared_bytes, multiprocessors, *grids = SHAPES[shape]
    x = make_inputs(dtype, tokens, width, hidden)
    device = {"shared_bytes": shared_bytes, "multiprocessors": multiprocessors}
    out, first_bad, launch = run(library, x, **device)
    assert first_bad == NO_BAD
    assert launch[:2] == grids[dtype == torch.float32]
    assert launch[2] <= shared_bytes
    if "not-fit" in shape:
        assert launch[2] < 64 * width * dtype.itemsize + 3 * 128 * 144, "rows were kept in shared memory after all"
    check(out, x)
    for order in (BACKWARDS, SHUFFLED):
        assert torch.equal(run(library, x, order=order, **device)[0], out)


@DTYPES
@pytest.mark.parametrize("shared_bytes", [H100, 100_000], ids=["resident", "refilled"])
def test_dropout_keeps_what_the_reference_keeps(library, dtype, shared_bytes):
    x = make_inputs(dtype, 40, 456 if shared_bytes < H100 else 128, 24)
    seed = 2**62 + 1234567890123
    out, _, _ = run(library, x, 0.3, seed, shared_bytes=shared_bytes)
    check(out, x, 0.3, seed)
    assert not torch.equal(out, run(library, x, 0.3, seed + 2**32, shared_bytes=shared_bytes)[0])


@DTYPES
def test_rows_given_instead_of_ids(library, dtype):
    x = make_inputs(dtype, 12, 32, 16)
    x |= {"word": guarded(torch.randn(12, 32).to(dtype))}
    del x["ids"]
    check(run(library, x)[0], x)


@DTYPES
def test_tensors_that_start_off_16_bytes(library, dtype):
    x = make_inputs(dtype, 12, 32, 16, margin=63)
    assert any(x[name].data_ptr() % 16 for name in WEIGHTS)
    check(run(library, x, margin=63)[0], x)


@DTYPES
@pytest.mark.parametrize(("table", "size"), [("ids", 50), ("types", 2), ("positions", 40)])
@pytest.mark.parametrize("value", [-1, "size", 2**62, -(2**63)])
def test_bad_ids_are_flagged_and_never_looked_up(library, dtype, table, size, value):
    x = make_inputs(dtype, 67, 32, 16)
    good = {name: t.clone() for name, t in x.items()}
    for token in (66, 5, 64):
        x[table][token] = size if value == "size" else value
    out, first_bad, _ = run(library, x, order=BACKWARDS)
    assert divmod(first_bad, 3) == (5, ("ids", "types", "positions").index(table))
    assert torch.equal(out[[5, 64, 66]], x["proj_bias"].expand(3, -1)), "read outside of a table"
    fine = [token for token in range(67) if token not in (5, 64, 66)]
    assert torch.equal(out[fine], run(library, good)[0][fine])


def test_the_first_table_of_the_first_bad_token_counts(library):
    x = make_inputs(torch.float32, 8, 16, 8)
    x["positions"][2], x["types"][2], x["ids"][7] = 40, -1, 50
    assert run(library, x)[1] == 2 * 3 + 1


@DTYPES
def test_nan_and_infinity_stay_in_their_rows(library, dtype):
    x = make_inputs(dtype, 20, 48, 24)
    x["ids"][:] = torch.arange(20)
    x["word"][3, 5], x["word"][9, 40] = float("nan"), float("inf")
    out, _, _ = run(library, x)
    assert out[[3, 9]].isnan().all()
    check(out, x)


def test_nothing_to_do(library):
    out, first_bad, launch = run(library, make_inputs(torch.float32, 0, 16, 8))
    assert (out.shape, first_bad, launch) == ((0, 8), NO_BAD, (0, 0, 0))


def test_an_unknown_dtype_is_an_error(library):
    arguments = [ctypes.c_void_p()] * 12 + [ctypes.c_int64(1)] * 6 + [ctypes.c_double()] * 2 + [ctypes.c_int64()]
    assert library.embedding_projection_fwd_cuda(*arguments, 3, None) == 1


@pytest.mark.parametrize("flag", ["-DEMULATE_WITHOUT_BARRIERS", "-DEMULATE_WITHOUT_WAITING"])
def test_this_test_notices_a_missing_barrier(tmp_path, flag):
    broken = build(tmp_path, flag)
    x = make_inputs(torch.bfloat16, 40, 456, 136)
    exact = expected(x)
    for shared_bytes in (H100, 100_000):
        out, _, _ = run(broken, x, order=BACKWARDS, shared_bytes=shared_bytes)
        assert not ((out - exact).abs() < 0.1).all()
