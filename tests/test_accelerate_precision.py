"""Accelerated models in fewer bits: a copy for inference, the model's own parameters for all else."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import albert_fast
from albert_fast.accelerate import reduced, stacks
from albert_fast.runtime import dispatch
from albert_fast.testing.accelerated_models import PREFIXES, assert_like_original, stack_of, tiny_batch, tiny_model
from albert_fast.testing.model_pairs import drawn_mask
from albert_fast.testing.parity import every_pair

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "warn_again"),
    pytest.mark.filterwarnings("error:albert_fast"),
    pytest.mark.filterwarnings("ignore:albert_fast. precision=.*runs without AVX512-VNNI"),
]
BITS = {"bf16": 3e-2, "int16": 3e-3, "int8": 0.2}
MASK = drawn_mask("right", 4, 11, seed=0)
BATCH = tiny_batch() | {"attention_mask": MASK}


def states(model, batch=BATCH):
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    return hidden[MASK == 1] if batch is BATCH else hidden


def plan(model):
    with torch.no_grad():
        (step,) = albert_fast.explain(model, **BATCH).steps
    return step.why


@pytest.mark.parametrize(
    ("family", "precision"),
    [(family, list(BITS)[i % 3]) for i, family in enumerate(PREFIXES)] + [("albert", "int8"), ("bert", "int16")],
)
def test_close_to_float32(family, precision):
    model = tiny_model(family)
    expected, parameters = states(model), list(model.parameters())
    before = [parameter.clone() for parameter in parameters]
    fast = states(albert_fast.accelerate(model, precision))
    error = (fast - expected).abs().mean()
    assert 1e-7 < error < BITS[precision]
    assert fast.dtype == torch.float32
    assert precision == "bf16" or f"{precision} weights" in plan(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(states(albert_fast.restore(model)), expected)


@pytest.mark.parametrize("family", ["roberta", "albert"])
def test_calibration_on_batches_brings_int8_nearer(family):
    """The text has few words, so that what fits it fits random ids less."""
    model = tiny_model(family, num_hidden_layers=2)
    texts = [{"input_ids": 5 + tiny_batch(rows=32, seed=seed)["input_ids"] % 4} for seed in range(4)]
    expected = states(model, texts[0])
    calibrated = states(albert_fast.accelerate(copy.deepcopy(model), "int8", texts[1:]), texts[0])
    random = states(albert_fast.accelerate(model, "int8"), texts[0])
    assert (calibrated - expected).square().mean() < 0.8 * (random - expected).square().mean()


@pytest.mark.parametrize("precision", ["bf16", "int16"])
def test_training_and_gradients_take_the_own_parameters(precision):
    model = albert_fast.accelerate(tiny_model("bert"), precision)
    with pytest.warns(UserWarning, match="gradient may be asked"):
        out = model(**BATCH).last_hidden_state
    assert_like_original(out[MASK == 1], model, states)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in stack_of(model).parameters())
    model.train()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**BATCH)
    assert "in the model's own precision: the model is in training mode" in plan(model)


def multiplied(model):
    with torch.no_grad():
        stack_of(model).layer[1].output.dense.weight.mul_(1.5)


def written_as_data(model):
    stack_of(model).layer[1].output.dense.weight.data.mul_(-3)


def one_column_as_data(model):
    stack_of(model).layer[2].intermediate.dense.weight.data[:, 5] += 1


def bias_as_data(model):
    stack_of(model).layer[0].attention.self.value.bias.data.add_(1)


def merged(model, calls=False):
    """A low-rank adapter that is merged; `calls` says whether the model is called before."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)).eval()
    if calls:
        with pytest.warns(UserWarning, match="Linear was replaced"):
            states(adapted)
    adapted.merge_and_unload()
    model.requires_grad_(True)


def called_and_merged(model):
    merged(model, calls=True)


CHANGES = [multiplied, written_as_data, one_column_as_data, bias_as_data, merged, called_and_merged]


@every_pair(precision=["bf16", "int16", "int8"], change=CHANGES, called=[False, True])
def test_changed_weights_are_never_served_from_the_copy(precision, change, called):
    model = albert_fast.accelerate(tiny_model("bert"), precision)
    if called:
        states(model)
    change(model)
    with pytest.warns(UserWarning, match="weights changed.*call accelerate again"):
        changed = states(model)
    assert_like_original(changed, model, states)
    assert "in the model's own precision" in plan(model)
    again = states(albert_fast.accelerate(model, precision))
    assert 1e-7 < (again - changed).abs().mean() < BITS[precision]


def test_a_write_that_no_sample_sees_is_found_with_new_modules():
    model = albert_fast.accelerate(tiny_model("bert"), "int16")
    states(model)
    dense = stack_of(model).layer[1].output.dense
    dense.weight.data[0, 1] += 3  # between the first two samples
    stack_of(model).layer[1].output.dropout = torch.nn.Dropout(0.1).eval()
    with pytest.warns(UserWarning, match="weights changed"):
        states(model)


def test_a_change_is_found_out_once(monkeypatch):
    hashed, digest = [], reduced._digest
    monkeypatch.setattr(reduced, "_digest", lambda weights: hashed.append(1) or digest(weights))
    model = albert_fast.accelerate(tiny_model("bert"), "int16")
    states(model)
    assert len(hashed) == 1
    multiplied(model)
    with pytest.warns(UserWarning, match="weights changed"):
        states(model)
    for _ in range(3):
        states(model)
    assert len(hashed) == 2
    with torch.no_grad():
        stack_of(model).layer[1].output.dense.weight.div_(1.5)  # 1.5 * w / 1.5 need not be w
    states(model)
    states(model)
    assert len(hashed) == 3


@pytest.mark.parametrize("precision", ["bf16", "int16"])
def test_copies_and_moves_keep_the_precision(precision):
    model = albert_fast.accelerate(tiny_model("albert"), precision)
    expected = states(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        assert torch.equal(states(other), expected)


def test_padding_that_is_read_is_computed_in_float32():
    model = tiny_model("bert", "ForQuestionAnswering")
    with torch.no_grad():
        albert_fast.accelerate(model, "int16")
        with pytest.warns(UserWarning, match="padding is computed too"):
            found = model(**BATCH).start_logits
    assert_like_original(found, model, lambda model: model(**BATCH).start_logits)


def test_hidden_states_of_rounded_layers():
    precision = "int16"
    model = tiny_model("bert")
    batch = BATCH | {"output_hidden_states": True}
    with torch.no_grad():
        slow = model(**batch).hidden_states
        fast = albert_fast.accelerate(model, precision)(**batch).hidden_states
    assert len(fast) == len(slow)
    for ours, theirs in zip(fast, slow, strict=True):
        assert (ours - theirs)[MASK == 1].abs().mean() < BITS[precision]


def test_modes_survive_calibration():
    model = tiny_model("bert").train()
    model.pooler.eval()
    modes = [module.training for module in model.modules()]
    albert_fast.accelerate(model, "int8")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "fp32", "calibration": [tiny_batch()]}, ValueError, "calibration is for"),
        ({"precision": "int8", "calibration": "a text"}, TypeError, "list of texts"),
        ({"precision": "int8", "calibration": ["a text"]}, TypeError, "no tokenizer"),
        ({"precision": "int8", "calibration": []}, ValueError, "no real token"),
        ({"precision": "int8", "calibration": [tiny_batch(columns=41)]}, ValueError, "takes 40"),
        ({"precision": "int8", "calibration": 3}, TypeError, "calibration"),
        ({"precision": "fp16"}, dispatch.BackendUnavailableError, "not float16"),
        ({"precision": "fp8"}, dispatch.BackendUnavailableError, "float8"),
    ],
)
def test_errors_change_nothing(arguments, error, message):
    model = tiny_model("bert")
    with pytest.raises(error, match=message):
        albert_fast.accelerate(model, **arguments)
    assert not isinstance(stack_of(model), stacks.Accelerated)


class OnHidden(torch.nn.Module):
    """A stack inside a module that has no config and takes hidden states."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, hidden):
        return self.encoder(hidden).last_hidden_state


@pytest.mark.parametrize("wrapper", [None, OnHidden])
@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_layers_without_their_model_cannot_be_calibrated(wrapper, precision):
    stack = stack_of(tiny_model("bert"))
    module = stack if wrapper is None else wrapper(stack)
    with pytest.raises(ValueError, match="calibration needs the model of transformers around the layers"):
        albert_fast.accelerate(module, precision)
    assert not isinstance(stack, stacks.Accelerated)
    albert_fast.accelerate(module, "bf16")
    assert isinstance(stack, stacks.Accelerated)


def test_adapters_are_merged_before_rounding():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match="merge adapters"):
        albert_fast.accelerate(model, "int16")
    albert_fast.accelerate(model.merge_and_unload(), "int16")


def test_an_adapter_that_comes_later_is_not_left_out():
    peft = pytest.importorskip("peft")
    model = albert_fast.accelerate(tiny_model("bert"), "bf16")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="Linear was replaced"):
        fast = states(adapted)
    assert_like_original(fast, adapted, states)
