"""The encoder with a decoder against transformers' EncoderDecoderModel, and its own ways against each other."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

from albert_fast import ALBERTForConditionalGeneration, ALBERTSeq2SeqConfig
from albert_fast.generation.options import GenerationOptions
from albert_fast.generation.search import drawn_tokens
from albert_fast.layers.cache import DecoderCache
from albert_fast.testing.seq2seq_pairs import SMALL, ragged_ids, seq2seq_pair
from albert_fast.testing.tolerances import assert_close_calibrated

pytest.importorskip("transformers")
IGNORED = -100


def batch(seed, rows=4):
    source = ragged_ids(rows, 9, seed)
    return {
        "input_ids": source,
        "attention_mask": (source != 0).long(),
        "labels": ragged_ids(rows, 7, seed + 1, IGNORED),
    }


def texts(sequences):
    """The rows up to the end token: what comes after it is padding, which transformers fills in two ways."""
    return [row[: row.index(3) + 1] if 3 in row else row for row in sequences.tolist()]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("fields", [{}, {"embedding_size": 48, "num_decoder_groups": 1}], ids=["factorised", "wide"])
def test_loss_logits_and_gradients_are_those_of_transformers(fields):
    ours, theirs = seq2seq_pair(**fields)
    exact = copy.deepcopy(theirs).double()
    inputs = batch(3)
    real = inputs["labels"] != IGNORED
    outputs = [model(**inputs) for model in (ours, theirs, exact)]
    for output in outputs:
        output.loss.backward()
    mine, same, reference = outputs
    assert_close_calibrated(mine.loss, same.loss, reference.loss, "loss", slack=1e-6)
    assert_close_calibrated(mine.logits[real], same.logits[real], reference.logits[real], "logits", slack=1e-6)
    assert not mine.logits[~real].any()
    found, wanted, true = map(gradients, (ours, theirs, exact))
    assert found.keys() == {name for name, _ in ours.named_parameters()}
    groups = ours.decoder.group_indices
    for name, gradient in found.items():
        key = name
        if match := re.fullmatch(r"(decoder\.electra\.encoder\.layer\.)(\d)(.*)", name):
            key = f"{match[1]}{groups.index(int(match[2]))}{match[3]}"  # the first of theirs with these parameters
        assert_close_calibrated(gradient, wanted[key], true[key], name, slack=2e-6)


def test_the_loss_alone_and_packed_input_are_the_same():
    ours, _ = seq2seq_pair()
    inputs = batch(5)
    whole = ours(**inputs)
    alone = ours(**inputs, output_logits=False)
    assert alone.logits is None
    torch.testing.assert_close(alone.loss, whole.loss, atol=2e-6, rtol=2e-6)
    source, target = inputs["attention_mask"].bool(), inputs["labels"] != IGNORED
    ends = [torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int() for real in (source, target)]
    start = torch.full((len(target), 1), ours.config.decoder_start_token_id)
    shifted = torch.cat([start, inputs["labels"][:, :-1]], 1)[target]
    packed = ours.forward_packed(
        inputs["input_ids"][source], ends[0], 9, shifted, ends[1], 7, labels=inputs["labels"][target]
    )
    torch.testing.assert_close(packed.logits, whole.logits[target], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(packed.loss, whole.loss, atol=2e-6, rtol=2e-6)
    given = ours(
        inputs["input_ids"],
        inputs["attention_mask"],
        torch.cat([start, inputs["labels"][:, :-1].clamp(min=0)], 1),
        target,
        inputs["labels"],
    )
    assert torch.equal(given.logits, whole.logits)


def test_a_target_does_not_see_what_comes_after():
    ours, _ = seq2seq_pair()
    inputs = batch(7)
    labels = inputs["labels"].masked_fill(inputs["labels"] == IGNORED, 9)
    before = ours(**inputs | {"labels": labels}).logits
    changed = labels.clone()
    changed[:, 4:] = 10
    after = ours(**inputs | {"labels": changed}).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_label_smoothing_is_torchs():
    ours, _ = seq2seq_pair()
    inputs = batch(8)
    real = inputs["labels"] != IGNORED
    logits = ours(**inputs).logits[real]
    wanted = torch.nn.functional.cross_entropy(logits, inputs["labels"][real], label_smoothing=0.1)
    for whole in (True, False):
        loss = ours(**inputs, output_logits=whole, label_smoothing=0.1).loss
        torch.testing.assert_close(loss, wanted, atol=2e-6, rtol=2e-6)


def test_dropout_draws_and_recomputation_repeats_it():
    ours, _ = seq2seq_pair(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ours.train()
    inputs, found = batch(2), []
    for recompute in ("nothing", "layers"):
        ours.execution.recompute = recompute
        torch.manual_seed(4)
        ours.zero_grad()
        ours(**inputs, output_logits=False).loss.backward()
        found.append(gradients(ours))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert ours(**inputs).loss != ours(**inputs).loss


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_with_the_cache_are_those_without(backend):
    """Scores of each next token, for texts that go on, change places, are continued twice, and leave."""
    ours, _ = seq2seq_pair(1, backend)
    exact = copy.deepcopy(ours).double()
    exact.execution.backend = "reference"
    inputs = batch(9, rows=5)
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    texts = [[ours.config.decoder_start_token_id] for _ in range(5)]
    sources = list(range(5))
    generator = torch.Generator().manual_seed(1)
    found: list[torch.Tensor] = []

    class Search:
        """In place of the search: continues texts at random, and keeps the scores."""

        def __call__(self, writer, count, start, end, options, device):
            nonlocal texts, sources
            for step in range(6):
                found.append(writer.scores(torch.tensor([text[-1] for text in texts])))
                self.compare(found[-1])
                size = [8, 8, 5, 6, 3, 4][step]
                parents = torch.randint(len(texts), (size,), generator=generator).tolist()
                writer.continue_from(parents)
                tokens = torch.randint(4, 50, (size,), generator=generator).tolist()
                texts = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
                sources = [sources[parent] for parent in parents]
            return [[3]] * count

        def compare(self, scores):
            chosen = {name: value[torch.tensor(sources)] for name, value in source.items()}
            ids = torch.tensor(texts)
            same = ours(**chosen, decoder_input_ids=ids).logits[:, -1]
            assert_close_calibrated(scores, same, exact(**chosen, decoder_input_ids=ids).logits[:, -1], slack=1e-6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("albert_fast.models.seq2seq.generate", Search())
        ours.generate(**source, max_new_tokens=9, num_beams=2)
    assert len(found) == 6


SEARCHES = [
    {},
    {"num_beams": 2},
    {"num_beams": 4, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 1.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": -1.0, "early_stopping": "never"},
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_generated_texts_are_those_of_transformers(search):
    lengths = set()
    for seed in range(2):
        ours, theirs = seq2seq_pair(seed)
        for model in (ours.decoder, theirs.decoder):
            # An end token that comes at many lengths.
            model.generator_lm_head.bias.data[3] += 0.8
        source = ragged_ids(5, 9, seed)
        inputs = {"input_ids": source, "attention_mask": (source != 0).long()}
        wanted = theirs.generate(
            **inputs,
            **search,
            max_new_tokens=10,
            decoder_start_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
            do_sample=False,
        )
        found = texts(ours.generate(**inputs, **search, max_new_tokens=10))
        assert found == texts(wanted)
        lengths |= set(map(len, found))
    assert len(lengths) > 1, "texts of many lengths were compared"


def test_beams_are_copied_only_where_two_continue_one():
    cache = DecoderCache(2, 3, 4, 5, torch.device("cpu"))
    for token in range(2):
        for step in range(2):
            cache.append(step, torch.tensor([[i, token, step, 0.0] for i in range(3)]))
        cache.advance()

    def texts():
        rows = cache.append(1, torch.full((len(cache._slots), 4), 9.0))
        return [rows.keys[begin : begin + 2].tolist() for begin in rows.begins.tolist()]

    def text(i):
        return [[i, 0], [i, 1]]

    def copied(parents):
        """How many slots the continuation writes."""
        slots = cache.memory.unflatten(1, (4, 5)).view(torch.int32)  # as integers, so that NaN equals itself
        before = slots.clone()
        cache.continue_from(parents)
        return int((slots != before).any(3).any(2).any(0).sum())

    assert copied([2, 0, 1]) == 0, "a change of places moves nothing"
    assert texts() == [text(2), text(0), text(1)]
    assert copied([0, 0, 2, 2]) == 2
    assert texts() == [text(2), text(2), text(1), text(1)]
    assert copied([3]) == 0
    assert texts() == [text(1)]


def test_sampling_draws_from_the_probabilities():
    torch.manual_seed(0)
    scores = torch.randn(11)

    def shares(**options):
        drawn = drawn_tokens(scores.expand(20000, 11), GenerationOptions(do_sample=True, **options))
        return torch.bincount(drawn, minlength=11) / len(drawn)

    for temperature in (1.0, 0.5):
        assert (shares(temperature=temperature) - (scores / temperature).softmax(-1)).abs().max() < 0.02
    likeliest = scores.softmax(-1).sort(descending=True)
    found = shares(top_k=3)
    assert set(found.nonzero()[:, 0].tolist()) == set(likeliest.indices[:3].tolist())
    within = int((likeliest.values.cumsum(0) < 0.5).sum()) + 1
    found = shares(top_p=0.5)
    assert set(found.nonzero()[:, 0].tolist()) == set(likeliest.indices[:within].tolist())
    assert (found[likeliest.indices[0]] - likeliest.values[0] / likeliest.values[:within].sum()).abs() < 0.02


def test_sampling_of_the_likeliest_is_greedy_search():
    ours, _ = seq2seq_pair(3)
    ids = ragged_ids(3, 6, 1)
    greedy = ours.generate(ids, max_new_tokens=6)
    assert torch.equal(ours.generate(ids, max_new_tokens=6, do_sample=True, top_k=1), greedy)
    assert torch.equal(ours.generate(ids, max_new_tokens=6, do_sample=True, top_p=1e-6), greedy)
    ours.train()
    ours.encoder.eval()
    assert torch.equal(ours.generate(ids, max_new_tokens=6), greedy)
    assert ours.training
    assert not ours.encoder.training


def test_other_number_formats():
    ours, _ = seq2seq_pair(5)
    inputs = batch(5)
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    wanted = ours(**inputs)
    ours.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(**inputs, output_logits=False).loss
        loss.backward()
        assert ours.generate(**source, max_new_tokens=5, num_beams=2).shape[0] == 4
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())
    assert abs(float(loss) - float(wanted.loss)) < 0.05 * float(wanted.loss)
    ours.execution.use("auto", "bf16")
    half = ours(**inputs)
    assert half.logits.dtype == torch.bfloat16
    assert abs(float(half.loss) - float(wanted.loss)) < 0.05 * float(wanted.loss)
    assert ours.generate(**source, max_new_tokens=5).shape[0] == 4


def test_a_saved_model_loads_here_and_in_transformers(tmp_path):
    import transformers

    ours, _ = seq2seq_pair(4)
    inputs = batch(4)
    wanted = ours(**inputs).logits
    ours.save_pretrained(tmp_path / "groups")
    ours.save_pretrained(tmp_path / "layers", each_layer=True)
    theirs = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "layers").eval()
    real = inputs["labels"] != IGNORED
    torch.testing.assert_close(theirs(**inputs).logits[real], wanted[real], atol=2e-5, rtol=1e-4)
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert texts(theirs.generate(**source, max_new_tokens=6)) == texts(ours.generate(**source, max_new_tokens=6))
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("groups", "layers", "theirs"):
        loaded = ALBERTForConditionalGeneration.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(**inputs).logits, wanted), name
        assert loaded.num_parameters() == ours.num_parameters(), name
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("groups", "layers")}
    assert size["groups"] < 0.7 * size["layers"]


def test_layers_that_should_be_equal_and_are_not(tmp_path):
    from safetensors.torch import load_file, save_file

    ours, _ = seq2seq_pair()
    ours.save_pretrained(tmp_path, each_layer=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.electra.encoder.layer.1.output.dense.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.bias' differs from .*layer\.0\."):
        ALBERTForConditionalGeneration.from_pretrained(tmp_path)


def test_the_configuration_has_transformers_form():
    import transformers

    config = ALBERTSeq2SeqConfig(**SMALL, note="kept")
    values = json.loads(json.dumps(config.to_dict()))
    assert ALBERTSeq2SeqConfig.from_dict(values) == config
    theirs = transformers.EncoderDecoderConfig(**{k: v for k, v in values.items() if k != "model_type"})
    assert (theirs.encoder.model_type, theirs.decoder.model_type) == ("albert", "electra")
    assert theirs.decoder.num_hidden_layers == 4
    assert ALBERTSeq2SeqConfig.from_dict(theirs.to_dict()).num_decoder_groups == 2
    assert ALBERTSeq2SeqConfig.from_dict(values).note == "kept"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": None}, "eos_token_id must be an id of the vocabulary of 53, got None"),
        ({"decoder_start_token_id": 99}, "decoder_start_token_id must be an id"),
        ({"num_decoder_groups": 0}, "num_decoder_groups must be a positive integer"),
        ({"decoder_attention_heads": 5}, "decoder: hidden_size 48 is not a multiple of num_attention_heads 5"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        ALBERTSeq2SeqConfig(**(SMALL | fields))


def test_bad_parts_of_a_configuration():
    values = ALBERTSeq2SeqConfig(**SMALL).to_dict()
    for part, change, message in (
        ("decoder", {"model_type": "bert"}, "decoder: model_type is 'bert', expected 'electra'"),
        ("decoder", {"is_decoder": False}, "decoder: is_decoder must be true, got False"),
        ("decoder", {"hidden_size": 96}, "hidden_size must be the same in encoder and decoder, got 48 and 96"),
    ):
        with pytest.raises(ValueError, match=message):
            ALBERTSeq2SeqConfig.from_dict(values | {part: values[part] | change})
    with pytest.raises(ValueError, match="encoder must be an object, got NoneType"):
        ALBERTSeq2SeqConfig.from_dict({k: v for k, v in values.items() if k != "encoder"})


def test_bad_input():
    ours, _ = seq2seq_pair()
    ids = ragged_ids(2, 5, 0)
    for given, error, message in (
        ({}, ValueError, "give labels or decoder_input_ids"),
        ({"labels": ids[:1]}, ValueError, "2 sources and 1 targets"),
        ({"labels": ids[0]}, ValueError, r"labels must have the shape \(B, T\)"),
        ({"labels": ids.float()}, TypeError, "labels must be integers"),
        ({"labels": torch.tensor([[-100, 5], [4, 5]])}, ValueError, "labels have -100 before another label"),
        ({"decoder_input_ids": ids, "output_logits": False}, ValueError, "needs labels"),
        (
            {"labels": ids.repeat(1, 5)},
            ValueError,
            "a sequence of 25 tokens is longer than max_position_embeddings = 24",
        ),
        ({"labels": ids.clamp(max=4).masked_fill(ids > 40, 99)}, IndexError, "99"),
    ):
        with pytest.raises(error, match=message):
            ours(ids, **given)
    for given, error, message in (
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an integer, got float"),
        ({"num_beams": 2, "do_sample": True}, ValueError, "num_beams must be 1"),
        ({"temperature": 0.5}, ValueError, "add do_sample=True"),
        ({"length_penalty": 2.0}, ValueError, "are for beam search: num_beams must be at least 2"),
        ({"early_stopping": "never", "do_sample": True}, ValueError, "are for beam search"),
        ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature must be above 0"),
        ({"top_p": 0.0, "do_sample": True}, ValueError, "top_p must lie in"),
        ({"early_stopping": "soon", "num_beams": 2}, ValueError, 'early_stopping must be True, False or "never"'),
        ({"max_new_tokens": 25}, ValueError, "max_new_tokens 25 is more than max_position_embeddings = 24"),
        ({"num_beams": 30}, ValueError, "num_beams 30 needs a vocabulary of 60 words, this one has 53"),
        ({"beams": 2}, TypeError, "beams"),
    ):
        with pytest.raises(error, match=message):
            ours.generate(ids, **given)
    with pytest.raises(ValueError, match="a model that generates text takes one of fp32, bf16, fp16"):
        ours.execution.use("auto", "int8")
    assert ours.generate(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 1)


def test_the_table_of_words_grows_for_all_three():
    ours, _ = seq2seq_pair()
    ours.resize_token_embeddings(60)
    table = ours.encoder.embeddings.word_embeddings.weight
    assert ours.decoder.electra.embeddings.word_embeddings.weight is table
    assert ours.decoder.generator_lm_head.weight is table
    assert ours(**batch(1)).logits.shape[-1] == 60
