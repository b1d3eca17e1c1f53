import pytest
import torch

from albert_fast import ops
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
    with pytest.raises(ValueError, match=r"ln_weight \(4,\), expected \(8,\)"):
        ops.embedding_projection(*ids, *tables, torch.ones(4), *rest[1:])
    with pytest.raises(ValueError, match="one device"):
        ops.embedding_projection(*ids, *tables[:2], tables[2].to("meta"), *rest)
    with pytest.raises(TypeError, match="input_ids must be int64"):
        ops.embedding_projection(ids[0].float(), *ids[1:], *tables, *rest)
    with pytest.raises(ValueError, match=r"position_ids \(4,\)"):
        ops.embedding_projection(*ids[:2], ids[2][:4], *tables, *rest)
    with pytest.raises(ValueError, match="exactly one"):
        ops.embedding_projection(None, *ids[1:], *tables, *rest)
    with pytest.raises(ValueError, match=r"inputs_embeds \(5, 9\)"):
        ops.embedding_projection(None, *ids[1:], *tables, *rest, inputs_embeds=torch.zeros(5, 9))
    nothing = [t[:0] for t in ids]
    assert ops.embedding_projection(*nothing, *tables, *rest).shape == (0, 12)
