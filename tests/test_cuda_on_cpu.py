"""The CUDA source of embedding_projection, compiled as C++ and run thread by thread on the CPU (see cuda_on_cpu.h).

Checks what compiling for a GPU does not: every index, tail and barrier, the fragments of the tensor cores, and that an
id outside its table is never looked up. The gradient runs through the operator itself, with the compiled functions in the
extension's place.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from albert_fast import ops
from albert_fast.ops import _reports
from albert_fast.ops._dropout import keep_scale_2d
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES, poison_empty
from albert_fast.testing.parity import check_backward, check_forward, float16_if_thorough
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


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).touch()  # cuda_on_cpu.h declares what these headers would
    library = folder / "kernels.so"
    command = [str(COMPILER), "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-Wl,-Bsymbolic"]
    # The checked longjmp would refuse to go from one stack to another.
    command += ["-U_FORTIFY_SOURCE", "-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{folder}"]
    command += ["-include", str(ROOT / "tests/cuda_on_cpu.h"), "-x", "c++"]
    command += [str(ROOT / "csrc/cuda/embedding_projection.cu"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def guarded(x: Tensor, margin: int = 64) -> Tensor:
    """A copy of `x` between margins of NaN (or of an impossible id), so that a stray read shows in the results."""
    filler = float("nan") if x.is_floating_point() else -(2**40)
    buffer = torch.full((x.numel() + 2 * margin,), filler, dtype=x.dtype)
    buffer[margin : margin + x.numel()] = x.flatten()
    return buffer[margin : margin + x.numel()].view(x.shape)


def make_inputs(dtype: torch.dtype, tokens: int, width: int, hidden: int, margin: int = 64) -> dict[str, Tensor]:
    vocabulary, types, positions = 50, 2, 40
    floats = {
        "word": torch.randn(vocabulary, width),
        "token_type": torch.randn(types, width),
        "position": torch.randn(positions, width),
        "ln_weight": torch.randn(width),
        "ln_bias": torch.randn(width),
        "proj_weight": torch.randn(hidden, width) / width**0.5,
        "proj_bias": torch.randn(hidden),
    }
    ids = {
        "ids": torch.randint(vocabulary, (tokens,)),
        "types": torch.randint(types, (tokens,)),
        "positions": torch.randint(positions, (tokens,)),
    }
    return {name: guarded(x.to(dtype), margin) for name, x in floats.items()} | {n: guarded(x) for n, x in ids.items()}


def run(
    library: ctypes.CDLL,
    x: dict[str, Tensor],
    dropout_p: float = 0.0,
    seed: int = 0,
    order: int = FORWARDS,
    shared_bytes: int = H100,
    multiprocessors: int = 2,
    margin: int = 64,
) -> tuple[Tensor, int, tuple[int, int, int]]:
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
        *map(ctypes.c_int64, sizes),
        ctypes.c_double(EPS),
        ctypes.c_double(dropout_p),
        ctypes.c_int64(seed),
        CODES[out.dtype],
        None,
    )
    assert status == 0
    assert all((edge == 7.0).all() for edge in margins), "wrote outside of out"
    launch = (ctypes.c_int64 * 3)()
    library.emulated_launch(launch)
    return out, int(first_bad), tuple(launch)


def expected(
    x: dict[str, Tensor],
    dropout_p: float = 0.0,
    seed: int = 0,
    sums: torch.dtype = torch.float64,
    product: torch.dtype = torch.float64,
) -> Tensor:
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


@float16_if_thorough()
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


C_TYPES = {"std::int64_t": ctypes.c_int64, "double": ctypes.c_double, "int": ctypes.c_int}


def typed(library: ctypes.CDLL) -> SimpleNamespace:
    """The library's functions as the extension has them: addresses are numbers."""
    header = re.sub(r"//.*", "", (ROOT / "csrc/cuda/embedding_projection.h").read_text())
    functions = {}
    for name, parameters in re.findall(r'extern "C" int (\w+)\(([^)]*)\)', header):
        kinds = [parameter.rpartition(" ")[0] for parameter in parameters.split(",")]
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p if "*" in kind else C_TYPES[kind.strip()] for kind in kinds]
        functions[name] = function
    assert len(functions) == 3, sorted(functions)
    return SimpleNamespace(**functions)


class Arrived:
    """An event that has happened."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def run_operator_on(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the operator call the library's functions as its CUDA backend, on CPU tensors."""
    monkeypatch.setattr(dispatch, "resolve", lambda *arguments: "cuda")
    functions = typed(library)
    monkeypatch.setattr(dispatch, "extension", lambda: functions)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(_reports, "_QUEUE", _reports.Queue())
    monkeypatch.setattr(
        _reports,
        "_on_its_way",
        lambda flag, describe: _reports.Pending(_reports.Slot(Arrived(), flag.clone()), describe, stream=0),
    )


@pytest.fixture
def on_cuda(library, monkeypatch):
    """Runs the operator on the library; the value is a function that sets the order of threads."""
    run_operator_on(library, monkeypatch)
    library.emulate_device(2, H100, FORWARDS)
    return lambda order: library.emulate_device(2, H100, order)


# Tokens, E, H, vocabulary, positions, types: runs over many chunks, whole chunks of one row, rows without tokens, widths
# off 8 and 16 bytes, more columns than registers or a warp hold.
OPERATOR_SHAPES = (
    (1, 1, 1, 1, 1, 1), (7, 13, 29, 11, 17, 3), (131, 24, 16, 3, 1, 2), (67, 128, 8, 60, 70, 2), (66, 136, 8, 5, 9, 1),
    (5, 301, 9, 40, 7, 2), (65, 328, 8, 1, 65, 4),
)  # fmt: skip
OPERATOR = ALL_CASES["embedding_projection"]


@DTYPES
@pytest.mark.parametrize("options", OPERATOR.options, ids=str)
@pytest.mark.parametrize("shape", OPERATOR_SHAPES, ids=str)
def test_the_operator_and_its_gradients(on_cuda, shape, options, dtype):
    check_forward(OPERATOR, shape, options, dtype, "auto")
    check_backward(OPERATOR, shape, options, dtype, "auto")


GRADIENTS = ("dinputs", "dword", "dtype_table", "dposition", "dln_weight", "dln_bias", "dproj_weight", "dproj_bias")


def backward(inputs: dict, grad: Tensor) -> dict[str, Tensor]:
    """Every gradient of the operator, with memory outside of each tensor watched."""
    names = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "word", "token_type", "position")
    names += ("ln_weight", "ln_bias", "proj_weight", "eps", "padding_idx", "dropout_p", "seed")
    given = [inputs.get(name) for name in names]
    given = [guarded(x) if isinstance(x, Tensor) and x.dim() else x for x in given]
    buffers: list[tuple[Tensor, int]] = []

    def watched(fill: float, shape, dtype=None, device=None) -> Tensor:
        # Margins have a value that no kernel writes.
        margin, size = 64, torch.Size([shape] if isinstance(shape, int) else shape)
        buffer = torch.ones(size.numel() + 2 * margin, dtype=dtype)
        inside = buffer[margin : margin + size.numel()]
        inside.fill_(fill if dtype.is_floating_point else torch.iinfo(dtype).min)
        buffers.append((buffer, margin))
        return inside.view(size)

    nan = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, **like: watched(nan, shape, **like))
        patch.setattr(torch, "empty_like", lambda x: watched(nan, x.shape, dtype=x.dtype))
        patch.setattr(torch, "zeros_like", lambda x: watched(0.0, x.shape, dtype=x.dtype))
        patch.setattr(_reports, "report", lambda flag, describe: None)
        result = torch.ops.albert_fast.embedding_projection_bwd(grad, *given, "auto")
    for buffer, margin in buffers:
        assert (torch.cat([buffer[:margin], buffer[-margin:]]) == 1).all(), "wrote outside of a tensor"
    assert len(buffers) >= 9
    return dict(zip(GRADIENTS, result, strict=True))


def operator_inputs(shape, dtype=torch.float32, seed=3, **options) -> tuple[dict, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = OPERATOR.make_inputs(shape, dtype, generator=generator, **options)
    return inputs, torch.randn((shape[0], shape[2]), generator=generator).to(dtype)


@DTYPES
@pytest.mark.parametrize("options", OPERATOR.options, ids=str)
@pytest.mark.parametrize("shape", [(131, 24, 16, 3, 1, 2), (66, 136, 8, 5, 9, 1), (67, 50, 8, 70, 9, 3)], ids=str)
def test_gradients_are_the_same_in_every_order_of_threads(on_cuda, shape, options, dtype):
    inputs, grad = operator_inputs(shape, dtype, **options)
    expected = backward(inputs, grad)
    for order in (BACKWARDS, SHUFFLED):
        on_cuda(order)
        for name, value in backward(inputs, grad).items():
            assert torch.equal(value, expected[name]), name
    assert all(value.isfinite().all() for value in expected.values()), "some element was never written"


def test_keys_of_four_bytes_give_the_same_gradients(on_cuda):
    inputs, grad = operator_inputs((70, 24, 8, 32767 - 10, 9, 1))
    short = backward(inputs, grad)
    inputs["position"] = torch.cat([inputs["position"], torch.zeros(1, 24)])  # one row more than 16 bits count
    long = backward(inputs, grad)
    for name in GRADIENTS:
        value = long[name][:-1] if name == "dposition" else long[name]
        assert torch.equal(value, short[name]), name


@DTYPES
@pytest.mark.parametrize("table", ["input_ids", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("value", [-1, "size", 2**62, -(2**63)])
def test_tokens_with_a_bad_id_add_to_no_gradient(on_cuda, dtype, table, value):
    inputs, grad = operator_inputs((131, 24, 16, 7, 5, 2), dtype, dropout_p=0.2, padding_idx=4)
    bad = torch.tensor([0, 64, 97, 130])
    size = {"input_ids": 7, "token_type_ids": 2, "position_ids": 5}[table]
    # The same tokens with good ids and no gradient of their own.
    expected = backward(inputs, grad.index_fill(0, bad, 0.0))
    inputs[table][bad] = size if value == "size" else value
    actual = backward(inputs, grad)
    for name in ("dword", "dtype_table", "dposition", "dln_weight", "dln_bias", "dproj_weight"):
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@DTYPES
def test_a_run_of_more_chunks_than_a_block_has_warps(on_cuda, dtype):
    check_backward(OPERATOR, (1100, 8, 8, 2, 1, 1), {}, dtype, "auto")


def test_nan_reaches_the_gradients_that_it_reaches_in_torch(on_cuda):
    inputs, grad = operator_inputs((70, 24, 8, 20, 70, 3))
    inputs["position_ids"] = torch.arange(70)
    inputs["token_type_ids"][:] = torch.arange(70) % 2
    inputs["word"][3, 5], grad[9, 2] = float("nan"), float("inf")
    actual = backward(inputs, grad)
    names = [name for name in OPERATOR.gradients if name != "inputs_embeds"]
    leaves = {**inputs, **{name: inputs[name].clone().requires_grad_() for name in names}}
    expected = torch.autograd.grad(OPERATOR.eager(**leaves), [leaves[name] for name in names], grad)
    for name, value in zip(GRADIENTS[1:], expected, strict=True):
        assert torch.equal(actual[name].isfinite(), value.isfinite()), name
        assert not value.isfinite().all(), name


def test_no_tokens_give_zeros(on_cuda):
    for from_embeds in (False, True):
        inputs, grad = operator_inputs((0, 24, 16, 7, 5, 2), from_embeds=from_embeds)
        for name, value in backward(inputs, grad).items():
            assert not value.any(), name


def test_a_bad_id_is_raised_by_the_next_call(on_cuda):
    inputs, _ = operator_inputs((9, 16, 8, 7, 5, 2))
    inputs["position_ids"][3] = 5
    with poison_empty():
        ops.embedding_projection(**inputs)
    with pytest.raises(ops.TokenIndexError, match=r"position_ids\[3\] is 5, outside its table of 5 rows"):
        ops.embedding_projection(**inputs)
    inputs["position_ids"][3] = 4
    ops.embedding_projection(**inputs)
    ops.embedding_projection(**inputs)


@pytest.mark.parametrize("omitted", [1, 2], ids=["barriers", "waiting"])
def test_this_test_notices_what_is_missing(library, omitted, monkeypatch, request):
    library.emulate_without(omitted)
    request.addfinalizer(lambda: library.emulate_without(0))
    x = make_inputs(torch.bfloat16, 40, 456, 136)
    exact = expected(x)
    for shared_bytes in (H100, 100_000):
        out, _, _ = run(library, x, order=BACKWARDS, shared_bytes=shared_bytes)
        assert not ((out - exact).abs() < 0.1).all()
    if omitted == 1:
        run_operator_on(library, monkeypatch)
        library.emulate_device(2, H100, FORWARDS)
        gradients = backward(*operator_inputs((70, 136, 8, 1, 1, 1)))
        assert gradients["dword"].isnan().any(), "a run over several chunks"
        assert gradients["dln_weight"].isnan().any(), "a sum of several warps"
