"""embedding_projection on every backend against plain torch, and how it names an id outside its table."""

import contextlib

import pytest
import torch

import albert_fast
from albert_fast import ops
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_backward, check_forward, parity_tests

FORWARD, BACKWARD = parity_tests("embedding_projection")


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


def inputs(tokens=5):
    ids = [torch.randint(0, size, (tokens,)) for size in (11, 2, 7)]
    tables = [torch.randn(size, 8) for size in (11, 2, 7)]
    return ids, tables, (torch.ones(8), torch.zeros(8), torch.randn(12, 8), torch.zeros(12), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("table", "name", "size"), [(0, "input_ids", 11), (1, "token_type_ids", 2), (2, "position_ids", 7)]
)
@pytest.mark.parametrize("value", [-1, 10**9, "size"])
def test_an_id_outside_its_table_is_named(backend, table, name, size, value):
    ids, tables, rest = inputs()
    value = size if value == "size" else value
    ids[table][3] = value
    with pytest.raises(IndexError, match=rf"{name}\[3\] is {value}, outside its table of {size} rows"):
        ops.embedding_projection(*ids, *tables, *rest, backend=backend)


def test_parameters_of_other_dtypes_are_converted():
    ids, tables, rest = inputs()
    expected = ops.embedding_projection(*ids, *tables, *rest, backend="cpp")
    actual = ops.embedding_projection(
        *ids, tables[0], *(t.double() for t in tables[1:]), *(t.double() for t in rest[:-1]), rest[-1], backend="cpp"
    )
    torch.testing.assert_close(actual, expected)


def test_other_bad_input_is_named():
    ids, tables, rest = inputs()
    with pytest.raises(ValueError, match=r"expected ln_weight of shape \(8,\) .*, got \(4,\)"):
        ops.embedding_projection(*ids, *tables, torch.ones(4), *rest[1:])
    with pytest.raises(ValueError, match="one device"):
        ops.embedding_projection(*ids, *tables[:2], tables[2].to("meta"), *rest)
    with pytest.raises(TypeError, match="input_ids must be int64"):
        ops.embedding_projection(ids[0].float(), *ids[1:], *tables, *rest)
    with pytest.raises(ValueError, match=r"expected position_ids of shape \(5,\)"):
        ops.embedding_projection(*ids[:2], ids[2][:4], *tables, *rest)
    with pytest.raises(ValueError, match="exactly one"):
        ops.embedding_projection(None, *ids[1:], *tables, *rest)
    with pytest.raises(ValueError, match=r"inputs_embeds .*\(5, 9\)"):
        ops.embedding_projection(None, *ids[1:], *tables, *rest, inputs_embeds=torch.zeros(5, 9))
    nothing = [t[:0] for t in ids]
    assert ops.embedding_projection(*nothing, *tables, *rest).shape == (0, 12)


WHY_NO_GPU = dispatch.why_not("embedding_projection", "cuda", "cuda") or (
    None if torch.cuda.is_available() else "no CUDA device"
)
needs_gpu = pytest.mark.skipif(WHY_NO_GPU is not None, reason=str(WHY_NO_GPU))


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gpu_inputs(**options):
    case = ALL_CASES["embedding_projection"]
    return case.make_inputs((3000, 128, 768, 30000, 512, 2), torch.bfloat16, "cuda", torch.Generator(), **options)


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("rows", ["many", "wide"])
def test_tiles_that_a_gpu_takes_for_many_and_for_wide_rows(rows, dtype, options):
    """In 16 bits 128 tokens at a time where there are so many for each multiprocessor; wide rows do not fit shared memory."""
    many = 128 * torch.cuda.get_device_properties("cuda").multi_processor_count + 5
    shape = (many, 64, 96, 300, 128, 2) if rows == "many" else (131, 2100, 200, 50, 40, 2)
    check_forward(ALL_CASES["embedding_projection"], shape, options, dtype, "cuda")
    check_backward(ALL_CASES["embedding_projection"], shape, options, dtype, "cuda")


@needs_gpu
def test_gradients_on_a_gpu_repeat_to_the_bit_without_waiting():
    inputs = gpu_inputs(dropout_p=0.1, padding_idx=0)
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    grad = torch.randn(3000, 768, device="cuda", dtype=torch.bfloat16)
    with no_waiting():
        first, second = (torch.autograd.grad(ops.embedding_projection(**inputs), leaves, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
def test_a_gpu_tells_a_bad_id_when_it_is_waited_for():
    inputs = gpu_inputs()
    good = inputs["input_ids"].clone()
    inputs["input_ids"][2000:].fill_(30000)
    with no_waiting():
        ops.embedding_projection(**inputs)
    with pytest.raises(ops.TokenIndexError, match=r"input_ids\[2000\] is 30000, outside its table of 30000 rows"):
        albert_fast.synchronize()
    ops.embedding_projection(**{**inputs, "input_ids": good})
    albert_fast.synchronize()


@needs_gpu
def test_a_replayed_graph_tells_a_bad_id():
    inputs = gpu_inputs()
    ops.embedding_projection(**inputs)
    graph, reports = torch.cuda.CUDAGraph(), ops.CapturedReports()
    with reports, torch.cuda.graph(graph):
        captured = ops.embedding_projection(**inputs)
    graph.replay()
    reports.replayed()
    albert_fast.synchronize()
    assert torch.equal(captured, ops.embedding_projection(**inputs))
    inputs["position_ids"][7].fill_(-3)
    graph.replay()
    reports.replayed()
    with pytest.raises(ops.TokenIndexError, match=r"position_ids\[7\] is -3"):
        albert_fast.synchronize()
