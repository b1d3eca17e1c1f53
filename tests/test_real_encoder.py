"""A real trained ALBERT, the phoneme encoder of data/plbert, on real sequences: transformers' numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
import transformers
from torch import Tensor

import albert_fast
from albert_fast.models import reference
from albert_fast.testing import require_data

pytestmark = pytest.mark.xdist_group("real encoder")  # one process, which computes what is expected once
Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """(ids, mask) of 200 sequences, 190 of the file's shorter half and 10 up to its longest; 10 in a batch, by length."""
    folder = require_data("plbert")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    lines = sorted((folder / "phonemes.txt").read_text(encoding="utf-8").splitlines(), key=len)
    lines = lines[:950:5] + lines[1098::100]
    sequences = [[0, *(vocabulary[symbol] for symbol in line), 0] for line in lines]
    assert len(sequences) == 200
    result = []
    for start in range(0, 200, 10):
        rows = [torch.tensor(ids) for ids in sequences[start : start + 10]]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        result.append((torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask))
    return result


@pytest.fixture(scope="module")
def expected(batches: list[Batch]) -> Callable[[int], Tensor]:
    """transformers' last_hidden_state of the batch of a number, computed once for all models."""
    theirs = transformers.AlbertModel.from_pretrained(
        require_data("plbert"), add_pooling_layer=False, attn_implementation="eager"
    ).eval()

    @cache
    def states(number: int) -> Tensor:
        ids, mask = batches[number]
        with torch.no_grad():
            return theirs(ids, mask).last_hidden_state

    return states


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(0, 20, 5), id="40"),
        pytest.param(range(20), id="200", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("module", [pytest.param(reference, id="eager"), pytest.param(albert_fast, id="fast")])
def test_real_sequences(
    module: ModuleType, numbers: range, batches: list[Batch], expected: Callable[[int], Tensor]
) -> None:
    """Within 1e-4 of a hidden state whose elements reach several units; padding is zero."""
    model = module.ALBERTModel.from_pretrained(require_data("plbert"))
    assert model.pooler is None
    assert sum(p.numel() for p in model.parameters()) == 5_701_888
    with torch.no_grad():
        for number in numbers:
            ids, mask = batches[number]
            states = model(ids, mask).last_hidden_state
            real = mask.bool()
            torch.testing.assert_close(states[real], expected(number)[real], rtol=0, atol=1e-4)
            assert not states[~real].any()
