"""Pre-training against other code: Hugging Face's model with torch's AdamW, LAMB's formulas, learning-rate schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from albert_fast import ALBERTConfig, ALBERTForPreTraining
from albert_fast.training import train
from albert_fast.training.optimization import (
    cosine_schedule,
    linear_schedule,
    make_lamb,
    make_optimizer,
    parameter_groups,
)
from albert_fast.training.pretrain_run import PretrainingStep

CONFIG = ALBERTConfig(
    vocab_size=300,
    embedding_size=16,
    hidden_size=32,
    num_attention_heads=4,
    num_hidden_layers=3,
    intermediate_size=64,
    max_position_embeddings=32,
    classifier_dropout_prob=0.0,
)


def make_batches(steps: int) -> list[dict[str, Tensor]]:
    """Random padded batches with something to learn: few ids are common, and sentences in order begin with another token."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(steps):
        lengths = torch.randint(6, 25, (8,), generator=generator)
        ids = 5 + (295 * torch.rand((8, 24), generator=generator) ** 6).long()
        order = torch.randint(0, 2, (8,), generator=generator)
        ids[:, 0] = 2 + order
        mask = torch.arange(24) < lengths[:, None]
        hidden = (torch.rand(ids.shape, generator=generator) < 0.2) & mask
        hidden[:, :2] = torch.tensor([False, True])
        labels = torch.where(hidden, ids, -100)
        types = (torch.arange(24) >= lengths[:, None] // 2).long() * mask
        batches.append(
            {
                "input_ids": torch.where(hidden, 4, ids) * mask,
                "attention_mask": mask.long(),
                "token_type_ids": types,
                "labels": labels,
                "sentence_order_label": order,
            }
        )
    return batches


def packed(batch: dict[str, Tensor]) -> dict[str, object]:
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    return {
        **{name: batch[name][real] for name in ("input_ids", "token_type_ids", "labels")},
        "wanted_tokens": batch["labels"][real] != -100,
        "sentence_order_label": batch["sentence_order_label"],
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().numpy(),
        "max_seqlen": int(lengths.max()),
    }


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.thorough)])
def test_losses_are_hugging_faces_at_every_step(steps: int, one_thread: None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = ALBERTForPreTraining(CONFIG)
    theirs = transformers.AlbertForPreTraining(transformers.AlbertConfig(**CONFIG.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    batches, losses = make_batches(steps), ([], [])
    module = PretrainingStep(ours)
    optimizer = make_optimizer(module, 4e-3, 0.01)
    schedule = linear_schedule(optimizer, steps, 0.1)
    train(
        module,
        map(packed, batches),
        None,
        optimizer,
        "cpu",
        scheduler=schedule,
        max_grad_norm=1.0,
        after_step=lambda loss, _: losses[0].append(loss),
        progress=False,
    )
    optimizer = torch.optim.AdamW(parameter_groups(theirs, 0.01), lr=4e-3, betas=(0.9, 0.98), eps=1e-6)
    schedule = linear_schedule(optimizer, steps, 0.1)
    theirs.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = theirs(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses[1].append(float(loss.detach()))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3
    assert losses[1][-1] < losses[1][0] - 0.3, "nothing was learnt, so the comparison says little"


def test_lamb_is_the_papers() -> None:
    """You et al. 2019, algorithm 2, without bias correction; no trust ratio for parameters of one dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.LayerNorm(40), nn.Linear(40, 3))
    with torch.no_grad():
        model[0].weight.mul_(100)  # a norm far above the bound of 10 that some implementations have
        model[2].weight.zero_()  # no norm, so no ratio
    exact = [parameter.detach().double().clone() for parameter in model.parameters()]
    moments = [(torch.zeros_like(one), torch.zeros_like(one)) for one in exact]
    optimizer = make_lamb(model, 0.01, 0.1)
    schedule = cosine_schedule(optimizer, 20, 0.2)
    for step in range(12):
        rate = 0.01 * min((step + 1) / 4, (1 - math.cos(math.pi * min(1.0, (20 - step) / 16))) / 2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        for parameter, value, (first, second) in zip(model.parameters(), exact, moments, strict=True):
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.double()
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            update = first / (second.sqrt() + 1e-6)
            if value.dim() > 1:
                update += 0.1 * value
                update *= value.norm() / update.norm() if value.any() else 1
            value -= rate * update
        optimizer.step()
        schedule.step()
    for parameter, value in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-4, atol=1e-5)


def test_schedules_warm_up_and_fall_to_zero() -> None:
    for schedule, middle in ((linear_schedule, 0.5), (cosine_schedule, 0.5)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        made = schedule(optimizer, 110, 10 / 110)
        rates = []
        for _ in range(111):
            rates.append(made.get_last_lr()[0] / 2)
            optimizer.step()
            made.step()
        assert rates[0] == pytest.approx(0.1)
        assert rates[9] == pytest.approx(1.0)
        assert rates[60] == pytest.approx(middle)
        assert rates[110] == pytest.approx(0.0, abs=1e-12)
        assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
