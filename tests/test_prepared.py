"""What a stack keeps of its layers between calls: the next call notices every change to modules, parameters and memory."""

import copy
import pickle

import pytest
import torch
from torch import nn

from albert_fast import ALBERTConfig, ALBERTModel, BERTConfig, BERTModel
from albert_fast.ops import EncoderWeights

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
IDS = torch.tensor([[3, 5, 7, 11]])


@pytest.fixture(params=["bert", "albert"])
def model(request):
    if request.param == "bert":
        return BERTModel(BERTConfig(**SIZES, initializer_range=0.3)).eval()
    config = ALBERTConfig(**SIZES, embedding_size=8, num_hidden_groups=2, inner_group_num=2, initializer_range=0.3)
    return ALBERTModel(config).eval()


def middle(model):
    """A Linear in the middle of the stack, and the module that holds it."""
    layer = model.encoder.distinct()[1]
    return (layer.intermediate, "dense") if isinstance(model, BERTModel) else (layer, "ffn")


def states(model, grad=False):
    """The result of all layers in one call, or with `grad` of the operators one by one."""
    with torch.set_grad_enabled(grad):
        return model(IDS).last_hidden_state.detach()


def assert_noticed(model, before):
    """The one call computes what the operators do, and no longer what it did."""
    now = states(model)
    torch.testing.assert_close(now, states(model, grad=True), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(now, before, atol=1e-3)


def remembered(model):
    return model.encoder._prepared._weights


def test_calls_share_what_was_found_out(model):
    states(model)
    first = remembered(model)
    assert isinstance(first, EncoderWeights)
    checked = first.kept.checked
    assert checked is not None
    states(model)
    assert remembered(model) is first
    assert first.kept.checked is checked


def new_parameter(holder, name):
    linear = getattr(holder, name)
    linear.weight = nn.Parameter(linear.weight.detach() * 3)


def new_data(holder, name):
    getattr(holder, name).weight.data = getattr(holder, name).weight.data * 3


def written(holder, name):
    with torch.no_grad():
        getattr(holder, name).weight.mul_(3)


def written_through_data(holder, name):
    getattr(holder, name).weight.data.mul_(3)


def transposed_in_place(holder, name):
    getattr(holder, name).weight.data = getattr(holder, name).weight.data.t()


def lazily_negated(holder, name):
    getattr(holder, name).weight.data = torch._neg_view(getattr(holder, name).weight.data)


def new_linear(holder, name):
    old = getattr(holder, name)
    setattr(holder, name, nn.Linear(old.in_features, old.out_features))


def adapter(holder, name):
    class Tripled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 3 * self.inner(x)

    setattr(holder, name, Tripled(getattr(holder, name)))


def parametrised(holder, name):
    class Tripled(nn.Module):
        def forward(self, weight):
            return 3 * weight

    nn.utils.parametrize.register_parametrization(getattr(holder, name), "weight", Tripled())


def hooked(holder, name):
    getattr(holder, name).register_forward_hook(lambda module, args, out: 3 * out)


def new_hooks(holder, name):
    linear = getattr(holder, name)
    linear._forward_hooks = type(linear._forward_hooks)()
    hooked(holder, name)


def forward_of_its_own(holder, name):
    linear = getattr(holder, name)
    linear.forward = lambda x: 3 * nn.functional.linear(x, linear.weight, linear.bias)


CHANGES = (
    new_parameter,
    new_data,
    written,
    written_through_data,
    transposed_in_place,
    lazily_negated,
    new_linear,
    adapter,
    parametrised,
    hooked,
    new_hooks,
    forward_of_its_own,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed_by_the_next_call(model, change):
    before = states(model)
    assert torch.equal(states(model), before)
    change(*middle(model))
    assert_noticed(model, before)


def test_a_hook_that_is_removed_gives_the_one_call_back(model):
    before, (holder, name) = states(model), middle(model)
    handle = getattr(holder, name).register_forward_hook(lambda *_: None)
    states(model)
    assert not model.encoder.is_plain()
    handle.remove()
    assert model.encoder.is_plain()
    assert torch.equal(states(model), before)


@pytest.mark.parametrize("kept", [0, 8])
def test_memory_that_was_released_is_named(model, kept):
    states(model)
    holder, name = middle(model)
    getattr(holder, name).weight.untyped_storage().resize_(kept)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"the memory of ffn .* was released: 1024 bytes .* has {kept}"):
            states(model)


def test_other_shapes_and_dtypes_are_named(model):
    before, (holder, name) = states(model), middle(model)
    linear = getattr(holder, name)
    whole = linear.weight.data
    linear.weight.data = whole[:, :15]
    with pytest.raises(ValueError, match=r"expected ffn of shape \(16, 16\) .*, got \(16, 15\)"):
        states(model)
    linear.weight.data = whole.double()
    with pytest.raises(ValueError, match=r"expected ffn .* in torch.float32, got .* in torch.float64"):
        states(model)
    linear.weight.data = whole
    assert torch.equal(states(model), before)


def test_converted_models_and_copies_begin_anew(model):
    before = states(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(states(other), before)
        written(*middle(other))
        assert_noticed(other, before)
        assert torch.equal(states(model), before)
        hooked(*middle(other))
        assert model.encoder.is_plain()
        assert not other.encoder.is_plain()
    assert torch.allclose(states(model.double()).float(), before, atol=1e-5)
    assert torch.equal(states(model.float()), before)


def test_dense_copies_of_strided_weights_are_made_in_every_call(model):
    before, (holder, name) = states(model), middle(model)
    weight = getattr(holder, name).weight
    weight.data = torch.stack([weight.data, weight.data], -1)[..., 0]
    assert torch.equal(states(model), before)
    assert remembered(model).kept.checked is None
    written(holder, name)
    assert_noticed(model, before)


def rounded(model):
    return type(model).from_model(model, precision="int8").eval()


def test_calls_of_rounded_layers_share_what_was_found_out(model):
    model = rounded(model)
    before = states(model)
    first = model.encoder._prepared._quantized
    checked = first.kept.checked
    assert checked is not None
    assert torch.equal(states(model), before)
    assert model.encoder._prepared._quantized is first
    assert first.kept.checked is checked


def new_integers(linear):
    integers, scale = linear._natural()
    linear.set_weight(-integers, scale)


def new_factors(linear):
    linear.rescale = 3 * linear.rescale


def written_integers(linear):
    linear.integers.neg_()


def new_bias(linear):
    linear.bias = nn.Parameter(linear.bias + 1.0, requires_grad=False)


@pytest.mark.parametrize(
    "change", [new_integers, new_factors, written_integers, new_bias], ids=lambda one: one.__name__
)
def test_a_change_of_rounded_layers_is_noticed_by_the_next_call(model, change):
    model = rounded(model)
    before = states(model)
    change(model.encoder.distinct()[1].up)
    now = states(model)
    assert not torch.allclose(now, before, atol=1e-3)
    assert torch.equal(states(copy.deepcopy(model)), now)


def test_memory_of_rounded_layers_that_was_released_is_named(model):
    model = rounded(model)
    states(model)
    model.encoder.distinct()[1].up.integers.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the memory of integers of ffn .* was released"):
            states(model)
