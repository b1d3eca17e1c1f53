"""The advice to call a model without gradients: given once, and only where no backward follows."""

import gc
import warnings

import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTModel
from albert_fast.runtime import dispatch, unused_gradients

pytestmark = pytest.mark.skipif(not dispatch.has_extension(), reason="needs the C++ extension")
CONFIG = ALBERTConfig(
    vocab_size=61, embedding_size=12, hidden_size=40, num_attention_heads=4, intermediate_size=56, num_hidden_layers=2
)
IDS = torch.randint(1, 61, (2, 9))


@pytest.fixture
def said(monkeypatch):
    gc.collect()  # graphs of other tests
    monkeypatch.setattr(unused_gradients._Watch, "unused", 0)
    monkeypatch.setattr(unused_gradients._Watch, "told", False)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in record if "no backward has used them" in str(w.message)]


def calls(model, count, use=lambda out: None):
    for _ in range(count):
        use(model(IDS).last_hidden_state)


def test_forwards_whose_gradient_nobody_asks_for_are_told_once(said):
    model = ALBERTModel(CONFIG).eval()
    calls(model, 2)
    assert said() == []
    calls(model, 4)
    (message,) = said()
    assert "torch.inference_mode()" in message
    assert "torch.no_grad()" in message
    calls(model, 9)
    assert len(said()) == 1


def test_a_gradient_that_is_used_is_no_reason(said):
    model = ALBERTModel(CONFIG).eval()
    weight = model.encoder.embedding_hidden_mapping_in.weight
    for use in (lambda out: out.sum().backward(), lambda out: torch.autograd.grad(out.sum(), weight)):
        for _ in range(3):
            calls(model, 2)
            calls(model, 1, use)
    kept = []
    calls(model, 6, kept.append)  # one backward through all of them may come
    sum(out.sum() for out in kept).backward()
    assert said() == []


@pytest.mark.parametrize("way", ["training", "no_grad", "frozen"])
def test_other_calls_are_not_watched(way, said):
    model = ALBERTModel(CONFIG).train(way == "training")
    model.requires_grad_(way != "frozen")
    with torch.set_grad_enabled(way != "no_grad"):
        calls(model, 9)
    assert said() == []
