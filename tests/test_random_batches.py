"""Hundreds of batches of random sizes, lengths and masks, in every precision of the CPU engine, against the plain reference."""

import random

import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTModel
from albert_fast.models import reference
from albert_fast.testing import poison_empty

DRAWS = 400
# Largest relative error of a batch, by precision: three to five times the largest of these draws.
ALLOWED = {"fp32": 3e-6, "int16": 1.5e-3, "int8": 0.05}
SIZES = [(26, 1, 50), (48, 3, 129), (64, 2, 800), (96, 4, 40)]  # hidden, heads, intermediate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(reference, the fast model by precision) of every size."""
    made = []
    for i, (hidden, heads, intermediate) in enumerate(SIZES):
        torch.manual_seed(i)
        config = ALBERTConfig(
            vocab_size=50, embedding_size=20, hidden_size=hidden, num_attention_heads=heads, intermediate_size=intermediate,
            num_hidden_layers=3, num_hidden_groups=1 + i % 3, max_position_embeddings=80, initializer_range=0.1,
        )  # fmt: skip
        exact = reference.ALBERTModel(config).eval()
        with torch.no_grad():
            for name, parameter in exact.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        folder = tmp_path_factory.mktemp("size")
        exact.save_pretrained(folder)
        made.append((exact, {p: ALBERTModel.from_pretrained(folder, precision=p) for p in ALLOWED}))
    return made


def drawn(dice):
    """Ids and mask (B, S): right or left padding, holes, empty rows, or none at all."""
    rows, columns = dice.choice([1, 1, 2, 3, 5, 9, 17]), dice.randint(1, 80)
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    ids = torch.randint(50, (rows, columns), generator=generator)
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    mask = {
        "none": torch.ones(rows, columns, dtype=torch.bool),
        "right": torch.arange(columns) < lengths,
        "left": torch.arange(columns) >= lengths,
        "holes": torch.rand(rows, columns, generator=generator) < dice.random(),
    }[dice.choice(["none", "right", "left", "holes"])]
    return ids, mask.long()


@pytest.mark.parametrize("part", range(4))
def test_random_batches(models, part):
    dice, before = random.Random(part), torch.get_num_threads()
    try:
        for draw in range(DRAWS // 4):
            exact, fast = models[dice.randrange(len(SIZES))]
            (ids, mask), precision = drawn(dice), dice.choice(list(ALLOWED))
            torch.set_num_threads(dice.choice([1, 2, 3]))
            with torch.no_grad(), poison_empty():
                actual, expected = fast[precision](ids, mask), exact(ids, mask)
            for name in ("last_hidden_state", "pooler_output"):
                a, e = getattr(actual, name), getattr(expected, name)
                error = ((a - e).norm() / e.norm().clamp_min(1e-6)).item()
                assert error <= ALLOWED[precision], (
                    f"draw {draw}, {precision}, {tuple(ids.shape)}: {name} errs by {error}"
                )
    finally:
        torch.set_num_threads(before)
