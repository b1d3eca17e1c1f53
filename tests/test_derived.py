"""Copies of weights in the kernels' layout: made once, made again where the weights change, gone with the weights."""

import sys

import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTForSequenceClassification, ops
from albert_fast.runtime import dispatch
from albert_fast.runtime.derived import Derived, Snapshot, weights_stay
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import make_inputs

CASE = ALL_CASES["encoder"]


def drawn(shape):
    return make_inputs(CASE, shape, {}, torch.float32)


def test_a_write_while_a_copy_is_made_is_not_lost():
    """As another thread may write: the copy is then of neither the old nor the new weights."""
    weight = torch.randn(7, 5)

    def make(weights):
        copy = weights[0].clone()
        weights[0].mul_(-2.0)
        return copy

    derived = Derived(make)
    old = weight.clone()
    assert torch.equal(derived([weight]), old)
    derived._make = lambda weights: weights[0].clone()
    assert torch.equal(derived([weight]), -2.0 * old)
    assert derived([weight]) is derived([weight])
    derived.forget([weight])
    assert len(derived) == 0


def test_weights_that_stay_are_compared_once(monkeypatch):
    compared = []
    holds = Snapshot.holds
    monkeypatch.setattr(Snapshot, "holds", lambda self, weights: compared.append(1) or holds(self, weights))
    weights = [torch.randn(7, 5), torch.randn(3)]
    derived = Derived(lambda weights: [weight.clone() for weight in weights])
    made = derived(weights)
    for _ in range(2):
        compared.clear()
        with weights_stay():
            assert derived(weights) is made
            with weights_stay():
                assert derived(weights) is made
            assert len(compared) == 1
            assert derived([weights[0], torch.ones(3)])[1].sum() == 3, (
                "a copy of other weights, though the first is the same"
            )
        made = derived(weights)
    weights[1].mul_(2.0)
    assert derived(weights) is not made, "outside of the block they are compared each time"
    with weights_stay():
        made = derived(weights)
    weights[1].mul_(2.0)
    with weights_stay():
        assert torch.equal(derived(weights)[1], weights[1]), "each block compares again"


def test_changed_weights_are_packed_again():
    inputs = drawn(((9, 4), 48, 2, 100, 1, 2))
    matrices = [weight for weight in inputs["weights"] if weight.dim() == 2]
    before = CASE.run(inputs, "cpp")
    for change in (lambda w: w.mul_(0.5), lambda w: w.data.mul_(2.0), lambda w: w.data.copy_(torch.randn_like(w) / 7)):
        for matrix in matrices:
            change(matrix)
            after = CASE.run(inputs, "cpp")
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, CASE.run(inputs, "reference"), atol=1e-5, rtol=1e-5)
            before = after


def test_a_write_while_weights_are_packed_is_not_lost(monkeypatch):
    """As another thread may write: what was packed is then neither the old nor the new weights."""
    inputs, extension = drawn(((9, 4), 48, 2, 100, 1, 2)), dispatch.extension()
    weights = dict(zip(ops.WEIGHTS, inputs["weights"], strict=True))

    class WritesBehindThePacking:
        def __getattr__(self, name):
            return getattr(extension, name)

        def encoder_pack_cpu(self, *arguments):
            extension.encoder_pack_cpu(*arguments)
            weights["value"].mul_(-2.0)

    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "extension", WritesBehindThePacking)
        CASE.run(inputs, "cpp")
    torch.testing.assert_close(CASE.run(inputs, "cpp"), CASE.run(inputs, "reference"), atol=1e-5, rtol=1e-5)


def test_packed_weights_go_with_the_weights():
    packed = sys.modules["albert_fast.ops.encoder"]._PACKED
    inputs = drawn(((4,), 26, 1, 40, 1, 1))
    before = len(packed)
    CASE.run(inputs, "cpp")
    assert len(packed) == before + 1
    inputs.clear()
    assert len(packed) == before


@pytest.mark.parametrize(
    "name",
    [
        "albert.encoder.embedding_hidden_mapping_in.weight",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight",
        "albert.pooler.weight",
        "classifier.weight",
    ],
)
@pytest.mark.parametrize("states", [False, True], ids=["one call", "by operators"])
def test_repack_reads_every_weight_anew(name: str, states: bool) -> None:
    """After a write that neither a version nor the compared elements show."""
    config = ALBERTConfig(
        vocab_size=30, embedding_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        num_labels=5, initializer_range=0.2,
    )  # fmt: skip
    model, ids = ALBERTForSequenceClassification(config).eval(), torch.randint(1, 30, (2, 6))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids, output_hidden_states=states).logits

    before = logits()
    model.get_parameter(name).data[1, 2:5] += 3.0
    model.execution.repack()
    assert not torch.equal(logits(), before)
    other = ALBERTForSequenceClassification(config).eval()  # whose weights were never copied
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = other(ids, output_hidden_states=states).logits
    assert torch.equal(logits(), expected)
