"""`forward_packed` of the masked-language and pre-training heads: `forward` without the padding, losses and gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTForPreTraining
from albert_fast.testing.tolerances import assert_close_calibrated

LENGTHS = [5, 17, 1, 8, 3]
CONFIG = ALBERTConfig(
    vocab_size=61,
    embedding_size=8,
    hidden_size=24,
    num_attention_heads=2,
    num_hidden_layers=3,
    intermediate_size=40,
    max_position_embeddings=32,
    initializer_range=0.2,
)


def batches() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same random sequences, padded and packed; about a third of the tokens have a label."""
    ids, types = torch.randint(0, 61, (sum(LENGTHS),)), torch.randint(0, 2, (sum(LENGTHS),))
    labels = torch.where(torch.rand(len(ids)) < 0.3, torch.randint(0, 61, ids.shape), -100)
    labels[0], labels[1] = 7, -100
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded = {"attention_mask": mask}
    for name, values, fill in (("input_ids", ids, 0), ("token_type_ids", types, 0), ("labels", labels, -100)):
        padded[name] = torch.full(mask.shape, fill)
        padded[name][mask] = values
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = {"input_ids": ids, "token_type_ids": types, "labels": labels, "cu_seqlens": ends}
    return padded, packed


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("output_logits", [False, True])
def test_pretraining_packed_is_pretraining_padded(wants: bool, output_logits: bool) -> None:
    model = ALBERTForPreTraining(CONFIG).train()
    padded, packed = batches()
    order = torch.tensor([0, 1, -100, 1, 0])
    wanted = packed["labels"] != -100 if wants else None
    expected = model(**padded, sentence_order_label=order)
    actual = model.forward_packed(
        **packed, max_seqlen=17, sentence_order_label=order, wanted_tokens=wanted, output_logits=output_logits
    )
    exact = ALBERTForPreTraining(CONFIG, backend="reference").double()
    exact.load_state_dict(model.state_dict())
    reference = exact(**padded, sentence_order_label=order)
    assert_close_calibrated(actual.loss.detach(), expected.loss.detach(), reference.loss.detach(), slack=1e-6)
    pooled = [out.sop_logits.detach() for out in (actual, expected, reference)]
    assert_close_calibrated(*pooled, slack=1e-6)
    if output_logits:
        real = padded["attention_mask"] if wanted is None else padded["labels"] != -100
        scores = [out.prediction_logits[real].detach() for out in (expected, reference)]
        assert_close_calibrated(actual.prediction_logits.detach(), *scores, slack=1e-6)
    else:
        assert actual.prediction_logits is None
    wishes = [gradients(one, out.loss) for one, out in ((model, expected), (exact, reference))]
    found = gradients(model, actual.loss)
    assert found.keys() == wishes[0].keys()
    largest = max(float(grad.abs().max()) for grad in wishes[1].values())
    for name, grad in found.items():
        own = largest / max(float(wishes[1][name].abs().max()), 1e-12)  # the key bias's gradient is rounding alone
        assert_close_calibrated(grad, wishes[0][name], wishes[1][name], name, slack=1e-6 * own)


@torch.no_grad()
def test_masked_lm_packed_is_masked_lm_padded() -> None:
    model = ALBERTForMaskedLM(CONFIG).eval()
    padded, packed = batches()
    expected = model(**padded)
    for wanted in (None, packed["labels"] != -100):
        actual = model.forward_packed(**packed, max_seqlen=17, wanted_tokens=wanted)
        real = padded["attention_mask"] if wanted is None else padded["labels"] != -100
        torch.testing.assert_close(actual.logits, expected.logits[real])
        torch.testing.assert_close(actual.loss, expected.loss)
        alone = model.forward_packed(**packed, max_seqlen=17, wanted_tokens=wanted, output_logits=False)
        assert alone.logits is None
        torch.testing.assert_close(alone.loss, expected.loss)


@torch.no_grad()
def test_each_label_gives_its_own_loss() -> None:
    model = ALBERTForPreTraining(CONFIG).eval()
    given, order = {**batches()[1], "max_seqlen": 17}, torch.tensor([0, 1, -100, 1, 0])
    both = model.forward_packed(**given, sentence_order_label=order).loss
    words = model.forward_packed(**given).loss
    given["labels"] = None
    assert model.forward_packed(**given).loss is None
    torch.testing.assert_close(words + model.forward_packed(**given, sentence_order_label=order).loss, both)


@torch.no_grad()
def test_an_empty_sequence_pools_a_vector_of_zeros() -> None:
    model = ALBERTForPreTraining(CONFIG).eval()
    ids, ends = torch.randint(0, 61, (8,)), torch.tensor([0, 5, 5, 8, 8], dtype=torch.int32)
    wanted = torch.rand(8) < 0.5
    every, some = (model.forward_packed(ids, ends, 5, wanted_tokens=w) for w in (None, wanted))
    torch.testing.assert_close(some.sop_logits, every.sop_logits)
    torch.testing.assert_close(some.prediction_logits, every.prediction_logits[wanted])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(33, dtype=torch.long)}, ValueError, r"labels \(33,\) do not fit the batch of \(34,\)"),
        ({"wanted_tokens": torch.ones(33, dtype=torch.bool)}, ValueError, r"wanted_tokens \(33,\) does not fit"),
        ({"wanted_tokens": torch.ones(34)}, TypeError, "wanted_tokens must be bool"),
        ({"labels": None, "output_logits": False}, ValueError, "needs labels"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, error: type[Exception], message: str) -> None:
    model = ALBERTForPreTraining(CONFIG)
    given = {**batches()[1], "max_seqlen": 17, "sentence_order_label": torch.zeros(5, dtype=torch.long), **change}
    with pytest.raises(error, match=message):
        model.forward_packed(**given)
