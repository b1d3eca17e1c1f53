"""CUDA graphs of the encoder give the numbers of eager calls on a GPU, whatever streams, threads and weights do meanwhile."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

import albert_fast
from albert_fast import ALBERTConfig, ALBERTForSequenceClassification, ALBERTModel
from albert_fast.testing import poison_empty
from albert_fast.testing.gpu.fake_graphs import in_threads
from albert_fast.testing.model_pairs import drawn_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICE = torch.device("cuda", 0)
ROWS, COLUMNS = 4, 37
CONFIG = ALBERTConfig(
    vocab_size=301,
    embedding_size=64,
    hidden_size=192,
    num_attention_heads=3,
    intermediate_size=384,
    num_hidden_layers=3,
    max_position_embeddings=64,
)


def encoder(kind=ALBERTModel, dtype=torch.float32):
    """A model on the GPU whose outputs differ from token to token, and a batch of random lengths."""
    model = kind(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    ids = torch.randint(301, (ROWS, COLUMNS), device=DEVICE)
    return model.to(DEVICE, dtype), ids, drawn_mask("right", ROWS, COLUMNS, seed=2).to(DEVICE)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes", "empty row"])
@pytest.mark.parametrize("wanted_tokens", ["all", "first"])
def test_replayed_graphs_give_what_eager_gives(kind, wanted_tokens):
    fast = encoder()[0]
    graphed = copy.deepcopy(fast)
    graphed.execution.warmup([(ROWS, COLUMNS)])
    assert len(graphed.execution_state.graphs) == 1
    for seed in range(6):
        ids = torch.randint(301, (ROWS, COLUMNS - seed), device=DEVICE)
        mask = drawn_mask(kind, ROWS, COLUMNS - seed, seed)
        mask = None if mask is None else mask.to(DEVICE)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode(), poison_empty():
                actual = graphed(ids, mask, wanted_tokens=wanted_tokens)
                expected = fast(ids, mask, wanted_tokens=wanted_tokens)
            for name in ("last_hidden_state", "pooler_output"):
                a, e = getattr(actual, name), getattr(expected, name)
                if e is not None:
                    assert_same(a, e)


def test_graphs_on_two_streams_and_in_two_threads():
    fast, ids, mask = encoder()
    batches = [(ids, mask), (ids.flip(0).contiguous(), mask.flip(0).contiguous())]
    with torch.no_grad():
        expected = [fast(*batch).last_hidden_state for batch in batches]
    graphed = [copy.deepcopy(fast) for _ in range(2)]
    for model in graphed:
        model.execution.warmup()

    def run(model):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                assert_same(model(*batches[i % 2]).last_hidden_state, expected[i % 2])

    torch.cuda.synchronize()
    # Two models, and each of them from two threads at once.
    assert in_threads(*(partial(run, model) for model in (*graphed, *graphed))) == []


def test_a_bad_id_of_a_replay_is_named_once_at_its_place():
    fast, ids, mask = encoder()
    fast.execution.warmup([(ROWS, COLUMNS)])
    wrong, left = ids.clone(), mask.flip(1).contiguous()
    wrong[1, COLUMNS - 1] = 301
    with torch.no_grad():
        for _ in range(2):  # before its bucket is captured, and after
            fast(wrong, left)
            with pytest.raises(IndexError, match=rf"input_ids\[1, {COLUMNS - 1}\] is 301"):
                albert_fast.synchronize()
            albert_fast.synchronize()
            fast(ids, left)


def test_a_replay_on_another_stream_outlives_its_model():
    plain, ids, _ = encoder()
    graphed, stream = copy.deepcopy(plain), torch.cuda.Stream()
    graphed.execution.warmup([(ROWS, COLUMNS)])
    with torch.no_grad():
        expected = plain(ids).last_hidden_state
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # the replays have not run yet when their graph is released
            results = [graphed(ids).last_hidden_state for _ in range(3)]
        del graphed
        gc.collect()
        junk = [torch.full((2**20,), float("nan"), device=DEVICE) for _ in range(16)]
        torch.cuda.synchronize()
    assert len(junk) == 16
    for result in results:
        assert_same(result, expected)


def test_graphs_follow_what_becomes_of_the_weights():
    plain, ids, mask = encoder(ALBERTForSequenceClassification)
    graphed = copy.deepcopy(plain)
    graphed.execution.warmup([(ROWS, COLUMNS)])

    def check(captures, model=graphed):
        tolerance = 1e-4 if plain.classifier.weight.dtype == torch.float32 else 0.1
        with torch.no_grad():
            for _ in range(2):
                actual, expected = (one(ids, mask).logits for one in (model, plain))
                torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        assert len(model.albert.execution_state.graphs) == captures

    def train():
        for model in (plain, graphed):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.train()
            torch.manual_seed(1)  # of the classifier's dropout
            model(ids, mask, labels=torch.arange(ROWS, device=DEVICE) % 2).loss.backward()
            optimizer.step()
            model.eval()

    check(2)  # the masked batch has fewer tokens, and a bucket of its own
    train()
    check(2)
    weight = torch.nn.Parameter(torch.randn_like(plain.albert.pooler.weight))
    plain.albert.pooler.weight = graphed.albert.pooler.weight = weight
    check(1)
    for dtype in (torch.bfloat16, torch.float32):
        plain.to(dtype)
        graphed.to(dtype)
        check(1)
    graphed.cpu()
    graphed.to(DEVICE)
    check(1)
    copied = copy.deepcopy(graphed)
    assert copied.execution.cuda_graphs
    assert len(copied.albert.execution_state.graphs) == 0
    check(1, copied)


def test_models_capture_in_several_threads_while_others_wait_for_the_device():
    plain, ids, _ = encoder()
    made = [copy.deepcopy(plain) for _ in range(3)]
    done = threading.Event()

    def capture(model):
        for columns in (3, 9, 17, 30, 37):
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                model.execution.warmup([(ROWS, columns)])
                assert_same(model(ids[:, :columns])[0], plain(ids[:, :columns])[0])

    def wait():
        while not done.wait(1e-3):
            albert_fast.synchronize()

    waiting = threading.Thread(target=wait)
    torch.cuda.synchronize()
    waiting.start()
    try:
        assert in_threads(*(partial(capture, model) for model in made)) == []
    finally:
        done.set()
        waiting.join()
    assert [len(model.execution_state.graphs) for model in made] == [5, 5, 5]


def allocated():
    """Bytes in use, without what libraries keep and what pending reports hold."""
    albert_fast.synchronize()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_turned_off_graphs_give_their_memory_back():
    fast = encoder()[0]
    before = allocated()
    fast.execution.warmup([(64, 64)])
    held = allocated() - before
    assert held > 64 * 64 * CONFIG.hidden_size * 4
    fast.execution.cuda_graphs = False
    assert allocated() - before < held / 2, "a library may have kept something"


# In a process of its own: after a failed capture, torch's random generator stays in the state of the capture.
FAILING_CAPTURE = """
import warnings, torch
from albert_fast import ALBERTConfig, ALBERTModel, explain
model = ALBERTModel(ALBERTConfig(vocab_size=50, embedding_size=64, hidden_size=64, num_attention_heads=2,
                                 intermediate_size=128, num_hidden_layers=2)).eval().cuda()
ids, whole, stream = torch.arange(40, device="cuda").view(2, 20), ALBERTModel.compute, torch.cuda.current_stream()

def waits(self, *arguments):
    encoded = whole(self, *arguments)
    if torch.cuda.is_current_stream_capturing():
        encoded.hidden.sum().item()
    return encoded

with torch.no_grad():
    expected = model(ids)[0]
    ALBERTModel.compute = waits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.execution.warmup([(2, 20)])
    assert any("the capture failed" in str(warning.message) for warning in said), said
    assert torch.cuda.current_stream() == stream
    assert "no CUDA graph: the capture failed" in explain(model, ids).summary
    ALBERTModel.compute = whole
    torch.testing.assert_close(model(ids)[0], expected)
    answers = [model(ids[:, :7])[0] for _ in range(3)]
    torch.testing.assert_close(answers[2], answers[0])
    assert len(model.execution_state.graphs) == 1
"""


def test_a_failed_capture_leaves_everything_usable():
    done = subprocess.run([sys.executable, "-c", FAILING_CAPTURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_caller_s_own_graph_holds_the_model_and_stays_in_bounds():
    fast, ids, _ = encoder()
    fast.execution.warmup([(ROWS, COLUMNS)])
    graph, given = torch.cuda.CUDAGraph(), ids.clone()
    with torch.no_grad():
        expected = fast(ids).last_hidden_state
        with torch.cuda.graph(graph):
            result = fast(given).last_hidden_state
        graph.replay()
        assert_same(result, expected)
        given[1, 2] = 10**9
        graph.replay()
        albert_fast.synchronize()  # raises nothing
        given.copy_(ids)
        graph.replay()
        assert_same(result, expected)
    assert len(fast.execution_state.graphs) == 1


def test_a_caller_s_own_graph_outlives_our_captures():
    fast, ids, _ = encoder()
    # Few columns and a long sum: cuBLAS splits it into parts that it adds in its workspace.
    a, b = torch.randn(64, 8192, device=DEVICE) / 90, torch.randn(8192, 64, device=DEVICE)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        expected = a @ b
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        result = a @ b
    fast.execution.warmup([(ROWS, COLUMNS)])
    # This allocation would reuse the workspace, had it been freed.
    junk = [torch.full((2**18,), 7.0, device=DEVICE) for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    assert_same(result, expected)
    assert all(bool((part == 7.0).all()) for part in junk)
    with torch.no_grad():
        assert_same(fast(ids).last_hidden_state, copy.deepcopy(fast)(ids).last_hidden_state)


def test_packed_lengths_on_the_cpu_are_not_waited_for():
    fast, ids, _ = encoder()
    lengths = torch.tensor([0, 5, COLUMNS], dtype=torch.int32)
    with torch.no_grad():
        expected = fast.forward_packed(ids[0], lengths.to(DEVICE), COLUMNS).last_hidden_state
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = fast.forward_packed(ids[0], lengths, COLUMNS).last_hidden_state
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected)
