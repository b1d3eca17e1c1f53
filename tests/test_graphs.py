"""The buckets, the numbers, the order of replays and what weights and threads do meanwhile, with a stand-in for the GPU."""

import copy
import io
import sys
import threading
import warnings
from functools import partial

import pytest
import torch

import albert_fast
from albert_fast import ALBERTForSequenceClassification, ALBERTModel
from albert_fast.execution import graphs
from albert_fast.execution.graphs import Bucket
from albert_fast.quantization.calibration import quantize
from albert_fast.testing.gpu.fake_graphs import CONFIG, DEVICE, Capture, batch, graphed, in_threads, plain
from albert_fast.testing.gpu.tf32 import tf32_asked_for

pytest.importorskip("triton")


@pytest.fixture
def capture(monkeypatch):
    # On a CPU operators insist that sequences hold all tokens, which on a GPU they cannot see without waiting for it.
    for op in ("attention", "_encoder_call"):
        monkeypatch.setattr(sys.modules[f"albert_fast.ops.{op}"], "check_ranges", lambda *_: None)
    return Capture()


@pytest.fixture
def model(capture):
    return graphed(capture)


@pytest.fixture(autouse=True)
def _say_again():
    graphs._say.cache_clear()


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 24, 25, 32, 33, 48, 49, 1000, 1024, 1025, 2049, 4095, 4096])
def test_a_bucket_holds_its_call_and_little_more(n):
    bucket = Bucket.of(n, n, n, "all")
    assert n <= bucket.tokens <= max(16, 1.5 * n)
    assert n <= bucket.sequences < 2 * n
    assert n <= bucket.max_seqlen < max(17, 2 * n)
    assert Bucket.of(bucket.tokens, bucket.sequences, bucket.max_seqlen, "all") == bucket


def test_where_arithmetic_counts_a_bucket_follows_the_tokens():
    sizes = {n: Bucket.of(n, 1, n, "all").tokens for n in range(1025, graphs.MAX_TOKENS + 1)}
    assert all(tokens - n <= n / 16 for n, tokens in sizes.items())
    assert sum(tokens / n - 1 for n, tokens in sizes.items()) / len(sizes) < 0.025
    assert len(set(sizes.values())) == 32, "so many more graphs at most, of each length"


@pytest.mark.parametrize(("tokens", "sequences"), [(4096, 4096), (4097, 1), (1, 4097)])
def test_the_limit_is_of_real_tokens_and_of_sequences(tokens, sequences):
    reason = Bucket.of(tokens, sequences, 16, "all").too_large()
    assert (reason is None) == (tokens + sequences == 8192)


def test_a_batch_of_many_places_with_few_tokens_is_a_graph(model, capture, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_TOKENS", 32)
    ids, mask = batch(6, 30)
    few = (torch.arange(30, device=DEVICE) > 24).long().expand(6, 30)
    with torch.no_grad():
        for given, captured in ((mask, 0), (None, 0), (few, 1)):
            for _ in range(3):
                actual = model(ids, given)[0]
            torch.testing.assert_close(actual, plain(model)(ids, given)[0])
            assert capture.captured == captured
        monkeypatch.setattr(graphs, "MAX_PLACES", 179)
        assert (
            model.execution_state.graphs.why_not(model, 180, DEVICE)
            == "180 tokens with padding: graphs are for 1 to 179"
        )
        assert "32 tokens, or sequences: launches hide" in albert_fast.explain(model, ids[:5]).summary


@pytest.mark.parametrize("wanted_tokens", ["all", "first"])
def test_the_same_numbers_as_without_graphs(model, capture, wanted_tokens):
    exact = plain(model)
    with torch.no_grad():
        for seed, (rows, columns) in enumerate([(1, 5), (3, 17), (1, 6), (7, 9), (2, 64), (1, 1), (3, 16)]):
            ids, mask = batch(rows, columns, seed)
            for given in (None, mask, None, mask):
                types = ids % 2 if seed % 2 else None
                actual = model(ids, given, types, wanted_tokens=wanted_tokens)
                expected = exact(ids, given, types, wanted_tokens=wanted_tokens)
                torch.testing.assert_close(actual.pooler_output, expected.pooler_output)
                if wanted_tokens == "all":
                    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert 1 < capture.captured < 14, "some calls met a bucket that was there"


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_graph_serves_calls_in_every_mode(model, capture, modes):
    ids, exact = batch(2, 9)[0], plain(model)
    for mode in (*modes, *modes):
        with mode():
            torch.testing.assert_close(model(ids)[0], exact(ids)[0])
    assert capture.captured == 1


def test_sizes_within_a_bucket_are_captured_once(model, capture):
    with torch.no_grad():
        for tokens in (17, 18, 20, 24, 19):
            model(*batch(1, tokens)[:1])
    assert capture.captured == 1


def test_an_answer_is_not_overwritten_by_the_next(model):
    with torch.no_grad():
        model(batch(2, 8, 0)[0])
        first = model(batch(2, 8, 1)[0])
        kept = first.last_hidden_state.clone(), first.pooler_output.clone()
        model(batch(2, 8, 2)[0])
    assert torch.equal(first.last_hidden_state, kept[0])
    assert torch.equal(first.pooler_output, kept[1])


def test_all_graphs_leave_their_results_in_one_place(model):
    with torch.no_grad():
        for columns in (4, 40):
            for wanted_tokens in ("all", "first"):
                for _ in range(2):
                    model(batch(1, columns)[0], wanted_tokens=wanted_tokens)
    kept = [graph.result for graph in model.execution_state.graphs._graphs.values()]
    assert len(kept) == 4
    for states in ([one.hidden for one in kept], [one.pooled for one in kept]):
        assert len({one.data_ptr() for one in states}) == 1


def test_packed_calls_are_replayed_too(model, capture):
    ids, cu_seqlens = batch(1, 11)[0][0], torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=DEVICE)
    with torch.no_grad():
        model.forward_packed(ids, cu_seqlens, 7)
        actual = model.forward_packed(ids, cu_seqlens, 7)
        expected = plain(model).forward_packed(ids, cu_seqlens, 7)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output)
    assert capture.captured == 1


def test_what_cannot_be_a_graph_runs_as_ever(model, capture):
    ids, mask = batch(2, 9)
    exact = plain(model)
    with torch.no_grad():
        for options in ({"output_hidden_states": True}, {"output_attentions": True}, {"wanted_tokens": mask.bool()}):
            assert torch.equal(model(ids, **options)[0], exact(ids, **options)[0])
        embeds = model.embeddings.word_embeddings(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds)[0], exact(ids)[0])
        assert model(ids[:0]).pooler_output.shape == (0, 40)
        assert not model(ids, mask * 0).pooler_output.isnan().any()
        layer = model.encoder.distinct()[0]
        for register in (layer.register_forward_pre_hook, torch.nn.modules.module.register_module_forward_hook):
            hook = register(lambda *_: None)
            assert (
                model.execution_state.graphs.why_not(model, ids.numel(), ids.device)
                == "a part has hooks or was replaced"
            )
            hook.remove()
        for part in (layer.ffn, model.pooler):  # as accelerate hooks parts
            part.forward = part.forward
            assert (
                model.execution_state.graphs.why_not(model, ids.numel(), ids.device)
                == "a part has hooks or was replaced"
            )
            del part.forward
        hook = layer.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="warmup was called: a part has hooks"):
            model(ids)
        hook.remove()
        with torch.autocast(DEVICE.type, torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
            model(ids)
    with pytest.warns(UserWarning, match="gradients are enabled; under torch.no_grad"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each reason once, and none for what graphs are not for
        model(ids)
        model.train()(ids)
    assert capture.captured == 0


@pytest.mark.parametrize(
    ("tokens", "sequences", "longest"), [(16, 1, 16), (17, 1, 17), (80, 5, 16), (99, 9, 11), (1, 40, 1), (97, 2, 64)]
)
def test_sequences_of_one_length_fit_a_bucket(tokens, sequences, longest):
    bucket = Bucket.of(tokens, sequences, longest, "all")
    assert bucket.tokens // bucket.sequences <= bucket.max_seqlen, "a graph is captured with such"


def test_more_sequences_than_there_is_room_for_are_no_graph(model, capture, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_TOKENS", 64)
    ids = batch(1, 11)[0][0]
    with torch.no_grad():
        for empty, captured in ((60, 1), (64, 1)):
            cu_seqlens = torch.tensor([0, 4] + [11] * (empty + 1), dtype=torch.int32, device=DEVICE)
            for _ in range(3):
                actual = model.forward_packed(ids, cu_seqlens, 7).last_hidden_state
            torch.testing.assert_close(actual, plain(model).forward_packed(ids, cu_seqlens, 7).last_hidden_state)
            assert capture.captured == captured


def test_a_bound_beyond_all_tokens_takes_the_bucket_of_these(model):
    ids, cu_seqlens = batch(1, 11)[0][0], torch.tensor([0, 11], dtype=torch.int32, device=DEVICE)
    with torch.no_grad():
        for _ in range(2):
            model.forward_packed(ids, cu_seqlens, 60)
    assert [bucket.max_seqlen for bucket in model.execution_state.graphs._graphs] == [16]


def test_a_part_in_training_mode_is_no_graph(model, capture):
    ids = batch(2, 9)[0]
    for part in (model.pooler, model.encoder.distinct()[0].attention.LayerNorm):
        part.train()
        assert (
            model.execution_state.graphs.why_not(model, ids.numel(), ids.device)
            == "the model, or a part of it, is in training mode"
        )
        with torch.no_grad():
            for _ in range(3):
                model(ids)
        part.eval()
    assert capture.captured == 0


def test_a_model_that_is_elsewhere_is_no_graph(model):
    assert model.to("meta").execution_state.graphs.why_not(model, 18, DEVICE) == "the model is elsewhere"


def test_parts_that_were_replaced_are_seen(model, capture):
    ids, layer = batch(2, 9)[0], model.encoder.distinct()[0]

    def linear(old):
        return torch.nn.Linear(old.in_features, old.out_features, device=DEVICE).eval().requires_grad_(False)

    with torch.no_grad():
        for captured in (1, 2, 3):
            for _ in range(3):
                actual = model(ids)
            torch.testing.assert_close(actual.pooler_output, plain(model)(ids).pooler_output)
            assert capture.captured == captured
            if captured == 1:
                model.pooler = linear(model.pooler)
            else:
                layer.ffn = linear(layer.ffn)
        layer.ffn = type("Other", (torch.nn.Linear,), {})(40, 56, device=DEVICE).eval()
        with pytest.warns(UserWarning, match="a part has hooks or was replaced"):
            model(ids)


def test_weights_may_change_in_place_and_elsewhere(model, capture):
    ids, _ = batch(2, 9)
    with torch.no_grad():
        model(ids)
        model(ids)
        model.pooler.weight.mul_(2)
        torch.testing.assert_close(model(ids).pooler_output, plain(model)(ids).pooler_output)
        assert capture.captured == 1
        model.pooler.weight = torch.nn.Parameter(torch.randn(40, 40, device=DEVICE))
        torch.testing.assert_close(model(ids).pooler_output, plain(model)(ids).pooler_output)
    assert capture.captured == 2
    assert capture.waits == 1, "graphs are let go of when nothing runs them any more"


def test_a_graph_is_replayed_where_float32_multiplies_as_in_its_capture(model, capture):
    ids, exact = batch(2, 9)[0], plain(model)
    with torch.no_grad():
        for captured, asked in ((1, False), (2, True)):
            with tf32_asked_for(asked):
                for _ in range(3):  # without a graph, by a capture, by a replay
                    torch.testing.assert_close(model(ids)[0], exact(ids)[0])
            assert capture.captured == captured
        for asked in (False, True):
            with tf32_asked_for(asked):
                model(ids)
    assert capture.captured == 2, "both are kept"


def test_the_least_used_graphs_go_first(capture):
    model = graphed(capture, limit=2)
    with torch.no_grad():
        for columns in (4, 4, 20, 20, 4, 40, 40, 4):
            model(batch(1, columns)[0])
        assert capture.captured == 3
        assert len(model.execution_state.graphs) == 2
        model(batch(1, 20)[0])
        assert capture.captured == 3, "what is gone is captured where it is met twice once more"
        model(batch(1, 20)[0])
    assert capture.captured == 4


def test_calls_of_several_threads_take_turns(model):
    exact = plain(model)

    def work(seed):
        for i in range(10):
            ids, mask = batch(1 + i % 3, 5 + seed, 100 * seed + i)
            with torch.no_grad():
                torch.testing.assert_close(model(ids, mask)[0], exact(ids, mask)[0])

    assert in_threads(*(partial(work, seed) for seed in range(4))) == []


def test_graphs_may_be_turned_off_while_others_call(model):
    ids, start = batch(2, 9)[0], threading.Barrier(3)
    with torch.no_grad():
        expected = plain(model)(ids)[0]

    def work():
        start.wait()
        for _ in range(20):
            with torch.no_grad():
                torch.testing.assert_close(model(ids)[0], expected)

    def turn_off():
        start.wait()
        model.execution.cuda_graphs = False

    assert in_threads(work, work, turn_off) == []
    assert not model.execution.cuda_graphs


def test_a_head_runs_on_graphs_and_copies_have_none(capture):
    model, (ids, mask) = graphed(capture, ALBERTForSequenceClassification), batch(3, 7)
    with torch.no_grad():
        expected = plain(model)(ids, mask).logits
        model(ids, mask)
        torch.testing.assert_close(model(ids, mask).logits, expected)
    assert capture.captured == 1
    assert len(copy.deepcopy(model).albert.execution_state.graphs) == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert len(torch.load(buffer, weights_only=False).albert.execution_state.graphs) == 0


def test_warmup_on_a_cpu_changes_nothing():
    model = ALBERTModel(CONFIG)
    ids, mask = (tensor.cpu() for tensor in batch(2, 9))
    with torch.no_grad():
        expected = model.eval()(ids, mask).last_hidden_state
        model.train()
        model.execution.warmup([(1, 8), (2, 9)])
        assert model.training
        assert torch.equal(model.eval()(ids, mask).last_hidden_state, expected)
    assert "captured on cuda" in model.execution_state.graphs.why_not(model, 8, ids.device)


def test_warmup_captures_what_it_is_told(capture):
    for kind, captured in ((ALBERTForSequenceClassification, 1), (albert_fast.ALBERTForMultipleChoice, 2)):
        model = graphed(capture, kind)
        model.execution.warmup([(6, 7), (6, 8)])
        assert capture.captured == captured, "both batches are of one bucket"
    ids, model = batch(6, 8)[0], model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids.view(2, 3, 8)).logits, plain(model)(ids.view(2, 3, 8)).logits)
    assert capture.captured == 2


def test_a_bad_id_is_named_at_its_place(model):
    ids, _ = batch(2, 9)
    ids[1, 3] = 61
    with torch.no_grad(), pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 61"):
        model(ids)


def test_rounded_weights_that_are_elsewhere_are_captured_anew(model, capture):
    quantize(model, "int8")
    ids, ffn = batch(2, 9)[0], model.encoder.distinct()[0].ffn
    with torch.no_grad():
        for captured in (1, 2):
            for _ in range(3):
                found = model(ids).last_hidden_state
            assert capture.captured == captured
            torch.testing.assert_close(found, plain(model)(ids).last_hidden_state)
            ffn.integers = ffn.integers.flip(0)  # other weights, in other memory


def test_a_converted_model_captures_anew(model, capture):
    ids = batch(2, 9)[0]
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.float32):
            model.to(dtype)
            for _ in range(3):
                assert model(ids)[0].dtype == dtype
    assert capture.captured == 3
    assert capture.waits == 2
