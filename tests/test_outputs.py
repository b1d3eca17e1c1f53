"""Outputs are dictionaries and tuples of their fields that are set, as transformers' are, for every tool that looks inside."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree

from albert_fast import ALBERTConfig, ALBERTForSequenceClassification
from albert_fast.models import outputs

KINDS = [outputs.BaseModelOutput, outputs.LogitsOutput, outputs.PreTrainingOutput, outputs.QuestionAnsweringOutput]


def theirs() -> Any:
    return pytest.importorskip("transformers.modeling_outputs").BaseModelOutputWithPooling


@pytest.mark.parametrize("kind", [outputs.BaseModelOutput, pytest.param(theirs, id="transformers")])
def test_what_transformers_outputs_do(kind: Any) -> None:
    kind = kind() if kind is theirs else kind
    state, pooled = torch.randn(2, 3, 4), torch.randn(2, 4)
    out = kind(state, pooled)
    assert "pooler_output" in out
    assert "attentions" not in out
    assert list(out) == list(out.keys()) == ["last_hidden_state", "pooler_output"]
    assert [key for key, _ in out.items()] == list(out)
    assert (len(out), out[0] is state, out["pooler_output"] is pooled, out[1:] == (pooled,)) == (2, True, True, True)
    assert out.get("attentions", 5) == 5
    assert dict(**out).keys() == out.keys()
    assert out == out
    assert out.attentions is None
    with pytest.raises(AttributeError):
        _ = out.logits
    with pytest.raises(KeyError):
        _ = out["attentions"]
    with pytest.raises(IndexError):
        _ = out[2]
    for change in (lambda: out.pop("pooler_output"), lambda: out.update(a=1), lambda: out.setdefault("a", 1)):
        with pytest.raises(Exception, match="BaseModelOutput"):
            change()
    with pytest.raises(Exception, match="BaseModelOutput"):
        del out["pooler_output"]
    out["pooler_output"] = state
    out["more"] = pooled  # as the fill-mask pipeline does
    out.attentions = (state,)
    assert out.pooler_output is state
    assert out.more is out["more"] is pooled
    assert out.to_tuple() == (state, state, pooled, (state,))
    assert list(kind({"pooler_output": pooled})) == list(kind([("pooler_output", pooled)])) == ["pooler_output"]
    assert kind((state, pooled)).last_hidden_state == (state, pooled)
    assert len(kind()) == 0


def test_a_field_set_to_none_leaves_the_keys() -> None:
    out = outputs.LogitsOutput(torch.tensor(1.0), torch.randn(2))
    out.loss = None
    assert list(out) == ["logits"]
    out["logits"] = None
    assert (list(out), out.logits) == ([], None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda out: pickle.loads(pickle.dumps(out))])
def test_copies_and_pickles(kind: type[Any], again: Callable[[Any], Any]) -> None:
    out = kind(torch.randn(3), None, torch.randn(2))
    out["more"] = torch.randn(1)
    other = again(out)
    assert type(other) is kind
    assert list(other) == list(out)
    assert all(torch.equal(other[key], out[key]) for key in out)
    assert torch.equal(other.more, out.more)


@pytest.mark.parametrize("kind", KINDS)
def test_pytrees_look_inside(kind: type[Any]) -> None:
    out = kind(torch.randn(3), None, (torch.randn(2), torch.randn(1)))
    leaves, shape = _pytree.tree_flatten(out)
    assert [leaf.numel() for leaf in leaves] == [3, 2, 1]
    doubled = _pytree.tree_unflatten([2 * leaf for leaf in leaves], shape)
    assert type(doubled) is kind
    assert list(doubled) == list(out)
    assert torch.equal(doubled[0], 2 * out[0])
    assert torch.equal(doubled[1][1], 2 * out[1][1])
    restored = _pytree.treespec_loads(_pytree.treespec_dumps(shape))
    assert list(_pytree.tree_unflatten(leaves, restored)) == list(out)


def test_a_model_returns_them_through_a_compiler() -> None:
    config = ALBERTConfig(
        vocab_size=30,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = ALBERTForSequenceClassification(config).eval()
    ids, labels = torch.randint(1, 30, (2, 5)), torch.tensor([0, 1])
    expected = model(ids, labels=labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=labels)
    assert list(compiled) == list(expected) == ["loss", "logits"]
    torch.testing.assert_close(compiled.loss, expected.loss)
