"""What CUDA graphs read, written by one Triton kernel: against plain torch, with junk where it writes."""

from __future__ import annotations

import pytest
import torch

from albert_fast.ops import GraphInputs
from albert_fast.testing import poison_empty
from albert_fast.testing.parity import device_of

pytest.importorskip("triton")

DEVICE = device_of("triton")
CAPACITY = 128
JUNK = -12345


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # Rows, and the rows before a row, take several blocks on small batches already.
    monkeypatch.setattr("albert_fast.kernels._graph_inputs._BLOCK", 16)


def made() -> GraphInputs:
    inputs = GraphInputs(CAPACITY, CAPACITY, DEVICE)
    for view in inputs.views(CAPACITY, CAPACITY):
        view.fill_(JUNK)
    return inputs


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.int64, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_written(inputs: GraphInputs, expected: list[torch.Tensor], ends: list[int], bounds: tuple[int, int]) -> None:
    """`expected` (T,) thrice and `ends`, then zeros and the last end up to `bounds`, and nothing behind them."""
    tokens, sequences = bounds
    *written, cu_seqlens = inputs.views(CAPACITY, CAPACITY)
    for actual, wanted in zip(written, expected, strict=True):
        whole = torch.full((CAPACITY,), JUNK, device=DEVICE)
        whole[:tokens] = 0
        whole[: len(wanted)] = wanted
        assert torch.equal(actual, whole)
    rest = [ends[-1]] * (sequences + 1 - len(ends)) + [JUNK] * (CAPACITY - sequences)
    assert cu_seqlens.tolist() == ends + rest


def cumulated(lengths: torch.Tensor) -> list[int]:
    return [0, *lengths.cumsum(0).tolist()]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 37), (19, 1)], ids=str)
def test_a_batch_without_padding_triton(shape, dtype):
    rows, columns = shape
    inputs, bounds = made(), (rows * columns + 5, rows + 3)
    ids, types = drawn(shape, dtype), drawn(shape, dtype, 1)
    positions = drawn((1, columns), dtype, 2).expand(shape)
    with poison_empty():
        indices, cu_seqlens = inputs.write_padded(ids, types, positions, None, None, ids.numel(), bounds)
    assert indices is None
    assert cu_seqlens.tolist() == list(range(0, rows * columns + 1, columns))
    assert_written(inputs, [ids.flatten(), types.flatten(), positions.flatten()], cu_seqlens.tolist(), bounds)


def test_types_and_positions_that_were_not_given_triton():
    inputs, ids = made(), drawn((3, 5))
    inputs.write_padded(ids, None, None, None, None, 15, (15, 3))
    expected = [ids.flatten(), torch.zeros_like(ids.flatten()), torch.arange(5, device=DEVICE).repeat(3)]
    assert_written(inputs, expected, [0, 5, 10, 15], (15, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (5, 13), (2, 37), (19, 1)], ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.6, 1.0])
def test_a_batch_with_padding_triton(shape, dtype, kept):
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(shape, generator=generator) < kept).to(DEVICE)
    mask[-1, -1] = True
    mask[0] &= shape[0] < 3  # a row without a token
    # Rows and columns that are strided, as those of a slice.
    ids = drawn((shape[0], 2 * shape[1]), torch.int32)[:, ::2]
    types, tokens = drawn((shape[1], shape[0]), seed=1).t(), int(mask.sum())
    inputs, bounds = made(), (shape[0] * shape[1], shape[0] + 1)
    with poison_empty():
        indices, cu_seqlens = inputs.write_padded(
            ids, types, None, mask.to(dtype), mask.count_nonzero(1), tokens, bounds
        )
    assert torch.equal(indices, mask.flatten().nonzero().squeeze(1))
    assert cu_seqlens.tolist() == cumulated(mask.sum(1))
    positions = torch.arange(shape[1], device=DEVICE).expand(shape)
    assert_written(inputs, [ids[mask], types[mask], positions[mask]], cu_seqlens.tolist(), bounds)


@pytest.mark.parametrize("given", [False, True], ids=["positions made", "positions given"])
def test_packed_sequences_triton(given):
    lengths = torch.tensor([3, 0, 37, 1, 0])
    ends = cumulated(lengths)
    ids, types = drawn((2, ends[-1]), torch.int32)[:, : ends[-1]], drawn((ends[-1],), seed=1)
    positions = drawn((2 * ends[-1],), seed=2)[::2] if given else None
    inputs, bounds = made(), (ends[-1] + 30, 6)
    inputs.write_packed(ids[1], types, positions, torch.tensor(ends, dtype=torch.int32, device=DEVICE), 37, bounds)
    made_up = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    assert_written(inputs, [ids[1], types, made_up if positions is None else positions], ends, bounds)


def test_blank_is_token_0_in_sequences_of_one_length():
    inputs = made()
    inputs.blank(20, 3, 6)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert_written(inputs, [nothing] * 3, [0, 6, 12, 18], (20, 3))
