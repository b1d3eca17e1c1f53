"""The aligned representation as the pooling of a classifier of pairs: the same numbers as the eager reference, kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from albert_fast import (
    ALBERTConfig,
    ALBERTForSequenceClassification,
    BERTConfig,
    BERTForSequenceClassification,
    RoBERTaConfig,
    RoBERTaForSequenceClassification,
    aligned_representation,
)
from albert_fast.models import reference
from albert_fast.testing import assert_close_calibrated
from albert_fast.training import Recipe, fit

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "num_labels": 3,
    "initializer_range": 0.3,
}


def batch() -> dict[str, torch.Tensor]:
    """Rows of 2 to 20 tokens, the first `firsts` of each of the first segment."""
    generator = torch.Generator().manual_seed(0)
    lengths, firsts = torch.tensor([20, 7, 2, 11]), torch.tensor([5, 6, 1, 11])
    columns = torch.arange(20)
    mask = (columns < lengths[:, None]).long()
    types = (columns >= firsts[:, None]).long() * mask
    ids = torch.randint(5, 50, (4, 20), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def test_pooling_is_the_mean_of_the_aligned_representation() -> None:
    config = ALBERTConfig(**SIZES, embedding_size=16, classifier_dropout_prob=0.0, pair_pooling="aligned")
    torch.manual_seed(0)
    fast, inputs = ALBERTForSequenceClassification(config).eval(), batch()
    plain = reference.ALBERTForSequenceClassification(config).eval()
    plain.load_state_dict(fast.state_dict())
    labels = torch.tensor([0, 2, 1, 1])
    ours, theirs = fast(**inputs, labels=labels), plain(**inputs, labels=labels)
    exact = plain.double()(**inputs, labels=labels)
    assert_close_calibrated(ours.logits.detach(), theirs.logits.detach(), exact.logits.detach())
    with torch.no_grad():  # row by row, from the encoder's own states
        for row in range(4):
            real = inputs["attention_mask"][row].bool()
            one = {key: tensor[row : row + 1, real] for key, tensor in inputs.items()}
            hidden = fast.albert(**one).last_hidden_state
            separator = int((one["token_type_ids"] == 0).sum())
            pooled = torch.tanh(fast.albert.pooler(aligned_representation(hidden, separator).mean(1)))
            torch.testing.assert_close(fast.classifier(pooled)[0], ours.logits[row], rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    plain.float()
    plain(**inputs, labels=labels).loss.backward()
    for (name, one), two in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)
    cls = ALBERTForSequenceClassification(config.replace(pair_pooling="cls")).eval()
    cls.load_state_dict(fast.state_dict())
    assert not torch.allclose(cls(**inputs).logits, ours.logits, atol=1e-3)


def test_packed_and_padded_agree_and_the_choice_is_stored(tmp_path: Path) -> None:
    config = BERTConfig(**SIZES, pair_pooling="aligned")
    torch.manual_seed(0)
    BERTForSequenceClassification(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pair_pooling"] == "aligned"
    model, inputs = BERTForSequenceClassification.from_pretrained(tmp_path).eval(), batch()
    real = inputs["attention_mask"].bool()
    lengths = [0, *real.sum(1).cumsum(0).tolist()]
    with torch.no_grad():
        padded = model(**inputs).logits
        packed = model.forward_packed(
            inputs["input_ids"][real],
            torch.tensor(lengths, dtype=torch.int32),
            20,
            token_type_ids=inputs["token_type_ids"][real],
        ).logits
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_what_cannot_pool_pairs_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'aligned' needs a pooler and token types, which roberta has not"):
        RoBERTaForSequenceClassification(RoBERTaConfig(**SIZES, pair_pooling="aligned"))
    with pytest.raises(ValueError, match="pair_pooling is 'mean'; known: 'cls', 'aligned'"):
        ALBERTForSequenceClassification(ALBERTConfig(**SIZES, pair_pooling="mean"))
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    rows = [{"text": f"kalu {i} misti", "label": i % 2} for i in range(8)]
    small = ALBERTConfig(**(SIZES | {"num_labels": 2}), embedding_size=16)
    arguments = {"config": small, "recipe": Recipe(epochs=1, max_length=16, batch_size=4), "progress": False}
    with pytest.raises(ValueError, match="the examples are not such pairs"):
        fit(rows, tmp_path / "single", pair_pooling="aligned", device="cpu", **arguments)
    pairs = [row | {"text_pair": "robar"} for row in rows]
    fit(pairs, tmp_path / "pairs", pair_pooling="aligned", device="cpu", **arguments)
    assert ALBERTForSequenceClassification.from_pretrained(tmp_path / "pairs").pools_pairs
