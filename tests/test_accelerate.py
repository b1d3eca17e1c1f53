"""albert_fast.accelerate gives every family and head of transformers the same numbers, and leaves the model what it was."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import albert_fast
from albert_fast.runtime import dispatch
from albert_fast.testing.accelerated_models import (
    HEADS,
    PREFIXES,
    STACK_SLACK,
    assert_like_original,
    first_outputs,
    stack_of,
    tiny_batch,
    tiny_model,
)
from albert_fast.testing.model_pairs import drawn_mask
from albert_fast.testing.tolerances import assert_close_calibrated

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread", "warn_again"), pytest.mark.filterwarnings("error:albert_fast")]

MASKS = ["none", "right", "left", "holes"]
# Heads whose outputs have a value for every column.
PER_TOKEN = {"last_hidden_state", "logits", "start_logits", "end_logits", "prediction_logits"}
# Heads whose `logits` have one row a text.
PER_TEXT = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
OTHER_HEADS = [
    ("albert", "ForPreTraining"),
    ("bert", "ForPreTraining"),
    ("bert", "ForNextSentencePrediction"),
    ("electra", "ForPreTraining"),
    ("roberta", "ForCausalLM"),
]


def every_family_and_head():
    """(family, head, mask), so that every family meets every head and every mask."""
    return [
        (family, head, MASKS[(i + j) % len(MASKS)]) for i, family in enumerate(PREFIXES) for j, head in enumerate(HEADS)
    ]


def assert_same(fast, slow, exact, mask, head):
    """Equal where tokens are real; and at padding as well, if the head reads it."""
    found, expected, reference = map(first_outputs, (fast, slow, exact))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        per_token = name in PER_TOKEN and head not in PER_TEXT
        keep = slice(None)
        if per_token and mask is not None and head != "ForQuestionAnswering":
            keep = mask.bool()
        assert_close_calibrated(tensor[keep], expected[name][keep], reference[name][keep], name, slack=STACK_SLACK)


def run(model, batch):
    with torch.no_grad():
        return model(**batch)


@pytest.mark.parametrize(("family", "head", "kind"), every_family_and_head())
def test_same_numbers_as_transformers(family, head, kind):
    fields = {"num_labels": 2} if (family, head) in OTHER_HEADS else {}
    model, batch = tiny_model(family, head, **fields), tiny_batch(head)
    shape = batch["input_ids"].shape
    mask = drawn_mask(kind, shape[0] * (shape[1] if len(shape) == 3 else 1), shape[-1], seed=3)
    if mask is not None:
        batch["attention_mask"] = mask.view(shape)
    slow, exact = run(model, batch), run(copy.deepcopy(model).double(), batch)
    assert albert_fast.accelerate(model) is model
    assert_same(run(model, batch), slow, exact, mask, head)
    with torch.no_grad():
        (step,) = albert_fast.explain(model, **batch).steps
    assert step.backend == ("cpp" if dispatch.has_extension() else "reference"), step.why


@pytest.mark.parametrize("family", PREFIXES)
def test_zeros_stand_at_padding(family):
    model, batch = albert_fast.accelerate(tiny_model(family)), tiny_batch()
    mask = drawn_mask("right", 4, 11, seed=0)
    hidden = run(model, batch | {"attention_mask": mask}).last_hidden_state
    assert hidden[mask == 0].abs().max() == 0
    assert hidden[mask == 1].abs().min(dim=1).values.max() > 0


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_kept_padding_has_the_numbers_of_transformers(family, implementation):
    model, batch = tiny_model(family, attn_implementation=implementation), tiny_batch()
    batch["attention_mask"] = drawn_mask("holes", 4, 11, seed=0)
    slow, exact = run(model, batch), run(copy.deepcopy(model).double(), batch)
    fast = run(albert_fast.accelerate(model, padding="keep"), batch)
    assert_close_calibrated(*(out.last_hidden_state for out in (fast, slow, exact)), slack=STACK_SLACK)


@pytest.mark.parametrize("family", PREFIXES)
def test_restore_gives_the_model_back(family):
    model, batch = tiny_model(family, "ForSequenceClassification"), tiny_batch()
    before, classes = run(model, batch).logits, [type(module) for module in model.modules()]
    attributes = set(stack_of(model).__dict__)
    parameters = dict(model.named_parameters())
    albert_fast.accelerate(albert_fast.accelerate(model))
    assert [type(module).__name__ for module in model.modules()] == [cls.__name__ for cls in classes]
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    run(model, batch)
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert albert_fast.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert set(stack_of(model).__dict__) == attributes
    assert torch.equal(run(model, batch).logits, before)
    assert albert_fast.restore(model) is model


def deep_copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize("made", [deep_copied, pickled, saved_whole])
@pytest.mark.parametrize("family", ["albert", "roberta"])
def test_a_copy_is_accelerated_and_on_its_own(made, family):
    model, batch = albert_fast.accelerate(tiny_model(family)), tiny_batch()
    before = run(model, batch).last_hidden_state
    other = made(model)
    assert type(stack_of(other)) is type(stack_of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(other, batch).last_hidden_state, before)
    albert_fast.restore(other)
    assert type(stack_of(other)) is not type(stack_of(model))


def test_saved_files_are_those_of_the_model(tmp_path):
    model = tiny_model("bert")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    albert_fast.accelerate(model).save_pretrained(tmp_path)
    assert "albert_fast" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def changed_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def loaded_weights(model):
    model.load_state_dict(tiny_model("bert", seed=5).state_dict())


def new_parameter(model):
    stack_of(model).layer[1].output.dense.weight = torch.nn.Parameter(torch.randn(32, 40))


def new_module(model):
    stack_of(model).layer[0].attention.self.query = torch.nn.Linear(32, 32)


def one_layer_less(model):
    del stack_of(model).layer[1]


def more_words(model):
    model.resize_token_embeddings(60)


def in_bfloat16(model):
    model.bfloat16().float()


@pytest.mark.parametrize(
    "change",
    [changed_weights, loaded_weights, new_parameter, new_module, one_layer_less, more_words, in_bfloat16],
)
def test_changes_of_the_model_are_seen(change):
    model, batch = albert_fast.accelerate(tiny_model("bert")), tiny_batch()
    before = run(model, batch).last_hidden_state
    change(model)
    fast = run(model, batch).last_hidden_state
    assert_like_original(fast, model, lambda model: run(model, batch).last_hidden_state)
    assert change is more_words or not torch.equal(fast, before)


class HiddenOnly(transformers.AlbertModel):
    """As users write subclasses: forward returns the hidden states alone."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).last_hidden_state


def test_a_subclass_keeps_its_forward():
    model = HiddenOnly(tiny_model("albert").config).eval()
    mask = drawn_mask("right", 4, 11, seed=1)
    batch = tiny_batch() | {"attention_mask": mask}
    fast = run(albert_fast.accelerate(model), batch)
    assert isinstance(fast, torch.Tensor)
    assert_like_original(fast[mask == 1], model, lambda model: run(model, batch)[mask == 1])


def test_inference_mode_and_no_grad_take_one_call(monkeypatch):
    from albert_fast import ops

    calls, real = [], ops.encoder
    monkeypatch.setattr(ops, "encoder", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    model = albert_fast.accelerate(tiny_model("bert"))
    with torch.inference_mode():
        model(**tiny_batch())
    run(model, tiny_batch())
    assert len(calls) == 2


@pytest.mark.parametrize(("heads", "width"), [(1, 7), (3, 21), (2, 300)])
@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_new"])
def test_heads_of_any_size_and_every_activation(heads, width, act):
    model = tiny_model("bert", num_attention_heads=heads, hidden_size=width, hidden_act=act)
    batch = tiny_batch() | {"attention_mask": drawn_mask("holes", 4, 11, seed=0)}
    slow, exact = run(model, batch), run(copy.deepcopy(model).double(), batch)
    assert_same(run(albert_fast.accelerate(model), batch), slow, exact, batch["attention_mask"], "Model")


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 0)])
def test_empty_batches(shape):
    model, ids = albert_fast.accelerate(tiny_model("bert")), torch.zeros(shape, dtype=torch.int64)
    model.pooler = None  # it reads the first column
    assert run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).last_hidden_state.shape == (
        *shape,
        32,
    )


def test_threads_share_a_model():
    model = albert_fast.accelerate(tiny_model("bert"))
    batches = [tiny_batch(seed=seed, columns=3 + seed) for seed in range(16)]
    expected = [run(model, batch).last_hidden_state for batch in batches]
    other = albert_fast.accelerate(tiny_model("bert"))  # its view is made by several threads at once
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda batch: run(other, batch).last_hidden_state, batches)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class OtherLinear(torch.nn.Linear):
    """As libraries of quantised layers write them: a Linear with another forward."""

    def forward(self, x):
        return super().forward(x) * 2


def doubled(model):
    for layer in stack_of(model).layer:
        layer.output.dense.__class__ = OtherLinear
    return model


def parametrised(model):
    for layer in stack_of(model).layer:
        torch.nn.utils.parametrizations.spectral_norm(layer.intermediate.dense)
    return model.eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def int8_of_torch(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("change", [doubled, parametrised, int8_of_torch])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_replaced_linears_are_called(change, first):
    model, batch = tiny_model("bert"), tiny_batch()
    model = change(albert_fast.accelerate(model)) if first else albert_fast.accelerate(change(model))
    fast = run(model, batch).last_hidden_state
    if change is int8_of_torch:  # its integers follow the range of a whole batch, and it has no float64 to compare with
        torch.testing.assert_close(fast, run(albert_fast.restore(model), batch).last_hidden_state, rtol=0, atol=5e-2)
    else:
        assert_like_original(fast, model, lambda model: run(model, batch).last_hidden_state)
