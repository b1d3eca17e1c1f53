"""Starting weights made of counts: like words get like vectors, heads look at neighbours, held-out documents are not counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTForPreTraining
from albert_fast.training.corpus import Corpus
from albert_fast.training.starting_weights import OFFSETS, start_from_counts

pytest.importorskip("sklearn", reason="the train extra is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST, SECOND, HELD_OUT = range(5, 15), range(15, 25), 39


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """100 documents in which tokens of FIRST stand before 30 and those of SECOND before 31; the last one has other tokens."""
    rng = np.random.default_rng(0)
    documents = []
    for number in range(100):
        words = rng.choice(FIRST if number % 2 else SECOND, 60)
        documents.append(np.stack([words, np.full(60, 30 + (number + 1) % 2)], 1).ravel())
    documents.append(np.full(50, HELD_OUT))
    ends = np.cumsum([len(document) for document in documents])
    return Corpus(np.concatenate(documents).astype(np.uint16), ends, ends)


def new_model(seed: int = 0, **fields: int) -> ALBERTForPreTraining:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_hidden_groups": 3, "num_attention_heads": 4}
    rest = {"intermediate_size": 48, "embedding_size": 64, "vocab_size": 40, "max_position_embeddings": 64}
    return ALBERTForPreTraining(ALBERTConfig(**sizes | rest | fields)).eval()


@pytest.fixture
def started(corpus: Corpus) -> ALBERTForPreTraining:
    model = new_model()
    start_from_counts(model, corpus, np.arange(100), seed=0)
    return model


def test_words_of_like_contexts_have_like_vectors(started: ALBERTForPreTraining) -> None:
    def contrast(model: ALBERTForPreTraining) -> float:
        vectors = model.albert.embeddings.word_embeddings.weight.detach()
        alike = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        within = (alike[5:15, 5:15].mean() + alike[15:25, 15:25].mean()) / 2
        return float(within - alike[5:15, 15:25].mean())

    assert contrast(new_model()) < 0.2
    assert contrast(started) > 0.5


def test_frequent_words_are_expected(started: ALBERTForPreTraining) -> None:
    chances = started.predictions.bias.exp()
    torch.testing.assert_close(chances.sum(), torch.tensor(1.0))
    assert set(chances.topk(2).indices.tolist()) == {30, 31}


def test_held_out_documents_are_not_counted(started: ALBERTForPreTraining) -> None:
    words = started.albert.embeddings.word_embeddings.weight
    fresh = new_model().albert.embeddings.word_embeddings.weight
    torch.testing.assert_close(words[HELD_OUT, 16:], fresh[HELD_OUT, 16:], rtol=0, atol=0)
    assert not torch.equal(words[20, 16:], fresh[20, 16:])
    assert started.predictions.bias[HELD_OUT] == started.predictions.bias[38]


def test_heads_look_at_neighbours(started: ALBERTForPreTraining) -> None:
    ids = torch.from_numpy(np.random.default_rng(1).choice([*FIRST, *SECOND], (4, 40)))
    with torch.no_grad():
        layers = started.albert(ids, output_attentions=True).attentions
    for layer, heads in ((0, 3), (1, 2)):
        for head, offset in enumerate(OFFSETS[:heads]):
            looked = layers[layer][:, head]
            means = {k: float(looked.diagonal(k, 1, 2).mean()) for k in range(-8, 9)}
            assert max(means, key=means.__getitem__) == offset, (layer, head, means)
            assert means[offset] > 0.4, "mostly there"


@pytest.mark.parametrize(
    "fields",
    [{"num_hidden_groups": 1}, {"embedding_size": 5}, {"num_attention_heads": 1}, {"max_position_embeddings": 1}],
    ids=str,
)
def test_odd_shapes(corpus: Corpus, fields: dict[str, int]) -> None:
    models = []
    for _ in range(2):
        models.append(new_model(**fields))
        start_from_counts(models[-1], corpus, np.arange(100), seed=0)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, other), name


def test_text_of_one_word_and_no_text_at_all() -> None:
    for tokens in (np.full(9, 7, dtype=np.uint16), np.full(1, 7, dtype=np.uint16)):
        model = new_model()
        ends = np.array([len(tokens)])
        start_from_counts(model, Corpus(tokens, ends, ends), np.arange(1), seed=0)
        assert all(weight.isfinite().all() for weight in model.parameters())
