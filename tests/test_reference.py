"""The eager models and the fast ones against transformers: outputs, losses and gradients over drawn configurations."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import albert_fast
from albert_fast.models import reference
from albert_fast.models.config import ALBERTConfig
from albert_fast.testing.model_pairs import (
    NAMES,
    OUTPUTS,
    SMALL,
    assert_gradients_equal,
    drawn_config,
    drawn_inputs,
    model_pair,
)

MODULES = [pytest.param(reference, id="eager"), pytest.param(albert_fast, id="fast")]
BY_TOKEN = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification")
LOWEST = torch.finfo(torch.float32).min


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def padding_value(name: str) -> float:
    return LOWEST if name == "ForQuestionAnswering" else 0.0


def loss_of(output: Any) -> Tensor:
    """The loss; for a bare model some scalar that every output feeds."""
    if "loss" in output.keys():  # noqa: SIM118 (iterating over an output gives its values)
        return output.loss
    hidden = output.last_hidden_state
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum() + output.pooler_output.square().sum()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("seed", [*range(14), *(pytest.param(s, marks=pytest.mark.thorough) for s in range(14, 36))])
def test_outputs_losses_and_gradients_are_those_of_transformers(module: ModuleType, seed: int) -> None:
    """Drawn configurations, all seven models: full batches at even seeds, padding on the right at odd ones."""
    for name in NAMES:
        ours, theirs = model_pair(module, name, drawn_config(seed), seed)
        inputs = drawn_inputs(name, ours.config, "right" if seed % 2 else "none", seed)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        comparable = dict(inputs)
        if name in BY_TOKEN:
            comparable["labels"] = inputs["labels"].masked_fill(~mask, -100)
        actual, expected = ours(**inputs), theirs(**comparable)
        with torch.no_grad():
            inference = ours(**inputs)  # the fast model then has all layers in one operator
        for field, per_token in OUTPUTS[name].items():
            which = mask if per_token else slice(None)
            assert_equal(actual[field][which], expected[field][which])
            assert_equal(inference[field][which], expected[field][which])
            if per_token:
                assert (actual[field][~mask] == padding_value(name)).all()
        if mask.all() or name not in ("Model", "ForQuestionAnswering"):
            # Those two read padding in transformers' loss; row by row, below, they are compared as well.
            assert_equal(loss_of(actual), loss_of(expected))
            for output in (actual, expected):
                loss_of(output).backward()
            assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty row"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "ForMultipleChoice"])
def test_padding_anywhere_changes_nothing(module: ModuleType, name: str, kind: str) -> None:
    """Each row equals transformers' answer for its real tokens alone; loss and gradients are PyTorch's on those."""
    for seed in range(3):
        ours, theirs = model_pair(module, name, SMALL | {"num_hidden_groups": 2}, seed)
        inputs = drawn_inputs(name, ours.config, kind, 100 + seed)
        mask = inputs["attention_mask"].bool()
        full = mask.any(dim=1)
        actual, expected = ours(**inputs), row_by_row(theirs, name, inputs)
        for field, per_token in OUTPUTS[name].items():
            which = mask if per_token else full
            assert_equal(actual[field][which], expected[field])
            if per_token:
                assert (actual[field][~mask] == padding_value(name)).all()
        if full.all():
            losses = loss_of(actual), oracle_loss(name, inputs, mask, expected)
            # A bare model's scalar is a sum that cancels, of outputs that may each err by what assert_equal allows.
            terms = expected["last_hidden_state"].numel() if name == "Model" else 1
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5 * math.sqrt(terms))
            for loss in losses:
                loss.backward()
            assert_gradients_equal(ours, theirs)
        else:
            loss_of(actual).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def row_by_row(model: nn.Module, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `model` makes of each row's real tokens alone, joined: (T, ...) or, of the rows that have any, (rows, ...)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    default = {"token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    tokens = {key: (default | inputs)[key] for key in ("input_ids", *default)}
    rows = [model(**{k: v[i, mask[i]][None] for k, v in tokens.items()}) for i in mask.any(1).nonzero().flatten()]
    return {
        field: torch.cat([row[field].flatten(0, 1) if per_token else row[field] for row in rows])
        for field, per_token in OUTPUTS[name].items()
    }


def oracle_loss(name: str, inputs: dict[str, Tensor], mask: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """transformers' formulas on outputs of real tokens alone, (T, ...), and of rows, (B, ...)."""
    if name == "Model":
        scale = torch.linspace(-1, 1, outputs["last_hidden_state"].shape[-1])
        return (outputs["last_hidden_state"] * scale).sum() + outputs["pooler_output"].square().sum()
    if name == "ForSequenceClassification":
        return F.cross_entropy(outputs["logits"], inputs["labels"])
    if name == "ForQuestionAnswering":
        losses = []
        for field, key in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
            padded = outputs[field].new_full(mask.shape, -math.inf).index_put((mask,), outputs[field])
            positions = inputs[key]
            used = [i for i, p in enumerate(positions.tolist()) if p < mask.shape[1] and mask[i, p]]
            losses.append(F.cross_entropy(padded[used], positions[used]) if used else torch.zeros(()))
        return (losses[0] + losses[1]) / 2
    scores = outputs["prediction_logits" if name == "ForPreTraining" else "logits"]
    loss = F.cross_entropy(scores, inputs["labels"][mask])
    if name == "ForPreTraining":
        loss = loss + F.cross_entropy(outputs["sop_logits"], inputs["sentence_order_label"])
    return loss


@pytest.mark.parametrize("name", ["ForMaskedLM", "ForPreTraining"])
def test_the_loss_without_logits_is_that_of_transformers(name: str) -> None:
    """And its gradients: the decoder's weight is the embedding's, where both parts of its gradient add up."""
    ours, theirs = model_pair(albert_fast, name, SMALL)
    inputs = drawn_inputs(name, ours.config, "right", 3)
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)  # transformers reads them
    actual, expected = ours(**inputs, output_logits=False), theirs(**inputs)
    assert set(actual.keys()) == {"loss"} | ({"sop_logits"} if name == "ForPreTraining" else set())
    assert_equal(actual.loss, expected.loss)
    actual.loss.backward()
    expected.loss.backward()
    assert_gradients_equal(ours, theirs)
    del inputs["labels"]
    with pytest.raises(ValueError, match="needs labels"):
        ours(**inputs, output_logits=False)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0])),
        (None, 1, torch.tensor([[0.5], [-1.0], [2.0]])),
        ("regression", 4, torch.arange(12.0).view(3, 4) / 5),
        ("single_label_classification", 4, torch.tensor([0, 3, 1])),
        (None, 4, torch.tensor([0, -100, 1])),
        (None, 2, torch.tensor([[0], [1], [1]])),
        ("multi_label_classification", 4, (torch.arange(12).view(3, 4) % 2).float()),
        (None, 4, (torch.arange(12).view(3, 4) % 3 == 0).float()),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, Tensor) else str(value),
)
def test_sequence_losses_by_problem_type(module: ModuleType, problem: str, num_labels: int, labels: Tensor) -> None:
    fields = SMALL | {"num_labels": num_labels, "problem_type": problem}
    ours, theirs = model_pair(module, "ForSequenceClassification", fields)
    ids = torch.arange(15).view(3, 5)
    actual, expected = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert_equal(actual.loss, expected.loss)
    assert_equal(actual.logits, expected.logits)
    actual.loss.backward()
    expected.loss.backward()
    assert_gradients_equal(ours, theirs)
    assert ours.config.problem_type == problem
    if labels.dtype == torch.int64:
        assert torch.equal(ours(ids, labels=labels.int()).loss, actual.loss)


@pytest.mark.parametrize("module", MODULES)
def test_a_mean_over_no_label_is_zero(module: ModuleType) -> None:
    """transformers gives NaN here."""
    ids, none = torch.arange(10).view(2, 5), torch.full((2, 5), -100)
    padded = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    cases: list[tuple[str, dict[str, Tensor]]] = [
        ("ForMaskedLM", {"labels": none}),
        ("ForMaskedLM", {"labels": none.masked_fill(padded == 0, 1), "attention_mask": padded}),
        ("ForTokenClassification", {"labels": none}),
        ("ForSequenceClassification", {"labels": torch.tensor([-100, -100])}),
        ("ForQuestionAnswering", {"start_positions": torch.tensor([9, 9]), "end_positions": torch.tensor([5, 7])}),
    ]
    for name, labels in cases:
        model, _ = model_pair(module, name, SMALL)
        loss = model(ids, **labels).loss
        assert loss.item() == 0.0, name
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters()), name


@pytest.mark.parametrize("module", MODULES)
def test_the_pretraining_loss_needs_both_labels(module: ModuleType) -> None:
    ours, theirs = model_pair(module, "ForPreTraining", SMALL)
    ids = torch.arange(10).view(2, 5)
    for labels in ({"labels": ids}, {"sentence_order_label": torch.tensor([0, 1])}):
        assert ours(ids, **labels).loss is None
        assert theirs(ids, **labels).loss is None


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("name", ["Model", "ForTokenClassification", "ForSequenceClassification"])
def test_hidden_states_and_attentions(module: ModuleType, name: str, inner: int) -> None:
    ours, theirs = model_pair(module, name, SMALL | {"num_hidden_groups": 2, "inner_group_num": inner})
    ids = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    arguments = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    actual, expected = ours(ids, **arguments), theirs(ids, **arguments)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 1 + 3 * inner
    assert len(actual.attentions) == len(expected.attentions) == 3 * inner
    real = mask.bool()
    for states, their_states in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_equal(states[real], their_states[real])
        assert not states[~real].any()
    for probabilities, their_probabilities in zip(actual.attentions, expected.attentions, strict=True):
        queries = real[:, None, :, None].expand_as(probabilities)
        assert_equal(probabilities[queries], their_probabilities[queries])
        assert not probabilities[~queries].any()
    plain = ours(ids, attention_mask=mask)
    assert plain.hidden_states is None
    assert plain.attentions is None


@pytest.mark.parametrize("module", MODULES)
def test_inputs_embeds(module: ModuleType) -> None:
    ours, theirs = model_pair(module, "Model", SMALL)
    embeds = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    mine, other = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    actual, expected = ours(inputs_embeds=mine), theirs(inputs_embeds=other)
    assert_equal(actual.last_hidden_state, expected.last_hidden_state)
    loss_of(actual).backward()
    loss_of(expected).backward()
    assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm()
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("module", MODULES)
def test_what_stands_at_padding_is_never_read(module: ModuleType) -> None:
    model, _ = model_pair(module, "Model", SMALL)
    ids = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1]])
    padding = mask == 0
    clean = model(ids, mask)
    dirty = model(
        ids.masked_fill(padding, 1 << 40),
        mask,
        token_type_ids=torch.zeros_like(ids).masked_fill(padding, 99),
        position_ids=torch.arange(6).expand(2, 6).masked_fill(padding, -5),
    )
    assert torch.equal(dirty.last_hidden_state, clean.last_hidden_state)
    assert torch.equal(dirty.pooler_output, clean.pooler_output)
    embeds = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    expected = model(inputs_embeds=embeds.masked_fill(padding[..., None], 0.0), attention_mask=mask)
    poisoned = embeds.masked_fill(padding[..., None], math.nan).requires_grad_()
    actual = model(inputs_embeds=poisoned, attention_mask=mask)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    loss_of(actual).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not poisoned.grad[padding].any()


@pytest.mark.parametrize("module", MODULES)
def test_each_row_pools_its_first_real_token(module: ModuleType) -> None:
    model, _ = model_pair(module, "Model", SMALL)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
    out = model(torch.arange(16).view(4, 4), mask)
    hidden = out.last_hidden_state
    first = torch.stack([hidden[0, 0], hidden[1, 2], torch.zeros(48), hidden[3, 1]])
    assert_equal(out.pooler_output, torch.tanh(model.pooler(first)))


@pytest.mark.parametrize("module", MODULES)
def test_masks_of_any_number_type_mean_the_same(module: ModuleType) -> None:
    model, _ = model_pair(module, "Model", SMALL)
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    expected = model(ids, mask).last_hidden_state
    for dtype in (torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(model(ids, mask.to(dtype)).last_hidden_state, expected)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", NAMES)
def test_empty_batches(module: ModuleType, name: str) -> None:
    model, _ = model_pair(module, name, SMALL)
    choices = (3,) if name == "ForMultipleChoice" else ()
    for rows, columns in ((0, 5), (2, 0), (0, 0)):
        out = model(torch.zeros(rows, *choices, columns, dtype=torch.int64))
        for field, per_token in OUTPUTS[name].items():
            assert out[field].shape[: 1 + per_token] == ((rows, columns) if per_token else (rows,))
            assert out[field].isfinite().all()
    masked = model(torch.ones(2, *choices, 4, dtype=torch.int64), torch.zeros(2, *choices, 4))
    assert all(masked[field].isfinite().all() for field in OUTPUTS[name])


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", ["Model", "ForMaskedLM"])
def test_tuples_and_positional_arguments(module: ModuleType, name: str) -> None:
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    types, positions = torch.ones_like(ids), torch.arange(4).flip(0)[None].expand(2, 4)
    ours, theirs = model_pair(module, name, SMALL)
    labels = {} if name == "Model" else {"labels": ids}
    unnamed = ours(ids, mask, types, positions, return_dict=False, **labels)
    named = ours(input_ids=ids, attention_mask=mask, token_type_ids=types, position_ids=positions[:1], **labels)
    assert isinstance(unnamed, tuple)
    assert len(unnamed) == len(theirs(ids, mask, types, positions, return_dict=False, **labels)) == 2
    assert torch.equal(unnamed[0], named[0])
    assert torch.equal(unnamed[1], named[1])


@pytest.mark.parametrize("module", MODULES)
def test_without_a_pooler(module: ModuleType) -> None:
    bare = module.ALBERTModel(ALBERTConfig(**SMALL), add_pooling_layer=False)
    assert bare.pooler is None
    assert bare(torch.arange(4)[None]).pooler_output is None
    assert "pooler.weight" not in bare.state_dict()
