"""What launches move and compute: counts against hand counts and against every address that Triton's interpreter touches."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections import defaultdict

import numpy as np
import pytest
import torch

from albert_fast.testing import ALL_CASES
from albert_fast.testing.gpu import compile_check, costs, floors, launches, recording
from albert_fast.testing.parity import make_inputs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
A100, H100 = costs.CHIPS


def counted(operator: str) -> dict[tuple[str, str], floors.Count]:
    return {(count.shape, count.direction): count for count in floors.counts([operator])}


def test_every_gpu_kernel_is_counted_and_backward_too_where_it_has_a_gradient():
    assert sorted(floors.SHAPES) == sorted(compile_check.KERNELS)
    found = list(floors.counts())
    for count in found:
        assert count.bytes > 0
        assert (count.operations > 0) == (count.operator != "graph_inputs")
    inference = ("encoder", "quantized_encoder", "graph_inputs")
    for operator, shapes in floors.SHAPES.items():
        directions = [count.direction for count in found if count.operator == operator]
        assert directions.count("fwd") == len(shapes)
        assert directions.count("bwd") == (0 if operator in inference else len(shapes))


def test_every_recorded_launch_computes_but_those_that_copy_or_count(monkeypatch):
    """A kernel without a row in costs.py would have a floor of memory alone."""
    copies = {
        "_graph_inputs_kernel",
        "_linear_cross_entropy_labelled_kernel",
        "_linear_cross_entropy_bwd_gather_kernel",
    }
    seen, of_launch = defaultdict(list), costs.launch_cost

    def noted(kernel, arguments):
        seen[kernel].append(of_launch(kernel, arguments))
        return seen[kernel][-1]

    monkeypatch.setattr(recording, "launch_cost", noted)
    for cases in launches.CASES.values():
        for _, run, _ in cases():
            recording.launch_costs(run)
    assert {kernel for kernel, found in seen.items() if not all(cost.operations for cost in found)} == copies
    assert all(cost.bytes for found in seen.values() for cost in found)
    products = {kernel for kernel, found in seen.items() if any(cost.kind != "f32" for cost in found)}
    assert products == costs._PRODUCTS
    kinds = {cost.kind for found in seen.values() for cost in found}
    assert kinds == {"f32", "tf32", "half", "int8", "fp8"}


def test_counts_by_hand():
    rows, width, middle, groups = 32768, 768, 3072, 512
    found = counted("bias_gelu")
    assert found["base 32768x3072", "fwd"].bytes == 2 * (2 * rows * middle + middle)
    # x, cotangent, gradient; the bias; the programs' sums written, read, added up. Six blocks of columns share the programs.
    sums = 4 * (groups // 6) * middle
    assert found["base 32768x3072", "bwd"].bytes == 2 * (3 * rows * middle + middle) + sums + sums + 2 * middle
    found = counted("add_layer_norm")
    assert found["base 32768x768", "fwd"].bytes == 2 * (3 * rows * width + 3 * width) + 8 * rows
    # x, residual, cotangent, one gradient for both; two vectors read, three gradients written; mean and rstd; sums.
    sums = 2 * 4 * groups * 3 * width
    assert found["base 32768x768", "bwd"].bytes == 2 * (4 * rows * width + 5 * width) + 8 * rows + sums
    found = counted("encoder")
    layer = 4 * width * width + 2 * width * middle
    assert found["base 1x128", "fwd"].operations == 12 * (2 * 128 * layer + 4 * 128 * 128 * width)
    # Embeddings in and out, matrices and vectors once, two ends of a length.
    assert found["base 1x128", "fwd"].bytes == 2 * (2 * 128 * width + layer + 9 * width + middle) + 4 * 2
    found = counted("attention")
    lengths = range(8, 513, 8)
    pairs, tokens = sum(length * length for length in lengths), sum(lengths)
    assert found["base 64x8..512", "fwd"].operations == 4 * width * pairs
    assert found["base 64x8..512", "bwd"].operations == 14 * width * pairs
    # Logarithms of sums of 12 heads; the ends of sequences, twice, and their order.
    ends = 2 * 4 * 65 + 4 * 64
    assert found["base 64x8..512", "fwd"].bytes == tokens * (2 * 4 * width + 4 * 12) + ends
    # q, k, v and the cotangent in both launches, dq in one, dk and dv in the other; three more statistics in both.
    assert found["base 64x8..512", "bwd"].bytes == tokens * (2 * 11 * width + 2 * 4 * 4 * 12) + 2 * ends


def test_counts_by_hand_of_products():
    rows, width, middle = 32768, 768, 3072
    found = counted("linear_gelu")
    forward, backward = found["base 32768x768x3072", "fwd"], found["base 32768x768x3072", "bwd"]
    assert forward.bytes == 2 * (rows * width + middle * width + middle + rows * middle)
    assert forward.operations == 2 * rows * width * middle
    products = [cost for cost in backward.launches if cost.kind == "half"]
    assert [cost.operations for cost in products] == [2.0 * rows * width * middle] * 2
    assert {cost.bytes for cost in products} == {2 * (rows * width + middle * width + rows * middle)}
    found = counted("quantized_encoder")["base int8 64x128", "fwd"]
    assert len(found.launches) == 9 * 12 + 1
    tokens = 64 * 128
    int8 = [cost for cost in found.launches if cost.kind == "int8"]
    assert sum(cost.operations for cost in int8) == 12 * 2 * tokens * (4 * width * width + 2 * width * middle)
    # Rows with a step and a zero point, weights with a scale and a sum for each channel and no bias, the output.
    ffn_output = tokens * (middle + 8) + width * (middle + 8) + 2 * tokens * width
    assert ffn_output in [cost.bytes for cost in int8]
    rows, width, words = 4915, 128, 30000
    found = counted("linear_cross_entropy")["base, large 4915x128x30000", "bwd"]
    blocks = -(-rows // 128) * 128
    assert sum(cost.operations for cost in found.launches if cost.kind == "half") == 8 * blocks * width * words
    found = counted("graph_inputs")["64x512, masked", "fwd"]
    # Mask, ids, places, and three static rows for each token; types and positions repeat; lengths but the last; ends, twice.
    tokens = 64 * 512
    assert found.bytes == 8 * (6 * tokens + 1 + 512 + 63) + 2 * 4 * 65


def test_dropout_makes_the_gradients_of_x_and_residual_two():
    case, nbytes = ALL_CASES["add_layer_norm"], 13 * 64 * 4
    plain, dropout = (make_inputs(case, (13, 64), {"dropout_p": p}, torch.float32) for p in (0.0, 0.2))
    seed = 8
    assert case.backward_bytes(dropout) - case.backward_bytes(plain) == nbytes + seed


@pytest.mark.parametrize("name", ["encoder", "quantized_encoder"])
def test_what_has_no_gradient_moves_nothing_backward(name):
    case = ALL_CASES[name]
    inputs = make_inputs(case, case.small_shapes[0], {}, torch.float32)
    assert case.backward_bytes(inputs) == case.backward_operations(inputs) == 0
    assert case.bytes_moved(inputs) > 0


def test_a_floor_is_the_slower_of_memory_and_arithmetic():
    assert costs.Cost(int(3.35e12), 1.0).seconds(H100) == (1.0, "memory")
    assert costs.Cost(1, 989e12, "half").seconds(H100) == (1.0, "half")
    assert costs.Cost(1, 134e12).seconds(H100) == (2.0, "f32")
    fp8 = costs.Cost(1, 1979e12, "fp8")
    assert fp8.seconds(H100) == (1.0, "fp8")
    assert fp8.seconds(A100) is None, "it has no such products"
    both = floors.Count("", "fwd", "", (costs.Cost(int(3.35e12), 1.0), costs.Cost(1, 3 * 989e12, "half")))
    assert both.seconds(H100) == (4.0, "half")
    assert floors.Count("", "fwd", "", (*both.launches, fp8)).seconds(A100) is None


def test_the_table_says_what_it_is(capsys):
    assert floors.main(["--kernel", "bias_gelu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(floors.SHAPES["bias_gelu"])
    assert "120.2 memory" in lines[2]  # 402.7 MB at 3.35 TB/s
    assert last.endswith("no measurements.")


def test_rows_of_the_compile_check_say_what_their_launch_takes():
    names = ("bias_gelu", "bf16 fwd", "M8 N512", "sm_90")
    row = compile_check.Row(*names, 40, 0, 0, 0, "", "", "", 402_659_328, 1.007e9, {"A100": 201.33, "H100": 120.197})
    cuda = compile_check.Row(*names, 40, 0, 0, 0, "")
    head, _, first, second = (line.split("|") for line in compile_check.table([row, cuda]).splitlines())
    assert [cell.strip() for cell in head[4:8]] == ["MB", "GFLOP", "A100 floor, us", "H100 floor, us"]
    assert [cell.strip() for cell in first[4:8]] == ["402.659", "1.007", "201.3", "120.2"]
    assert "".join(second[4:8]).strip() == ""


# Against the interpreter ----------------------------------------------------------------------------------------------------


class _Watched:
    """Stands in for a kernel, runs it, and writes down its counted bytes and those that it loaded or stored."""

    def __init__(self, name, kernel, addresses, seen):
        self.name, self.kernel, self.addresses, self.seen = name, kernel, addresses, seen

    def __getitem__(self, grid):
        return functools.partial(self.start, grid)

    def start(self, grid, *args, **kwargs):
        self.addresses.clear()
        self.kernel[grid](*args, **kwargs)
        signature = inspect.signature(self.kernel.fn)
        own = {name: value for name, value in kwargs.items() if name in signature.parameters}
        arguments = costs.by_name(signature.bind(*args, **own).arguments)
        scratch = costs.encoder_buffers() if "encoder" in self.name else ()
        apart = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in map(arguments.get, scratch)]
        touched = 0
        for size, found in self.addresses.items():
            different = np.unique(np.concatenate(found))
            for begin, end in apart:
                different = different[(different < begin) | (different >= end)]
            touched += size * len(different)
        self.seen.append((self.name, costs.launch_cost(self.name, arguments).bytes, touched))


@pytest.fixture
def watched(monkeypatch):
    """(kernel, counted bytes, touched bytes) of every launch in the test."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU, and not in the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    from albert_fast import kernels

    addresses, seen = defaultdict(list), []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(ptrs, mask):
        size = ptrs.dtype.scalar.element_ty.primitive_bitwidth // 8
        addresses[size].append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].ravel())

    def noting_load(builder, ptrs, mask, *rest):
        note(ptrs, mask)
        return load(builder, ptrs, mask, *rest)

    def noting_store(builder, ptrs, value, mask, *rest):
        note(ptrs, mask)
        return store(builder, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noting_store)
    for _, module, _ in pkgutil.iter_modules(kernels.__path__):
        owner = importlib.import_module(f"{kernels.__name__}.{module}")
        for name in [name for name in vars(owner) if name.endswith("_kernel")]:
            monkeypatch.setattr(owner, name, _Watched(name, getattr(owner, name), addresses, seen))
    return seen


def run(operator, shape, options, dtype):
    case = ALL_CASES[operator]
    inputs = make_inputs(case, shape, options, dtype)
    wanted = [inputs[name].requires_grad_() for name in case.gradients if inputs.get(name) is not None]
    out = case.run(inputs, "triton")
    if wanted:
        torch.autograd.grad(out, wanted, torch.randn_like(out))


SMALL = [
    ("bias_gelu", (37, 31), {}, 3),
    ("bias_gelu", (5, 1023), {"dropout_p": 0.2}, 3),
    ("add_layer_norm", (37, 31), {}, 3),
    ("add_layer_norm", (2, 5000), {"dropout_p": 0.2}, 4),  # rows that are split
    ("gelu_layer_norm", (5, 312), {}, 3),
    ("gelu_layer_norm", (2, 5000), {}, 4),
    ("embedding_layer_norm", (1, 31, 11, 7, 2), {}, 3),
    ("embedding_layer_norm", (1, 5000, 11, 7, 2), {"dropout_p": 0.2}, 4),
    ("embedding_layer_norm", (1, 31, 11, 7, 2), {"typed": False}, 3),
    ("linear_gelu", (37, 53, 131), {}, 3),
    ("linear_cross_entropy", (5, 200, 131), {}, 9),
    ("linear_cross_entropy", (3, 16, 2053), {}, 9),
    ("linear_cross_entropy", (3, 16, 2053), {"label_smoothing": 0.1}, 9),
    ("attention", ((7, 0, 13), None, 2, 26), {}, 3),
    ("attention", ((7, 0, 13), None, 2, 26), {"causal": True}, 3),
    ("attention", ((1, 1), (5, 33), 1, 80), {"dropout_p": 0.2}, 3),
    ("encoder", ((3, 0, 2), 26, 1, 40, 1, 2), {}, 1),
    ("quantized_encoder", ((3, 0, 2), 26, 1, 40, 1, 1), {"precision": "int8"}, 10),
    ("quantized_encoder", ((3, 0, 2), 26, 1, 40, 1, 1), {"precision": "fp8"}, 10),
]


@pytest.mark.parametrize(("operator", "shape", "options", "launched"), SMALL)
def test_counted_bytes_are_those_that_a_launch_touches(watched, operator, shape, options, launched):
    run(operator, shape, options, torch.bfloat16 if operator == "quantized_encoder" else torch.float32)
    assert len(watched) == launched
    for kernel, counted, touched in watched:
        assert counted == touched, kernel


@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
def test_counted_bytes_of_graph_inputs_are_those_that_it_touches(watched, kind):
    from albert_fast.kernels._graph_inputs import graph_inputs

    ids, kinds, positions = torch.arange(15).view(3, 5), torch.zeros(1, dtype=torch.int64), torch.arange(5)
    static, static_ends, ends = torch.empty(3, 40, dtype=torch.int64), *torch.empty(2, 41, dtype=torch.int32)
    rows = ((ids, 5, 1), (kinds, 0, 0), (positions, 0, 1))
    bounds, ends = (20, 4), ends[:4]
    if kind == "dense":
        graph_inputs(*rows, None, None, None, None, ends, static, static_ends, (3, 5), bounds)
    elif kind == "masked":
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
        places = torch.empty(10, dtype=torch.int64)
        graph_inputs(*rows, (mask, 5, 1), mask.sum(1), None, places, ends, static, static_ends, (3, 5), bounds)
    else:
        ends, packed = torch.tensor([0, 4, 6, 15], dtype=torch.int32), ids.view(-1)
        rows = ((packed, 1, 1), (kinds, 0, 0), (packed.clone(), 1, 1))
        graph_inputs(*rows, None, None, ends, None, None, static, static_ends, (3, 9), bounds)
    ((_, counted, touched),) = watched
    assert counted == touched


@pytest.mark.parametrize(
    ("operator", "kernel", "forgotten"),
    [("bias_gelu", "_bias_gelu_fwd_kernel", "bias_ptr"), ("bias_gelu", "_column_sums_kernel", "partials_ptr")],
)
def test_a_count_that_forgets_a_tensor_is_found(watched, monkeypatch, operator, kernel, forgotten):
    touched_of = costs._TOUCHED.get(kernel, lambda arguments: {})
    monkeypatch.setitem(costs._TOUCHED, kernel, lambda arguments: {**touched_of(arguments), forgotten: 0})
    run(operator, (3, 7), {}, torch.float32)
    assert [name for name, counted, touched in watched if counted != touched] == [kernel]
