"""Calls of an accelerated model that no kernel serves run the original forward: same numbers, a warning once, a named reason."""

from __future__ import annotations

import importlib.util
import warnings
from collections import OrderedDict

import pytest
import torch

import albert_fast
from albert_fast.accelerate import stacks
from albert_fast.accelerate.masks import NOT_PADDING, padding_mask
from albert_fast.testing.accelerated_models import (
    assert_like_original,
    like,
    stack_of,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from albert_fast.testing.model_pairs import drawn_mask

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "warn_again")
OLD = transformers.__version__.startswith("4.")
# transformers 5.0 replaces the forward of every layer while it collects states: such a call is the original's.
COLLECTS = OLD or importlib.util.find_spec("transformers.utils.output_capturing") is not None


def run(model, batch):
    with torch.no_grad():
        return model(**batch)


def reason_of(model, batch):
    """The reason that explain gives; None where kernels run."""
    with torch.no_grad():
        plan = albert_fast.explain(model, **batch)
    (step,) = plan.steps
    assert (step.backend == "transformers") == step.why.startswith("original forward: ")
    return step.why.removeprefix("original forward: ") if step.backend == "transformers" else None


def lower_triangle(batch):
    shape = (4, 11, 11) if OLD else (4, 1, 11, 11)
    batch["attention_mask"] = torch.ones(shape).tril() if OLD else torch.ones(shape).tril().bool()


def added_to_scores(batch):
    batch["attention_mask"] = torch.randn(4, 1, 1, 11)


def attentions(batch):
    batch["output_attentions"] = True


CALLS = {
    lower_triangle: NOT_PADDING,
    added_to_scores: NOT_PADDING,
    attentions: "attentions",
}


@pytest.mark.parametrize("family", ["albert", "bert", "distilbert"])
@pytest.mark.parametrize("change", CALLS)
def test_the_original_forward_runs(family, change):
    if OLD and change is not attentions and (family != "bert" or change is added_to_scores):
        pytest.skip("this version takes no such mask")
    model, batch = tiny_model(family, attn_implementation="eager"), tiny_batch()
    change(batch)
    slow = run(model, batch)
    albert_fast.accelerate(model)
    with pytest.warns(UserWarning, match="original forward"):
        fast = run(model, batch)
    assert torch.equal(fast.last_hidden_state, slow.last_hidden_state)
    if slow.attentions:
        assert all(torch.equal(a, b) for a, b in zip(fast.attentions, slow.attentions, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, batch)  # warned once
    assert CALLS[change].rstrip("s") in reason_of(model, batch)
    assert reason_of(model, tiny_batch()) is None


def test_the_warning_points_to_the_callers_line():
    model = albert_fast.accelerate(tiny_model("bert", "ForSequenceClassification"))
    with pytest.warns(UserWarning, match="original forward") as said:
        run(model, tiny_batch() | {"output_attentions": True})
    assert [warning.filename for warning in said] == [__file__]
    albert_fast.accelerate(model, "bf16")
    with pytest.warns(UserWarning, match="own precision") as said, torch.enable_grad():
        model(**tiny_batch())
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.filterwarnings("error:albert_fast")
@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min])
def test_padding_that_is_added_to_the_scores_runs_on_kernels(hidden):
    if OLD:
        pytest.skip("this version takes no such mask")
    model, real = tiny_model("bert", attn_implementation="eager"), drawn_mask("right", 4, 11, seed=0).bool()
    added = torch.zeros(4, 1, 11, 11).masked_fill(~real[:, None, None], hidden)
    batch = tiny_batch() | {"attention_mask": added}
    fast = run(albert_fast.accelerate(model), batch).last_hidden_state

    def original(model):
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(added.shape, dtype=dtype).masked_fill(~real[:, None, None], torch.finfo(dtype).min)
        return run(model, batch | {"attention_mask": mask}).last_hidden_state[real]

    assert_like_original(fast[real], model, original)
    assert reason_of(model, batch) is None


@pytest.mark.parametrize("where", ["layer.0.attention.self.query", "layer.1", "layer.2.output.dropout"])
@pytest.mark.parametrize("accelerated_first", [True, False])
def test_hooks_inside_run(where, accelerated_first):
    model, batch = tiny_model("bert"), tiny_batch()
    if accelerated_first:
        albert_fast.accelerate(model)
    shapes = []

    def hook(module, args, output):
        shapes.append((output[0] if isinstance(output, tuple) else output).shape)

    handle = stack_of(model).get_submodule(where).register_forward_hook(hook)
    albert_fast.accelerate(model)
    with pytest.warns(UserWarning, match=f"hook hangs on {where}"):
        run(model, batch)
    assert shapes == [(4, 11, 32)]
    handle.remove()
    assert reason_of(model, batch) is None


def test_hooks_in_a_dictionary_that_was_put_there_later_run():
    """As tools clear all hooks of a module."""
    model, batch, seen = albert_fast.accelerate(tiny_model("bert")), tiny_batch(), []
    run(model, batch)
    layer = stack_of(model).layer[1]
    layer._forward_hooks = OrderedDict()
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    with pytest.warns(UserWarning, match=r"hook hangs on layer\.1"):
        run(model, batch)
    assert seen == [layer]


def test_a_forward_on_the_stack_itself_is_named():
    """It would run in place of ours."""
    model, batch = tiny_model("bert"), tiny_batch()
    stack = stack_of(model)
    stack.forward = stack.forward
    with pytest.raises(ValueError, match="another forward was set on the object"):
        albert_fast.accelerate(model)
    assert not isinstance(stack, stacks.Accelerated)
    del stack.forward
    albert_fast.accelerate(model)
    assert reason_of(model, batch) is None
    stack.forward = stack.forward
    assert "another forward was set on the object" in reason_of(model, batch)


def test_hooks_outside_the_layers_run_with_the_kernels():
    model, batch = albert_fast.accelerate(tiny_model("bert")), tiny_batch()
    seen = []
    for module in (model, model.embeddings, stack_of(model), model.pooler):
        module.register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    run(model, batch)
    assert seen == ["BertEmbeddings", "BertEncoder", "BertPooler", "BertModel"]
    assert reason_of(model, batch) is None


@pytest.mark.filterwarnings("error:albert_fast")
@pytest.mark.parametrize("family", ["albert", "bert", "distilbert", "electra"])
@pytest.mark.parametrize("padding", ["zeros", "keep"])
def test_hidden_states_come_from_the_kernels(family, padding):
    if not COLLECTS:
        pytest.skip("this version collects states in a way that only the original forward serves")
    model, batch = tiny_model(family, inner_group_num=2) if family == "albert" else tiny_model(family), tiny_batch()
    batch |= {"attention_mask": drawn_mask("right", 4, 11, seed=0), "output_hidden_states": True}
    slow = run(model, batch)
    fast = run(albert_fast.accelerate(model, padding=padding), batch)
    assert len(fast.hidden_states) == len(slow.hidden_states)
    real = slice(None) if padding == "keep" else batch["attention_mask"] == 1

    def states(model):
        return torch.stack(run(model, batch).hidden_states)[:, real]

    assert_like_original(torch.stack(fast.hidden_states)[:, real], model, states)
    # transformers leaves its hooks on the layers; they do not end the acceleration.
    del batch["output_hidden_states"]
    run(model, batch)
    assert run(model, batch | {"output_hidden_states": False}).hidden_states is None


@pytest.mark.filterwarnings("error:albert_fast")
def test_chosen_hidden_states():
    if OLD or not COLLECTS:
        pytest.skip("this version returns all hidden states")
    model, batch = tiny_model("bert"), tiny_batch() | {"output_hidden_states": [1, -1]}
    slow, fast = run(model, batch).hidden_states, run(albert_fast.accelerate(model), batch).hidden_states
    assert [state is None for state in fast] == [state is None for state in slow] == [True, False, True, False]
    assert_like_original(fast[1], model, lambda model: run(model, batch).hidden_states[1])


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_tuples(head):
    model, batch = tiny_model("bert", head), tiny_batch() | {"return_dict": False}
    slow, fast = run(model, batch), run(albert_fast.accelerate(model), batch)
    assert isinstance(fast, tuple)
    assert len(fast) == len(slow)
    for number, ours in enumerate(fast):
        assert_like_original(ours, model, lambda model, number=number: run(model, batch)[number])


@pytest.mark.filterwarnings("error:albert_fast")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["albert", "bert", "distilbert", "roberta", "electra"])
def test_a_keyword_that_nothing_reads_leaves_kernels_on(family, attention):
    """sentence-transformers' features hold some."""
    if OLD:
        pytest.skip("forwards of this version take no other keywords")
    model, batch = tiny_model(family, attn_implementation=attention), tiny_batch()
    expected = run(albert_fast.accelerate(model), batch).last_hidden_state
    more = batch | {"modality": "text", "prompt_length": 3}
    assert torch.equal(run(model, more).last_hidden_state, expected)
    assert reason_of(model, more) is None


@pytest.mark.parametrize(
    "keyword",
    [{"is_causal": True}, {"softcap": 3.0}, {"scaling": 2.0}, {"output_other": True}, {"other": torch.ones(1)}],
)
def test_a_keyword_that_attention_may_read_runs_the_original(keyword):
    if OLD:
        pytest.skip("forwards of this version take no other keywords")
    model = albert_fast.accelerate(tiny_model("bert", attn_implementation="sdpa"))
    assert reason_of(model, tiny_batch() | keyword) == f"{next(iter(keyword))} is given"


def test_an_attention_function_of_somebody_else_may_read_any_keyword(monkeypatch):
    registered = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    if OLD:
        pytest.skip("forwards of this version take no other keywords")
    original = registered["sdpa"]
    model, batch = albert_fast.accelerate(tiny_model("bert", attn_implementation="sdpa")), tiny_batch() | {"other": 3}
    assert reason_of(model, batch) is None

    def mine(*args, other=None, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setitem(registered, "sdpa", mine)
    assert reason_of(model, batch) == "other is given"


def test_embeddings_in_place_of_ids():
    model = tiny_model("roberta")
    batch = {"inputs_embeds": torch.randn(4, 7, 32), "attention_mask": drawn_mask("right", 4, 7, seed=0)}
    fast = run(albert_fast.accelerate(model), batch).last_hidden_state
    real = batch["attention_mask"] == 1
    assert_like_original(fast[real], model, lambda model: run(model, like(model, batch)).last_hidden_state[real])


def test_padding_on_the_left_is_computed_where_a_head_reads_it():
    model = tiny_model("bert", "ForSequenceClassification")
    batch = tiny_batch() | {"attention_mask": drawn_mask("left", 4, 11, seed=0)}
    assert batch["attention_mask"][:, 0].min() == 0
    fast = run(albert_fast.accelerate(model), batch).logits
    assert_like_original(fast, model, lambda model: run(model, batch).logits)
    with torch.no_grad():
        (step,) = albert_fast.explain(model, **batch).steps
    assert "padding is computed too" in step.why


@pytest.mark.parametrize("summary", ["first", "last", "mean"])
def test_summaries_of_all_columns_see_the_numbers_at_padding(summary):
    model, batch = tiny_model("electra", "ForMultipleChoice", summary_type=summary), tiny_batch("ForMultipleChoice")
    batch["attention_mask"] = drawn_mask("right", 8, 11, seed=0).view(4, 2, 11)
    fast = run(albert_fast.accelerate(model), batch).logits
    assert_like_original(fast, model, lambda model: run(model, batch).logits)
    with torch.no_grad():
        (step,) = albert_fast.explain(model, **batch).steps
    assert ("padding is computed too" in step.why) == (summary != "first")


def test_a_row_without_a_token_is_what_torch_makes_of_it():
    model = tiny_model("bert", attn_implementation="sdpa")
    batch = tiny_batch() | {"attention_mask": drawn_mask("empty row", 4, 11, seed=0)}
    fast = run(albert_fast.accelerate(model), batch).last_hidden_state
    assert_like_original(fast, model, lambda model: run(model, batch).last_hidden_state)


def test_a_decoder_is_refused_and_stays_as_it_is():
    config = tiny_config("bert", is_decoder=True)
    model = transformers.BertModel(config)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="decoder"):
        albert_fast.accelerate(model)
    assert [type(module) for module in model.modules()] == classes


def test_the_encoder_of_two_is_accelerated():
    encoder = tiny_config("bert")
    decoder = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.EncoderDecoderModel(config).eval()
    batch = tiny_batch() | {"decoder_input_ids": tiny_batch(columns=5)["input_ids"]}
    with pytest.warns(UserWarning, match="decoder.*left as it is.*decoder"):
        albert_fast.accelerate(model)
    assert isinstance(stack_of(model.encoder), stacks.Accelerated)
    assert not isinstance(stack_of(model.decoder), stacks.Accelerated)
    assert_like_original(run(model, batch).logits, model, lambda model: run(model, batch).logits)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_are_refused(kind):
    model = tiny_model("bert", position_embedding_type=kind)
    if not hasattr(stack_of(model).layer[0].attention.self, "position_embedding_type"):
        pytest.skip("this version has absolute positions alone")
    with pytest.raises(ValueError, match=f"position_embedding_type='{kind}'"):
        albert_fast.accelerate(model)


class OtherForward(torch.nn.Module):
    def forward(self, x):
        return x


def unknown_activation(model):
    for layer in stack_of(model).layer:
        layer.intermediate.intermediate_act_fn = torch.nn.SiLU()


def part_added(model):
    stack_of(model).layer[0].output.adapter = torch.nn.Linear(32, 32)


def other_norm(model):
    stack_of(model).layer[0].output.LayerNorm = torch.nn.RMSNorm(32)


def other_attention(model):
    stack_of(model).layer[2].attention = OtherForward()


def on_meta(model):
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_activation, "activation SiLU"),
        (part_added, "not known: adapter"),
        (other_norm, "RMSNorm"),
        (other_attention, "OtherForward"),
        (on_meta, "meta device"),
    ],
)
def test_what_is_refused_and_why(change, message):
    model = tiny_model("bert")
    change(model)
    with pytest.raises(ValueError, match=message):
        albert_fast.accelerate(model)
    assert not isinstance(stack_of(model), stacks.Accelerated)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MPNet", "bias is added"),
        ("DebertaV2", "positions are added"),
        ("GPT2", r"GPT2Block, which is not known\). Known: albert, bert"),
    ],
)
def test_other_architectures_are_named(name, reason):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 9,
    }
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    with pytest.raises(ValueError, match=reason):
        albert_fast.accelerate(model)


def test_models_of_this_library_are_told_apart():
    from albert_fast import ALBERTConfig, ALBERTModel

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "embedding_size": 8, "vocab_size": 9}
    with pytest.raises(ValueError, match="runs on kernels as it is"):
        albert_fast.accelerate(ALBERTModel(ALBERTConfig(num_hidden_layers=1, **sizes)))


@pytest.mark.parametrize("what", [None, "bert-base-uncased", 3, object()])
def test_what_is_no_model_is_refused(what):
    for function in (albert_fast.accelerate, albert_fast.restore):
        with pytest.raises(TypeError, match="expected a model"):
            function(what)


def test_wrong_arguments():
    for wrong in ({"padding": "zero"}, {"precision": "int4"}):
        model = tiny_model("bert")
        with pytest.raises(ValueError, match=next(iter(wrong))):
            albert_fast.accelerate(model, **wrong)
        assert not isinstance(stack_of(model), stacks.Accelerated)


def test_masks_in_every_form():
    real = drawn_mask("holes", 3, 5, seed=0).bool()
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(3, 1, 1, 5).masked_fill(~real[:, None, None], lowest)
    forms = [real, real.long(), real.float(), real[:, None, None], real[:, None, None].expand(3, 1, 5, 5)]
    forms += [real[:, None, None].expand(3, 1, 5, 5).contiguous(), added, added.expand(3, 1, 5, 5).contiguous()]
    forms += [added.double().masked_fill(added < 0, float("-inf"))]
    for form in forms:
        assert torch.equal(padding_mask(form, (3, 5)), real)
    assert padding_mask(None, (3, 5)) is None
    for other in (
        real[:, None],
        added / 2,
        torch.ones(3, 2, 5, 5),
        torch.ones(3, 1, 5, 6),
        real[:2],
        added.long(),
        "x",
    ):
        assert isinstance(padding_mask(other, (3, 5)), str)
