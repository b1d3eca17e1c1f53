"""What a user puts in a Linear's place is computed: adapters, other forwards, hooks; what cannot be is refused."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import albert_fast
from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel
from albert_fast.layers import layer as layer_module
from albert_fast.layers.adapters import check_read
from albert_fast.models import head_model
from albert_fast.quantization.calibration import quantize

CONFIG = ALBERTConfig(
    vocab_size=61, embedding_size=12, hidden_size=40, num_attention_heads=5, intermediate_size=56, num_hidden_layers=3
)
LAYER = "encoder.albert_layer_groups.0.albert_layers.0."
LINEARS = [
    LAYER + name
    for name in ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output")
] + ["encoder.embedding_hidden_mapping_in", "pooler"]


class Adapter(nn.Module):
    """x W' + b + x A' B', as peft's LoRA layer does it: the names of the Linear inside pass through."""

    def __init__(self, base: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 3, bias=False)
        self.b = nn.Linear(3, base.out_features, bias=False)
        self.dropout = nn.Dropout(dropout)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(self.dropout(x)))

    def merged(self) -> nn.Linear:
        base = copy.deepcopy(self.base_layer)
        base.weight.data += self.b.weight @ self.a.weight
        return base


def put(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, part)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ALBERTModel(CONFIG).eval()


@pytest.fixture
def batch():
    ids, mask = torch.randint(0, 61, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return ids, mask


@pytest.mark.parametrize("recompute", ["nothing", "activations"])
@pytest.mark.parametrize("tokens", ["all", "first"])
@pytest.mark.parametrize("name", LINEARS)
def test_an_adapter_computes_as_when_merged(model, batch, name, tokens, recompute):
    adapter = Adapter(model.get_submodule(name))
    merged = copy.deepcopy(model)
    put(model, name, adapter)
    put(merged, name, adapter.merged())
    model.execution.recompute = recompute
    expected = merged(*batch, wanted_tokens=tokens).pooler_output
    got = model(*batch, wanted_tokens=tokens).pooler_output
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch, wanted_tokens=tokens).pooler_output, expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert adapter.a.weight.grad.abs().max() > 0
    assert adapter.b.weight.grad.abs().max() > 0


@pytest.mark.parametrize("recompute", ["activations", "layers"])
@pytest.mark.parametrize("name", LINEARS[:-1])
def test_an_adapter_drops_the_same_when_it_is_computed_again(model, batch, name, recompute):
    adapter = Adapter(model.get_submodule(name), dropout=0.5)
    put(model, name, adapter)
    gradients, factors = [], torch.randn(3, 7, 40)  # a LayerNorm's squares would have a constant sum
    for model.execution.recompute in ("nothing", recompute):
        model.zero_grad()
        torch.manual_seed(5)
        (model.train()(*batch).last_hidden_state * factors).sum().backward()
        gradients.append(adapter.a.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("precision", ["int16", "int8"])
@pytest.mark.parametrize("change", ["adapter", "hook", "parametrisation"])
def test_integers_take_the_place_of_plain_linears_alone(model, change, precision):
    ffn = model.get_submodule(LAYER + "ffn")
    if change == "adapter":
        put(model, LAYER + "ffn", Adapter(ffn))
    elif change == "hook":
        ffn.register_forward_hook(lambda *_: None)
    else:
        parametrize.register_parametrization(ffn, "weight", nn.ReLU())
    with pytest.raises(RuntimeError, match="merge adapters"):
        quantize(model, precision)


@pytest.mark.parametrize("name", LINEARS[:-1])
@pytest.mark.parametrize("tokens", ["all", "first"])
def test_linears_without_a_bias(model, batch, name, tokens, monkeypatch):
    linear, expected = model.get_submodule(name), copy.deepcopy(model)
    nn.init.zeros_(expected.get_submodule(name).bias)
    linear.bias = None
    with torch.no_grad():
        wanted = expected(*batch, wanted_tokens=tokens).pooler_output
    for fused in (False, True):
        monkeypatch.setattr(layer_module, "fuses_ffn", lambda _, fused=fused: fused)
        got = model(*batch, wanted_tokens=tokens).pooler_output
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["adapter", "parametrisation"])
def test_the_state_of_a_changed_query_comes_back(model, batch, change):
    query = model.get_submodule(LINEARS[0])
    if change == "adapter":
        put(model, LINEARS[0], Adapter(query))
    else:
        parametrize.register_parametrization(query, "weight", nn.ReLU())
    other = copy.deepcopy(model)
    nn.init.zeros_(next(other.get_submodule(LINEARS[0]).parameters()))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(*batch).last_hidden_state, model(*batch).last_hidden_state)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LINEARS)
def test_hooks_of_a_linear_run_and_are_heard(model, batch, name, grad):
    with torch.set_grad_enabled(grad):
        plain = model(*batch).pooler_output
        with model.get_submodule(name).register_forward_hook(lambda _module, _given, out: 2 * out):
            assert not torch.allclose(model(*batch).pooler_output, plain)
        assert torch.equal(model(*batch).pooler_output, plain)


def test_a_forward_set_on_the_linear_is_called(model, batch):
    with torch.no_grad():
        plain = model(*batch).pooler_output
        ffn = model.get_submodule(LAYER + "ffn")
        ffn.forward = lambda x: 2 * nn.Linear.forward(ffn, x)
        assert not torch.allclose(model(*batch).pooler_output, plain)


def test_a_pruned_weight_follows_its_training(model, batch):
    dense, ffn = copy.deepcopy(model), model.get_submodule(LAYER + "ffn")
    prune.l1_unstructured(ffn, "weight", amount=0.5)
    for _ in range(2):  # its hook makes the weight anew before each call
        model(*batch).pooler_output.sum().backward()
        with torch.no_grad():
            ffn.weight_orig += 0.1
    dense.get_submodule(LAYER + "ffn").weight.data = (ffn.weight_orig * ffn.weight_mask).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(*batch).pooler_output, dense(*batch).pooler_output, rtol=1e-5, atol=1e-5)


class Doubled(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "name", ["embeddings.LayerNorm", LAYER + "full_layer_layer_norm", LAYER + "attention.LayerNorm"]
)
def test_a_replaced_norm_is_refused(model, batch, name):
    put(model, name, Doubled(model.get_submodule(name).normalized_shape))
    with pytest.raises(RuntimeError, match=r"LayerNorm was replaced by Doubled.*albert_fast\.reference"):
        model(*batch)


def test_a_replaced_decoder_is_refused_where_only_the_loss_is_asked_for(batch):
    model = ALBERTForMaskedLM(CONFIG).eval()
    model.predictions.decoder = Adapter(model.predictions.decoder)
    assert model(*batch).logits.shape == (3, 7, 61)
    with pytest.raises(RuntimeError, match=r"predictions\.decoder was replaced by Adapter"):
        model(*batch, labels=batch[0], output_logits=False)


def test_hooks_that_cannot_run_are_warned_of_once():
    norm = nn.LayerNorm(4)
    norm.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks on a norm of this test do not run"):
        check_read(norm, nn.LayerNorm, "a norm of this test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_read(norm, nn.LayerNorm, "a norm of this test")


HEADS = {
    "ALBERTForMaskedLM": 2, "ALBERTForPreTraining": 2, "ALBERTForSequenceClassification": 2,
    "ALBERTForTokenClassification": 2, "ALBERTForQuestionAnswering": 2, "ALBERTForMultipleChoice": 3,
}  # fmt: skip
# Modules that transformers' model calls, and how often in a forward of 3 layers in groups of 2.
CALLED = {
    "albert": 1, "albert.embeddings": 1, "albert.encoder": 1, "albert.encoder.albert_layer_groups.0": 3,
    "albert.encoder.albert_layer_groups.0.albert_layers.1": 3,
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_hooks_on_parts_of_a_head_run_and_are_heard(name, grad):
    torch.manual_seed(0)
    head = getattr(albert_fast, name)(dataclasses.replace(CONFIG, inner_group_num=2)).eval()
    ids = torch.randint(1, 61, (3, 7) if HEADS[name] == 2 else (3, 2, 7))
    mask = torch.ones_like(ids)
    mask[..., 1, 4:] = 0
    types = torch.zeros_like(ids[:1])
    with torch.set_grad_enabled(grad):
        plain = head(ids, mask, types)
        for part, times in CALLED.items():
            module, before, after = head.get_submodule(part), [], []
            handles = [
                module.register_forward_pre_hook(lambda _, given, before=before: before.append(given)),
                module.register_forward_hook(lambda _, __, out, after=after: after.append(out)),
            ]
            hooked = head(ids, mask, types)
            for handle in handles:
                handle.remove()
            assert (len(before), len(after)) == (times, times), part
            assert list(hooked) == list(plain)
            for expected, actual in zip(plain.to_tuple(), hooked.to_tuple(), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            assert (part != "albert") or after[0].last_hidden_state.shape == (ids[..., 0].numel(), 7, 40)
            with module.register_forward_hook(lambda _, __, out: _scaled(out)):
                assert not torch.allclose(head(ids, mask, types).to_tuple()[-1], plain.to_tuple()[-1]), part


def _scaled(out):
    """What a hook puts in the place of a result: something else."""
    if isinstance(out, torch.Tensor):
        return out * torch.linspace(-2, 2, out.shape[-1])
    for key in out:
        out[key] = -2 * out[key]
    return out


@pytest.mark.parametrize("part", ["albert.encoder", "albert.encoder.albert_layer_groups.0"])
def test_backward_hooks_on_parts_run(batch, part):
    head, seen = ALBERTForSequenceClassification(CONFIG), []
    head.get_submodule(part).register_full_backward_hook(lambda *_: seen.append(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        head(*batch).logits.sum().backward()
    assert len(seen) == (1 if part == "albert.encoder" else 3)


def test_backward_hooks_that_torch_passes_over_are_warned_of(batch):
    head = ALBERTForSequenceClassification(CONFIG)
    head.albert.register_full_backward_hook(lambda *_: None)
    head_model._warn_of_backward_hooks.cache_clear()
    with pytest.warns(UserWarning, match="backward hooks on albert do not run"):
        head(*batch)


def test_hooks_around_integer_layers(batch):
    head = ALBERTForSequenceClassification(CONFIG).eval()
    quantize(head.albert, "int8")
    head.requires_grad_(False)
    seen = []
    with torch.no_grad(), head.albert.register_forward_hook(lambda *_: seen.append(1)):
        head(*batch)
    assert seen == [1]
    head.albert.encoder.albert_layer_groups[0].register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.raises(RuntimeError, match="hooks on their parts"):
        head(*batch)


def test_an_adapter_is_compiled_too(model, batch):
    put(model, LAYER + "ffn", Adapter(model.get_submodule(LAYER + "ffn")))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch).pooler_output
        torch.testing.assert_close(compiled, model(*batch).pooler_output, rtol=1e-5, atol=1e-5)


def test_an_adapter_around_the_classifier_computes(batch):
    model = ALBERTForSequenceClassification(CONFIG).eval()
    plain = model(*batch).logits
    model.classifier = Adapter(model.classifier)
    assert not torch.allclose(model(*batch).logits, plain)
