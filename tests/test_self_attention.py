"""Query, key and value: parameters apart, one product at run time, whose parts' gradients nothing concatenates."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from albert_fast import ALBERTConfig, ALBERTForSequenceClassification, ALBERTModel, ops
from albert_fast.models import reference
from albert_fast.ops import split_columns
from albert_fast.ops._columns import are_adjacent
from albert_fast.runtime import dispatch
from albert_fast.testing import poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in ("cpp", "triton") if dispatch.why_not("attention", DEVICE, name, torch.float32) is None]
TINY = ALBERTConfig(
    vocab_size=50, embedding_size=8, hidden_size=32, num_attention_heads=2, intermediate_size=48, num_hidden_layers=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.1,
)  # fmt: skip


class Counted(TorchDispatchMode):
    """How often each of torch's operators runs; and how often torch.cat makes a matrix of weights."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.joined = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        result = function(*args, **(kwargs or {}))
        self.joined += function.overloadpacket is torch.ops.aten.cat and result.dim() == 2
        return result


def plain_split(x, width):
    return x.split(width, dim=1)


def attend(q, k, v, backend="auto", dropout_p=0.0):
    """Two sequences, of 3 and 4 tokens."""
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=q.device)
    seed = torch.tensor(5) if dropout_p else None
    return ops.attention(q, k, v, cu_seqlens, cu_seqlens, 4, 4, 2, None, dropout_p, seed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_are_those_of_a_plain_split(backend, dropout_p):
    qkv = torch.randn(7, 96, device=DEVICE)
    grad = torch.randn(7, 32, device=DEVICE)
    found = []
    for split in (split_columns, plain_split):
        x = qkv.clone().requires_grad_()
        with poison_empty(), Counted() as counted:
            attend(*split(x, 32), backend, dropout_p).backward(grad)
        found.append((x.grad, counted.calls[torch.ops.aten.cat]))
    (fused, fused_cats), (plain, plain_cats) = found
    assert torch.equal(fused, plain)
    assert (fused_cats, plain_cats) == (0, 1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "kind", [ALBERTModel, ALBERTForSequenceClassification]
)  # all queries, and the first tokens' alone
def test_no_layer_concatenates_gradients(kind, autocast, monkeypatch):
    model = kind(TINY).to(DEVICE).train()
    ids = torch.randint(0, 50, (3, 7), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0

    def concatenations():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(ids, mask)[0].float().square().mean()
        with Counted() as counted:
            loss.backward()
        return counted.calls[torch.ops.aten.cat]

    fused = concatenations()
    monkeypatch.setattr(ops, "split_columns", plain_split)
    assert concatenations() - fused == TINY.num_hidden_layers
    assert fused == 0


def test_gradients_that_lie_elsewhere_are_concatenated():
    x = torch.randn(5, 12, requires_grad=True)
    first, second, third = split_columns(x, 4)
    (first * 2 + third.flip(0)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([2.0] * 4 + [0.0] * 4 + [1.0] * 4).expand(5, 12))
    assert second.shape == (5, 4)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_which_tensors_are_neighbours(tokens):
    whole = torch.randn(tokens, 12)
    a, b, c = whole.split(4, dim=1)
    assert are_adjacent((a, b, c))
    assert are_adjacent((b, c))
    assert not are_adjacent((a, c))
    assert not are_adjacent((b, a))
    assert not are_adjacent((a, b.clone()))
    assert not are_adjacent((a, whole[:, 4:6]))
    assert not are_adjacent((a, whole.view(torch.int32)[:, 4:8]))
    rows = torch.randn(2 * tokens, 12)
    assert not are_adjacent((rows[:tokens, :4], rows[::2, 4:8])), "of every other row"
    assert not are_adjacent((rows[:tokens, 0:8:2], rows[:tokens, 4:12:2])), "of every other column"
    narrow = torch.randn(8 + 4 * tokens)
    assert not are_adjacent(tuple(narrow[first:].as_strided((tokens, 4), (4, 1)) for first in (0, 4, 8))), (
        "rows overlap"
    )


def test_a_compiled_graph_has_the_same_gradients():
    def run(x):
        return attend(*split_columns(x * 1.0, 32))

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        x = torch.randn(7, 96, device=DEVICE, requires_grad=True)
        function(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


# parameters apart, one product --------------------------------------------------------------------------------------------

ATTENTION = "encoder.albert_layer_groups.0.albert_layers.0.attention."


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ALBERTModel(TINY).to(DEVICE).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def batch():
    ids, mask = torch.randint(0, 50, (3, 7), device=DEVICE), torch.ones(3, 7, dtype=torch.long, device=DEVICE)
    mask[1, 4:] = 0
    return ids, mask


def by_reference(model, ids, mask):
    other = reference.ALBERTModel(model.config).to(DEVICE).eval()
    other.load_state_dict(model.state_dict())
    return other(ids, mask).last_hidden_state


def test_parameters_modules_and_states_have_the_same_names(model):
    names = set(model.state_dict())
    assert {name for name, _ in model.named_parameters()} == names
    assert names == set(reference.ALBERTModel(TINY).state_dict())
    for name in ("query", "key", "value"):
        linear = model.get_submodule(ATTENTION + name)
        assert type(linear) is nn.Linear
        assert linear.weight is model.get_parameter(f"{ATTENTION}{name}.weight")
        assert linear.weight.shape == (32, 32)
    places = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert len(set(places)) == len(places), "writers of files take shared memory for one tensor"


@pytest.mark.parametrize("recompute", ["nothing", "activations", "layers"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_shared_layer_joins_its_weights_once_a_forward(model, autocast, recompute):
    model.train().execution.recompute = recompute
    counted = Counted()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        with counted:
            states = model(*batch()).last_hidden_state
        assert counted.calls[torch.ops.aten.cat] == 2, "one of weights, one of biases, for two applications"
    with Counted() as counted:
        states.float().square().sum().backward()
    assert counted.calls[torch.ops.aten.cat] == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU weights are joined in every forward")
@pytest.mark.parametrize("write", ["in place", "through data", "in training"])
def test_joined_weights_are_kept_until_they_change(model, write):
    ids, mask = batch()
    linear = model.get_submodule(ATTENTION + "key")

    def states():
        with torch.no_grad(), Counted() as counted:
            found = model(ids, mask, output_hidden_states=True).last_hidden_state
        return found, counted.joined

    assert states()[1] == 1
    before, joined = states()
    assert joined == 0
    if write == "in place":
        with torch.no_grad():
            linear.bias[3] += 2.0
            linear.weight[5].mul_(-1.0)
    elif write == "through data":
        linear.weight.data.mul_(-1.0)
    else:
        model(ids, mask).last_hidden_state.square().sum().backward()
        torch.optim.SGD([linear.weight], lr=1e4).step()
    after, joined = states()
    assert joined == 1
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after[mask == 1], by_reference(model, ids, mask)[mask == 1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU weights are joined in every forward")
def test_weights_joined_under_inference_mode_serve_a_backward(model):
    ids, mask = batch()
    for name in ("query", "key", "value"):
        model.get_submodule(ATTENTION + name).requires_grad_(False)
    with torch.inference_mode():
        model(ids, mask, output_hidden_states=True)
    model(ids, mask).last_hidden_state.square().sum().backward()
    assert model.embeddings.word_embeddings.weight.grad.abs().max() > 0


@pytest.mark.parametrize("tokens", ["all", "first"])
@pytest.mark.parametrize("frozen", [("query",), ("key", "value")])
def test_gradients_of_what_is_not_frozen(model, frozen, tokens):
    ids, mask = batch()
    whole = copy.deepcopy(model)
    for name in frozen:
        model.get_submodule(ATTENTION + name).requires_grad_(False)
    for each in (model, whole):
        each(ids, mask, wanted_tokens=tokens).pooler_output.square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name).grad
        assert parameter.grad is None if not parameter.requires_grad else torch.equal(parameter.grad, expected), name


class Drawn(nn.Module):
    """A weight that is another in every call, as DropConnect's is."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * self.calls


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_parametrisation_is_computed_at_every_application(model, name):
    ids, mask = batch()
    plain = model(ids, mask).last_hidden_state
    drawn = Drawn()
    parametrize.register_parametrization(model.get_submodule(ATTENTION + name), "weight", drawn)
    drawn.calls = 0
    assert not torch.allclose(model(ids, mask).last_hidden_state, plain)
    assert drawn.calls == TINY.num_hidden_layers


@pytest.mark.parametrize("where", ["layer", "attention"])
def test_weights_that_are_there_only_while_a_layer_is_called(model, where):
    """As FSDP has them: gathered ahead of the call, released behind it."""
    ids, mask = batch()
    expected = model(ids, mask).last_hidden_state
    layer = model.encoder.distinct()[0]
    module = layer if where == "layer" else layer.attention
    linear, whole = layer.attention.key, layer.attention.key.weight.data.clone()

    def gather(*_):
        linear.weight.data.copy_(whole)

    def release(*_):
        linear.weight.data.fill_(torch.nan)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
    release()
    assert torch.equal(model(ids, mask).last_hidden_state, expected)


def test_a_dtype_of_its_own_keeps_a_module_out_of_the_product(model):
    linear = model.get_submodule(ATTENTION + "value")
    linear.to(torch.bfloat16)
    assert model.get_submodule(ATTENTION.removesuffix(".")).fused() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_weights_of_their_own(model, copied):
    ids, mask = batch()
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
        other = copied(model)
        other.get_parameter(ATTENTION + "query.weight").mul_(3.0)
        assert torch.equal(model(ids, mask).last_hidden_state, expected)
        found = other(ids, mask).last_hidden_state
        assert not torch.allclose(found, expected)
        torch.testing.assert_close(found[mask == 1], by_reference(other, ids, mask)[mask == 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_and_exported(model, grad):
    ids, mask = batch()
    with torch.set_grad_enabled(grad):
        expected = model(ids, mask).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, mask).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    if not grad:
        with torch.no_grad():
            exported = torch.export.export(model, (ids, mask))
            torch.testing.assert_close(exported.module()(ids, mask).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        assert ATTENTION + "query.weight" in exported.state_dict
