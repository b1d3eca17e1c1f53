"""The table of floors: every GPU operator in both directions, its counts against hand counts, its times against the rates."""

from __future__ import annotations

import pytest
import torch

from albert_fast.testing import ALL_CASES, compile_check, floors
from albert_fast.testing.parity import make_inputs


def counted(operator: str) -> dict[tuple[str, str], floors.Count]:
    return {(count.shape, count.direction): count for count in floors.counts([operator])}


def test_every_gpu_kernel_is_counted_forward_and_backward():
    # The floor of whole layers on rounded weights is that of their parts.
    assert sorted(floors.SHAPES) == sorted(set(compile_check.OPERATORS) - {"quantized_encoder"})
    for count in floors.counts():
        assert count.bytes > 0
        assert count.operations > 0
        assert (count.operator, count.direction) != ("encoder", "bwd"), "it has no gradient"
    directions = [count.direction for count in floors.counts()]
    assert directions.count("fwd") == sum(map(len, floors.SHAPES.values()))
    assert directions.count("bwd") == directions.count("fwd") - len(floors.SHAPES["encoder"])


def test_counts_by_hand():
    rows, width, middle = 32768, 768, 3072
    found = counted("bias_gelu")
    assert found["base 32768x3072", "fwd"].bytes == 2 * (2 * rows * middle + middle)
    assert found["base 32768x3072", "bwd"].bytes == 2 * (3 * rows * middle + 2 * middle)
    found = counted("add_layer_norm")
    assert found["base 32768x768", "fwd"].bytes == 2 * (3 * rows * width + 3 * width)
    # x, residual, cotangent, one gradient for both; three vectors read, three gradients written; mean and rstd.
    assert found["base 32768x768", "bwd"].bytes == 2 * (4 * rows * width + 6 * width) + 8 * rows
    found = counted("encoder")
    layer = 4 * width * width + 2 * width * middle
    assert found["base 1x128", "fwd"].operations == 12 * (2 * 128 * layer + 4 * 128 * 128 * width)
    # Embeddings in and out, matrices and vectors once, two ends of a length.
    assert found["base 1x128", "fwd"].bytes == 2 * (2 * 128 * width + layer + 9 * width + middle) + 4 * 2
    found = counted("attention")
    lengths = range(8, 513, 8)
    pairs = sum(length * length for length in lengths)
    assert found["base 64x8..512", "fwd"].operations == 4 * 768 * pairs
    assert found["base 64x8..512", "bwd"].operations == 10 * 768 * pairs
    # q, k, v, output and the four gradients of them; logarithms of sums; two arrays of 65 lengths' ends.
    assert found["base 64x8..512", "bwd"].bytes == sum(lengths) * (2 * 8 * 768 + 4 * 12) + 2 * 4 * 65


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
    h100 = floors.CHIPS[-1]
    assert floors.Count("bias_gelu", "fwd", "", 3.35e12, 1.0).seconds(h100) == (1.0, "memory")
    assert floors.Count("attention", "fwd", "", 1.0, 989e12).seconds(h100) == (1.0, "bf16")
    assert floors.Count("bias_gelu", "fwd", "", 1.0, 134e12).seconds(h100) == (2.0, "f32")


def test_the_table_says_what_it_is(capsys):
    assert floors.main(["--kernel", "bias_gelu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(floors.SHAPES["bias_gelu"])
    assert "120.2 memory" in lines[2]  # 402.7 MB at 3.35 TB/s
    assert last.endswith("no measurements.")
