"""keep_float=False: a model with one copy of its layers' weights computes, saves and refuses as it says."""

import copy

import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTModel, AutoModel, BERTModel
from albert_fast.checkpoints.families import FAMILIES
from albert_fast.layers.packed import PackedLinear
from albert_fast.models.auto import class_of
from albert_fast.runtime import derived, dispatch

KINDS = ("albert", "bert", "distilbert", "electra")
IDS, MASK = torch.tensor([[3, 5, 7, 11, 2], [4, 6, 8, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])

pytestmark = pytest.mark.skipif(not dispatch.has_extension(), reason="the C++ extension is not built")


def made(model_type, task="Model", middle=56, width=20):
    kind = class_of(FAMILIES[model_type], task)
    sizes = {"hidden_size": width, "num_attention_heads": 2, "num_hidden_layers": 3, "initializer_range": 0.3}
    fields = {"hidden_dim" if model_type == "distilbert" else "intermediate_size": middle, "vocab_size": 31, **sizes}
    if model_type == "albert":
        fields |= {"num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 8}
    return kind(kind.config_class(**fields)).eval()


def memory(model):
    """Bytes of every piece of memory that the model and the caches of packed weights hold, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [kept.made for one in derived._ALL for kept in one._kept.values() if isinstance(kept.made, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("model_type", KINDS)
def test_the_same_bits_with_and_without_the_floats(model_type, tmp_path):
    model = made(model_type)
    model.save_pretrained(tmp_path / "first")
    packed = AutoModel.from_pretrained(tmp_path / "first", keep_float=False)
    assert packed.encoder.is_packed
    with torch.no_grad():
        for options in ({}, {"output_hidden_states": True}, {"wanted_tokens": MASK.bool()}):
            ours, expected = packed(IDS, MASK, **options), model(IDS, MASK, **options)
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if "output_hidden_states" in options else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, **tolerance)
            for one, other in zip(ours.hidden_states or (), expected.hidden_states or (), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    expected = model.state_dict()
    packed.save_pretrained(tmp_path / "second")
    for state in (packed.state_dict(), AutoModel.from_pretrained(tmp_path / "second").state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


@pytest.mark.parametrize(("middle", "width"), [(1, 2), (769, 12), (1600, 34)])
def test_every_size_is_unpacked_bit_for_bit(middle, width):
    model = made("bert", middle=middle, width=width)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
        model.encoder.layer[0].output.dense.weight[0, -1] = -0.0
    expected = {key: tensor.clone().view(torch.int32) for key, tensor in model.state_dict().items()}
    model.execution.drop_float()
    assert all(torch.equal(tensor.view(torch.int32), expected[key]) for key, tensor in model.state_dict().items())


def test_there_is_one_copy():
    whole, packed = (made("bert", middle=256, width=64) for _ in range(2))
    floats = sum(p.nbytes for p in whole.encoder.parameters())
    derived.forget([*whole.parameters(), *packed.parameters()])
    with torch.no_grad():
        before = memory(whole)
        whole(IDS, MASK)
        assert memory(whole) - before > 0.9 * floats, "the packed copy"
        derived.forget(whole.parameters())
        before = memory(packed)
        packed.execution.drop_float()
        packed(IDS, MASK)
    assert memory(packed) - before < 0.1 * floats


def test_what_packed_layers_cannot_do_is_named():
    model = made("bert")
    model.execution.drop_float()
    model.execution.drop_float()
    assert all(isinstance(layer.up, PackedLinear) for layer in model.encoder.distinct())
    assert torch.equal(copy.deepcopy(model)(IDS)[0], model(IDS)[0]), (
        "without no_grad, since nothing asks for a gradient"
    )
    with pytest.raises(ValueError, match="collect no attentions: load the model without keep_float=False"):
        model(IDS, output_attentions=True)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()(IDS)
    model.eval()
    with pytest.raises(TypeError, match=r"float32 on the CPU, not in torch\.bfloat16"):
        copy.deepcopy(model).bfloat16()(IDS)
    with pytest.raises(RuntimeError, match="packed layers have no gradient"):
        model(inputs_embeds=torch.randn(1, 3, 20, requires_grad=True))
    with pytest.raises(RuntimeError, match="only packed weights are kept"):
        model.load_state_dict(made("bert").state_dict())
    with pytest.raises(RuntimeError, match="runs as a whole"):
        model.encoder.layer[0].output.dense(torch.randn(2, 56))
    with pytest.raises(RuntimeError, match="to move it"):
        copy.deepcopy(model).to("meta")
    model.execution.backend = "reference"
    with pytest.raises(ValueError, match="run on backend 'cpp', not on 'reference'"):
        model(IDS)
    model.execution.backend = "auto"
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks on their parts"):
        model(IDS)
    hooked = made("bert")
    hooked.encoder.layer[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="remove hooks, first"):
        hooked.execution.drop_float()


def test_where_there_is_no_second_copy_nothing_changes(tmp_path):
    made("bert").save_pretrained(tmp_path)
    for options in ({"precision": "bf16"}, {"precision": "int8"}, {"backend": "reference"}):
        model = BERTModel.from_pretrained(tmp_path, keep_float=False, **options)
        assert not model.encoder.is_packed
        model(IDS, MASK)


def test_weights_packed_for_another_instruction_set_are_refused():
    model = made("bert")
    model.execution.drop_float()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.panel += 1
    for use in (lambda: model(IDS), model.state_dict):
        with pytest.raises(RuntimeError, match="load the checkpoint here instead of a pickle"):
            use()


def test_heads_and_models_in_memory():
    config = ALBERTConfig(
        vocab_size=31,
        embedding_size=8,
        hidden_size=20,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=2,
    )
    model = ALBERTForMaskedLM(config).eval()
    packed = ALBERTForMaskedLM.from_model(model, keep_float=False)
    with torch.no_grad():
        assert torch.equal(packed(IDS, MASK).logits, model(IDS, MASK).logits)
    bare = [ALBERTModel.from_model(one).num_parameters() for one in (packed, model)]
    assert bare[0] == bare[1]


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("move", [lambda model: model.to("meta"), lambda model: model.to_empty(device="meta")])
def test_a_model_that_cannot_move_stays_whole(model_type, move):
    model = made(model_type, "ForMaskedLM")
    with torch.no_grad():
        model.execution.drop_float()
        expected = model(IDS, MASK).logits
        for whole in (model, model.base_model, model.base_model.encoder):
            with pytest.raises(RuntimeError, match="to move it"):
                move(whole)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
        assert torch.equal(model.to("cpu")(IDS, MASK).logits, expected)


@pytest.mark.parametrize("model_type", KINDS)
def test_packed_weights_count_as_parameters(model_type):
    model = made(model_type, "ForMaskedLM")
    expected = [model.num_parameters(exclude_embeddings=embeddings) for embeddings in (False, True)]
    model.execution.drop_float()
    assert [model.num_parameters(exclude_embeddings=embeddings) for embeddings in (False, True)] == expected
    assert model.num_parameters(only_trainable=True) == 0, "none of a packed model's weights are trained"
