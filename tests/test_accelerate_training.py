"""Training an accelerated model: transformers' gradients, with dropout, autocast, checkpointing and Trainer."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

import albert_fast
from albert_fast.accelerate import forward, stacks
from albert_fast.testing.accelerated_models import (
    PREFIXES,
    STACK_SLACK,
    assert_like_original,
    stack_of,
    tiny_batch,
    tiny_model,
)
from albert_fast.testing.model_pairs import assert_gradients_equal, drawn_mask
from albert_fast.testing.tolerances import assert_close_calibrated
from albert_fast.training import test as test_loop
from albert_fast.training import train

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread", "warn_again"), pytest.mark.filterwarnings("error:albert_fast")]

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = {
    "ForMaskedLM": {"labels": tiny_batch(seed=7)["input_ids"]},
    "ForSequenceClassification": {"labels": torch.tensor([0, 2, 1, 1])},
    "ForTokenClassification": {"labels": tiny_batch(seed=7)["input_ids"] % 3},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([0, 1, 2, 0]),
        "end_positions": torch.tensor([0, 3, 2, 9]),
    },
    "ForMultipleChoice": {"labels": torch.tensor([0, 1, 1, 0])},
}


def labelled(head, mask):
    batch = tiny_batch(head)
    labels = dict(LABELS[head])
    if mask is not None:
        shape = batch["input_ids"].shape
        batch["attention_mask"] = mask.view(shape) if mask.numel() == batch["input_ids"].numel() else mask
        if labels.get("labels", mask[:, 0]).shape == mask.shape:
            labels["labels"] = labels["labels"].masked_fill(mask == 0, -100)
    return batch | labels


def trained(model, batch, autocast=False):
    """The loss, after its backward."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("family", "head"), [(family, head) for i, family in enumerate(PREFIXES) for head in list(LABELS)[i % 2 :: 2]]
)
def test_gradients_are_those_of_transformers(family, head):
    model = tiny_model(family, head, **NO_DROPOUT).train()
    if hasattr(model.config, "classifier_dropout_prob"):
        model = tiny_model(family, head, **NO_DROPOUT, classifier_dropout_prob=0.0).train()
    for dropout in model.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    mask = drawn_mask("right", 8 if head == "ForMultipleChoice" else 4, 11, seed=0)
    batch, other = labelled(head, mask), copy.deepcopy(model)
    trained(other, batch)
    found = trained(albert_fast.accelerate(model), batch)
    assert_like_original(found, model, lambda model: model(**batch).loss, "loss")
    assert_gradients_equal(model, other)


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
@pytest.mark.parametrize("padding", ["zeros", "keep"])
@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_applied_where_transformers_applies_it(family, padding, which):
    """A share of 1 leaves nothing to chance: whole branches are zeros, in both."""
    model = tiny_model(family, **{**NO_DROPOUT, which: 1.0}).train()
    for module in (model.embeddings, model.embeddings.dropout):
        module.eval()
    batch = tiny_batch() | {"attention_mask": drawn_mask("right", 4, 11, seed=0)}
    real = batch["attention_mask"] == 1
    with torch.no_grad():
        slow, exact = (one(**batch).last_hidden_state[real] for one in (model, copy.deepcopy(model).double()))
        for module in stack_of(model).modules():
            if isinstance(module, torch.nn.Dropout) and module.p == 1:
                module.p = 1 - 1e-6
        fast = albert_fast.accelerate(model, padding=padding)(**batch).last_hidden_state
        assert_close_calibrated(fast[real], slow, exact, slack=STACK_SLACK)
        assert not torch.allclose(model.eval()(**batch).last_hidden_state[real], fast[real], atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_dropout_is_random_and_keeps_the_mean(family):
    dropout = dict.fromkeys(NO_DROPOUT, 0.1)
    model, batch = albert_fast.accelerate(tiny_model(family, **dropout)), tiny_batch(rows=2)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        assert torch.equal(model(**batch).last_hidden_state, expected)
        model.train()
        several = torch.stack([model(**batch).last_hidden_state for _ in range(60)])
        model.eval()
        assert torch.equal(model(**batch).last_hidden_state, expected)
    assert several.std(0).min() > 0
    assert (several.mean(0) - expected).abs().mean() < 0.5 * several.std(0).mean()
    torch.manual_seed(5)
    first = model.train()(**batch).last_hidden_state
    torch.manual_seed(5)
    assert torch.equal(model(**batch).last_hidden_state, first)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_gradient_checkpointing_recomputes_layers(family, monkeypatch):
    from albert_fast.layers import stack as layers_stack

    model = tiny_model(family, "ForSequenceClassification").train()
    batch = labelled("ForSequenceClassification", drawn_mask("right", 4, 11, seed=0))
    plain = albert_fast.accelerate(copy.deepcopy(model))
    torch.manual_seed(3)
    expected = trained(plain, batch)
    calls, real = [], layers_stack.checkpoint
    monkeypatch.setattr(layers_stack, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    albert_fast.accelerate(model).gradient_checkpointing_enable()
    torch.manual_seed(3)
    assert torch.equal(trained(model, batch), expected)
    assert len(calls) == 3
    assert_gradients_equal(model, plain)
    model.gradient_checkpointing_disable()
    trained(model, batch)
    assert len(calls) == 3


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast(family, mode):
    model = tiny_model(family, "ForSequenceClassification", **NO_DROPOUT)
    for dropout in model.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    batch = labelled("ForSequenceClassification", drawn_mask("right", 4, 11, seed=0))
    model = getattr(albert_fast.accelerate(model), mode)()
    other = albert_fast.restore(copy.deepcopy(model))
    exact = trained(copy.deepcopy(other), batch)
    fast, slow = trained(model, batch, autocast=True), trained(other, batch, autocast=True)
    assert abs(fast - exact) <= 2 * abs(slow - exact) + 2e-2
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or ours.grad.dtype == theirs.grad.dtype
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = [one.base_model(**tiny_batch()).last_hidden_state for one in (model, other)]
    assert states[0].dtype == states[1].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_types(dtype):
    model = tiny_model("bert").to(dtype)
    batch = tiny_batch() | {"attention_mask": drawn_mask("right", 4, 11, seed=0)}
    real = batch["attention_mask"] == 1
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**batch).last_hidden_state[real]
        slow = model(**batch).last_hidden_state[real]
        albert_fast.accelerate(model)
        known = dtype == torch.bfloat16
        with nullcontext() if known else pytest.warns(UserWarning, match="original forward.*takes float32"):
            forward.warn_of_original.cache_clear()
            fast = model(**batch).last_hidden_state[real]
    assert fast.dtype == dtype
    error, allowed = ((one.double() - exact).abs().max() for one in (fast, slow))
    assert error <= 2 * allowed + {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]


@pytest.mark.filterwarnings("default:.*pin_memory")
def test_trainer_reaches_the_loss_that_it_reaches_without(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_model("bert", "ForSequenceClassification", **NO_DROPOUT)
    rows = [
        {"input_ids": ids, "labels": int(ids[0]) % 3} for ids in tiny_batch(rows=24, columns=9, seed=2)["input_ids"]
    ]
    losses = []
    for fast in (False, True):
        learner = copy.deepcopy(model)
        if fast:
            albert_fast.accelerate(learner)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-3, seed=0,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model=learner, args=arguments, train_dataset=rows)
        losses.append(trainer.train().training_loss)
        assert isinstance(stack_of(learner), stacks.Accelerated) == fast
    assert abs(losses[0] - losses[1]) < 1e-4


def test_distributed_data_parallel(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("bert", "ForSequenceClassification", **NO_DROPOUT).eval()
        batch, other = labelled("ForSequenceClassification", None), copy.deepcopy(model)
        trained(other, batch)
        trained(torch.nn.parallel.DistributedDataParallel(albert_fast.accelerate(model)), batch)
        assert_gradients_equal(model, other)
    finally:
        distributed.destroy_process_group()


def test_functional_call_sees_other_parameters():
    model, batch = albert_fast.accelerate(tiny_model("bert")), tiny_batch()
    parameters = {name: parameter * 1.5 for name, parameter in model.named_parameters()}
    fast = torch.func.functional_call(model, parameters, (), batch).last_hidden_state

    def original(model):
        scaled = {name: parameter * 1.5 for name, parameter in model.named_parameters()}
        return torch.func.functional_call(model, scaled, (), batch).last_hidden_state

    assert_like_original(fast, model, original)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_an_accelerated_model_trains_through_this_librarys_loop(head):
    batches = [labelled(head, None) for _ in range(3)]
    plain = tiny_model("albert", head, **NO_DROPOUT, classifier_dropout_prob=0.0)
    fast = albert_fast.accelerate(copy.deepcopy(plain))
    losses = []
    for model in (plain, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        passes = [train(model, batches, None, optimizer, "cpu", progress=False) for _ in range(2)]
        losses.append([*passes, test_loop(model, batches, None, "cpu", progress=False)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][2] < losses[0][0], "nothing was learnt"
