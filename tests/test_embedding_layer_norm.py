"""embedding_layer_norm: parity on every backend, ids outside their tables, models without token types, other bad input."""

import pytest
import torch
from albert_fast.kernels.embedding_layer_norm import NO_BAD_ID, embedding_layer_norm_bwd, embedding_layer_norm_fwd

from albert_fast import ops
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_backward, check_forward, make_inputs, parity_tests
from albert_fast.testing.tolerances import assert_close_calibrated

FORWARD, BACKWARD = parity_tests("embedding_layer_norm")
CASE = ALL_CASES["embedding_layer_norm"]
TABLES = [(0, "input_ids", 11), (1, "token_type_ids", 2), (2, "position_ids", 7)]


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@BACKWARD
def test_backward(case, shape, options, dtype, backend):
    check_backward(case, shape, options, dtype, backend)


def inputs(tokens=5):
    ids = [torch.randint(0, size, (tokens,)) for size in (11, 2, 7)]
    return ids, [torch.randn(size, 8) for size in (11, 2, 7)], (torch.ones(8), torch.zeros(8), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize(("table", "name", "size"), TABLES)
@pytest.mark.parametrize("value", [-1, 10**9, "size"])
def test_an_id_outside_its_table_is_named(backend, table, name, size, value):
    ids, tables, rest = inputs()
    value = size if value == "size" else value
    ids[table][3] = value
    with pytest.raises(IndexError, match=rf"{name}\[3\] is {value}, outside its table of {size} rows"):
        ops.embedding_layer_norm(*ids, *tables, *rest, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_the_gradient_operator_follows_no_bad_id_either(backend):
    ids, tables, (weight, bias, _) = inputs()
    stats = torch.zeros(5), torch.ones(5)
    ids[0][2] = 11
    with pytest.raises(IndexError, match=r"input_ids\[2\] is 11"):
        torch.ops.albert_fast.embedding_layer_norm_bwd(
            torch.ones(5, 8), ids[0], None, *ids[1:], *tables, weight, bias, *stats, -1, -1, 0.0, None, backend
        )


@pytest.mark.parametrize(("table", "name", "size"), TABLES)
def test_the_gpu_kernels_read_no_row_for_a_bad_id_and_say_which_is_first(table, name, size):
    ids, tables, (weight, bias, eps) = inputs(70)
    ids[table][33], ids[table][41] = size, -5
    lookup = (ids[0], None, *ids[1:], *tables)
    out, mean, rstd, first_bad = embedding_layer_norm_fwd(*lookup, weight, bias, eps)
    assert int(first_bad) == 33 * 3 + table
    bad = torch.tensor([33, 41])
    assert torch.equal(out[bad], bias.expand(2, 8)), "the LayerNorm of a sum of zeros"
    dz, rows, _, _ = embedding_layer_norm_bwd(torch.randn(70, 8), *lookup, weight, mean, rstd)
    assert not dz[bad].any()
    assert not rows[:, bad].any()
    good = torch.ones(70, dtype=torch.bool).index_fill(0, bad, False)
    assert all(torch.equal(own[good], given[good]) for own, given in zip(rows, ids, strict=True))
    assert dz[good].any(dim=1).all()
    ids[table].clamp_(0, size - 1)
    assert int(embedding_layer_norm_fwd(*lookup, weight, bias, eps)[3]) == NO_BAD_ID


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}], ids=["plain", "dropout"])
def test_rows_that_the_triton_backward_splits(options):
    check_forward(CASE, (2, 5000, 11, 7, 2), options, torch.float32, "triton")
    check_backward(CASE, (2, 5000, 11, 7, 2), options, torch.float32, "triton")


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_infinity_and_nan_travel_as_in_torch(backend):
    values = make_inputs(CASE, (37, 32, 11, 7, 2), {}, torch.float32)
    values["word"][3, 5], values["position"][2, 1] = float("inf"), float("nan")
    assert_close_calibrated(CASE.run(values, backend), CASE.eager(**values), CASE.exact(values))


def test_strided_tables_and_ids():
    ids, tables, rest = inputs()
    expected = ops.embedding_layer_norm(*ids, *tables, *rest)
    apart = [torch.stack([t, t], -1)[..., 0] for t in (*ids, *tables)]
    for backend in ("cpp", "triton"):
        torch.testing.assert_close(ops.embedding_layer_norm(*apart, *rest, backend=backend), expected)


def test_parameters_of_other_dtypes_are_converted():
    ids, tables, rest = inputs()
    expected = ops.embedding_layer_norm(*ids, *tables, *rest, backend="cpp")
    doubles = [t.double() for t in (*tables[1:], *rest[:2])]
    actual = ops.embedding_layer_norm(*ids, tables[0], *doubles, rest[2], backend="cpp")
    torch.testing.assert_close(actual, expected)


def test_results_do_not_depend_on_the_number_of_threads(threads):
    values = make_inputs(CASE, (513, 64, 300, 128, 2), {"dropout_p": 0.2}, torch.float32)
    names, found = [n for n in CASE.gradients if n in values], []
    for count in (1, 2):
        threads(count)
        leaves = {**values, **{name: values[name].detach().requires_grad_() for name in names}}
        out = CASE.run(leaves, "cpp")
        found.append([out, *torch.autograd.grad(out.square().sum(), [leaves[name] for name in names])])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_other_bad_input_is_named():
    ids, tables, rest = inputs()
    with pytest.raises(ValueError, match=r"expected ln_weight of shape \(8,\) .*, got \(4,\)"):
        ops.embedding_layer_norm(*ids, *tables, torch.ones(4), *rest[1:])
    with pytest.raises(ValueError, match="one device"):
        ops.embedding_layer_norm(*ids, *tables[:2], tables[2].to("meta"), *rest)
    with pytest.raises(TypeError, match="input_ids must be int64"):
        ops.embedding_layer_norm(ids[0].float(), *ids[1:], *tables, *rest)
    with pytest.raises(ValueError, match=r"expected position_ids of shape \(5,\)"):
        ops.embedding_layer_norm(*ids[:2], ids[2][:4], *tables, *rest)
    with pytest.raises(ValueError, match="exactly one"):
        ops.embedding_layer_norm(None, *ids[1:], *tables, *rest)
    with pytest.raises(ValueError, match="both token_type_ids and token_type, or neither"):
        ops.embedding_layer_norm(ids[0], None, ids[2], *tables, *rest)
    with pytest.raises(ValueError, match=r"inputs_embeds .*\(5, 9\)"):
        ops.embedding_layer_norm(None, *ids[1:], *tables, *rest, inputs_embeds=torch.zeros(5, 9))


@pytest.mark.parametrize("typed", [True, False])
def test_registered_as_torch_wants_it(typed):
    values = make_inputs(CASE, (7, 12, 11, 9, 2), {"typed": typed}, torch.float32)
    names = ("token_type_ids", "position_ids", "word", "token_type", "position", "ln_weight", "ln_bias")
    tensors = [values["input_ids"], None, *(values[name] for name in names)]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(
        torch.ops.albert_fast.embedding_layer_norm_fwd.default, (*leaves, 1e-12, 0, 1, 0.0, None, "auto")
    )
