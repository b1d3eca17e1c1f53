"""The buckets, the static tensors and the order of replays, with a stand-in for the GPU: it captures by remembering what to run."""

import copy
import gc
import io
import sys
import threading
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from albert_fast import (
    ALBERTConfig,
    ALBERTForMultipleChoice,
    ALBERTForSequenceClassification,
    ALBERTModel,
    explain,
    graphs,
)
from albert_fast.graphs import Bucket, CaptureError, CUDACapture, GraphCache
from albert_fast.testing import poison_empty

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the kernel that graphs read from can run

CONFIG = ALBERTConfig(
    vocab_size=61, embedding_size=12, hidden_size=40, num_attention_heads=4, intermediate_size=56, num_hidden_layers=3,
    max_position_embeddings=64,
)  # fmt: skip


class Remembered:
    """A "graph" on the CPU: every replay runs the captured function again and writes where the capture's results stand."""

    def __init__(self, run):
        self._run, self.result = run, run()

    def replay(self, describe):
        assert callable(describe)
        with _disable_current_modes():  # the graph is one launch, whatever stands in for it
            new = self._run()
            self.result.hidden.copy_(new.hidden)
            if new.pooled is not None:
                self.result.pooled.copy_(new.pooled)


class Capture:
    device_type = DEVICE.type

    def __init__(self):
        self.captured, self.inside, self.waits = 0, 0, 0

    def why_not(self, model):
        return None

    def begin(self, device):
        self.inside += 1
        assert self.inside == 1, "replays of one model never overlap"

    def end(self, device):
        self.inside -= 1

    def wait(self):
        self.waits += 1

    def forget(self):
        assert self.waits > 0

    def __call__(self, run, device):
        self.captured += 1
        return Remembered(run)


@pytest.fixture
def capture(monkeypatch):
    # On a CPU operators insist that sequences hold all tokens, which on a GPU they cannot see without waiting for it.
    monkeypatch.setattr(sys.modules["albert_fast.ops.attention"], "check_ranges", lambda *_: None)
    return Capture()


@pytest.fixture
def model(capture):
    made = (
        ALBERTModel(CONFIG, backend="reference").eval().to(DEVICE)
    )  # which, like the GPU's, takes rows that are in no sequence
    made._graphs = GraphCache(capture)
    return made


def plain(model):
    other = copy.deepcopy(model)
    other.base._graphs = None
    return other


def batch(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (rows, columns), generator=generator)
    return ids.to(DEVICE), (torch.rand(rows, columns, generator=generator) < 0.7).long().to(DEVICE)


@pytest.fixture(autouse=True)
def _say_again():
    graphs._say.cache_clear()


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 24, 25, 32, 33, 48, 49, 1000, 16384])
def test_a_bucket_holds_its_call_and_little_more(n):
    bucket = Bucket.of(n, n, n, "all")
    assert n <= bucket.tokens <= max(16, 1.5 * n)
    assert n <= bucket.sequences <= max(2, 1.5 * n)
    assert n <= bucket.max_seqlen <= max(16, 2 * n)
    assert Bucket.of(bucket.tokens, bucket.sequences, bucket.max_seqlen, "all") == bucket


@pytest.mark.parametrize("output_tokens", ["all", "first"])
def test_the_same_numbers_as_without_graphs(model, capture, output_tokens):
    exact = plain(model)
    with torch.no_grad():
        for seed, (rows, columns) in enumerate([(1, 5), (3, 17), (1, 6), (7, 9), (2, 64), (1, 1), (3, 16)]):
            ids, mask = batch(rows, columns, seed)
            for given in (None, mask, None, mask):
                types = ids % 2 if seed % 2 else None
                actual = model(ids, given, types, output_tokens=output_tokens)
                expected = exact(ids, given, types, output_tokens=output_tokens)
                torch.testing.assert_close(actual.pooler_output, expected.pooler_output)
                if output_tokens == "all":
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
    hook = None
    with torch.no_grad():
        for options in ({"output_hidden_states": True}, {"output_attentions": True}, {"output_tokens": mask.bool()}):
            assert torch.equal(model(ids, **options)[0], exact(ids, **options)[0])
        embeds = model.embeddings.word_embeddings(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds)[0], exact(ids)[0])
        assert model(ids[:0]).pooler_output.shape == (0, 40)
        assert not model(ids, mask * 0).pooler_output.isnan().any()
        hook = model.encoder.distinct()[0].register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="warmup was called: a part has hooks"):
            model(ids)
        hook.remove()
        with torch.autocast(DEVICE.type, torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
            model(ids)
    with pytest.warns(UserWarning, match="a gradient may be asked for"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each reason once, and none for what graphs are not for
        model(ids)
        model.train()(ids)
    assert capture.captured == 0


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


def test_the_least_used_graphs_go_first(capture):
    model = ALBERTModel(CONFIG, backend="reference").eval().to(DEVICE)
    model._graphs = GraphCache(capture, limit=2)
    with torch.no_grad():
        for columns in (4, 4, 20, 20, 4, 40, 40, 4):
            model(batch(1, columns)[0])
        assert capture.captured == 3
        assert len(model._graphs) == 2
        model(batch(1, 20)[0])
    assert capture.captured == 4


def test_calls_of_several_threads_take_turns(model):
    exact, failures = plain(model), []

    def work(seed):
        try:
            for i in range(10):
                ids, mask = batch(1 + i % 3, 5 + seed, 100 * seed + i)
                with torch.no_grad():
                    torch.testing.assert_close(model(ids, mask)[0], exact(ids, mask)[0])
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_head_runs_on_graphs_and_copies_have_none(capture):
    model = ALBERTForSequenceClassification(CONFIG, backend="reference").eval().to(DEVICE)
    ids, mask = batch(3, 7)
    with torch.no_grad():
        expected = model(ids, mask).logits
        model.albert._graphs = GraphCache(capture)
        model(ids, mask)
        torch.testing.assert_close(model(ids, mask).logits, expected)
    assert capture.captured == 1
    assert len(copy.deepcopy(model).albert._graphs) == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert len(torch.load(buffer, weights_only=False).albert._graphs) == 0


def test_warmup_on_a_cpu_changes_nothing():
    model = ALBERTModel(CONFIG)
    ids, mask = (tensor.cpu() for tensor in batch(2, 9))
    with torch.no_grad():
        expected = model.eval()(ids, mask).last_hidden_state
        model.train()
        model.warmup([(1, 8), (2, 9)])
        assert model.training
        assert torch.equal(model.eval()(ids, mask).last_hidden_state, expected)
    assert "captured on cuda" in model._graphs.why_not(model, 8, ids.device)


def test_warmup_captures_what_it_is_told(capture):
    for kind, captured in ((ALBERTForSequenceClassification, 1), (ALBERTForMultipleChoice, 2)):
        model = kind(CONFIG, backend="reference").to(DEVICE)
        model.albert._graphs = GraphCache(capture)
        model.warmup([(6, 7), (6, 8)])
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


class Counted(TorchDispatchMode):
    """Notes what torch is asked for, views of memory aside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("output_tokens", "masked", "expected"),
    [
        ("all", "no", ["empty", "graph_inputs", "clone", "clone"]),
        ("first", "no", ["empty", "graph_inputs", "clone", "new_empty"]),
        ("all", "all", ["count_nonzero", "empty", "graph_inputs", "clone", "clone"]),
        (
            "all",
            "some",
            ["count_nonzero", "empty", "empty", "graph_inputs", "clone", "clone", "new_full", "index_copy"],
        ),
    ],
)
def test_a_replay_asks_torch_for_little(model, monkeypatch, output_tokens, masked, expected):
    from albert_fast.kernels import _graph_inputs

    ids, mask = batch(2, 9)
    given = {"no": None, "all": torch.ones_like(mask), "some": mask}[masked]
    launch, counted = _graph_inputs.graph_inputs, Counted()

    def one_launch(*arguments):
        counted.calls.append("graph_inputs")
        with _disable_current_modes():
            launch(*arguments)

    monkeypatch.setattr(_graph_inputs, "graph_inputs", one_launch)
    with torch.no_grad():
        for _ in range(2):
            model(ids, given, output_tokens=output_tokens)
        counted.calls.clear()
        with counted:
            model(ids, given, output_tokens=output_tokens)
    calls = [
        name for name in counted.calls if name not in ("_local_scalar_dense", "_to_copy")
    ]  # what `tolist` asks for
    assert calls == expected


def test_short_sequences_in_a_wide_batch_take_a_narrow_bucket(model, capture):
    ids, _ = batch(3, 60)
    mask = torch.zeros_like(ids)
    mask[:, -9:] = 1
    with torch.no_grad():
        for _ in range(2):
            model(ids, mask)
        (bucket,) = model._graphs._graphs
        assert (bucket.tokens, bucket.sequences, bucket.max_seqlen) == (32, 3, 16)
        torch.testing.assert_close(model(ids, mask)[0], plain(model)(ids, mask)[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8], ids=str)
def test_integers_and_masks_of_other_types_and_strides(model, dtype):
    ids, mask = batch(7, 3)
    ids, types, positions = ids.t().to(dtype), ids.t() % 2, torch.arange(7, device=DEVICE).flip(0)[None].to(dtype)
    with torch.no_grad():
        expected = plain(model)(ids.contiguous(), mask.t(), types, positions).last_hidden_state
        for given in (mask.t(), mask.t().bool(), mask.t().float(), mask.t().to(dtype)):
            for _ in range(2):
                with poison_empty():
                    actual = model(ids, given, types, positions).last_hidden_state
                torch.testing.assert_close(actual, expected)
    assert len(model._graphs) == 1


def test_wrong_arguments_are_told_as_without_graphs(model):
    ids, mask = batch(2, 9)
    wrong = [((ids.float(),), {}), ((ids, mask[:1]), {}), ((ids, -mask.float()), {}), ((ids, mask, ids[:1]), {}),
             ((ids, mask), {"position_ids": ids[:, :3]}), ((ids,), {"output_tokens": "none"})]  # fmt: skip
    exact = plain(model)
    with torch.no_grad():
        for arguments, options in wrong:
            told = []
            for one in (model, model, exact):
                with pytest.raises((TypeError, ValueError)) as error:
                    one(*arguments, **options)
                told.append((type(error.value), str(error.value)))
            assert told[0] == told[1] == told[2]


def test_the_switch_turns_graphs_off_and_on(capture):
    model = ALBERTForSequenceClassification(CONFIG, backend="reference").eval().to(DEVICE)
    assert not model.cuda_graphs
    model.albert._graphs = GraphCache(capture)
    ids, _ = batch(3, 7)
    with torch.no_grad():
        model.warmup([(3, 7)])
        assert model.cuda_graphs
        assert model.albert.cuda_graphs
        expected = model(ids).logits
        kept = model.albert._graphs
        model.cuda_graphs = False
        assert (len(kept), kept._inputs, capture.waits) == (0, None, 1)
        torch.testing.assert_close(model(ids).logits, expected)
        assert capture.captured == 1
        assert not model.albert.cuda_graphs
        model.albert.cuda_graphs = True
        assert model.cuda_graphs
        assert model.albert._graphs is not kept


def test_explain_says_what_becomes_of_a_call(model, monkeypatch):
    ids, mask = batch(2, 9)
    bucket = "a CUDA graph for 24 tokens in 2 sequence(s) of at most 16"

    def said(*arguments):
        return explain(model, *arguments).summary.rpartition("; ")[2]

    assert "torch.no_grad() says that it is not" in explain(model, ids).summary
    with torch.no_grad():
        assert said(ids) == f"captured by the call after this one: {bucket}"
        model(ids)
        assert said(ids) == f"captured by this call: {bucket}"
        model(ids)
        assert said(ids) == f"a replay of the CUDA graph for {bucket.removeprefix('a CUDA graph for ')}"
        assert said(ids, mask).startswith("captured by the call after this one: ")
        assert said(ids, mask * 0) == "no CUDA graph: 0 tokens with padding: graphs are for 1 to 16384"
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert said(ids) == "no CUDA graph: autocast is on"
    model.cuda_graphs = False
    assert "CUDA graph" not in explain(model, ids).summary


def test_what_cannot_be_captured_runs_operator_by_operator_and_says_so(model, monkeypatch):
    ids, other = batch(2, 9)[0], batch(1, 50)[0]
    whole = Capture.__call__

    def fails_once(self, run, device):
        monkeypatch.setattr(Capture, "__call__", whole)
        raise CaptureError("a stream was asked")

    monkeypatch.setattr(Capture, "__call__", fails_once)
    with torch.no_grad():
        model(ids)
        with pytest.warns(UserWarning, match="the capture failed: a stream was asked"):
            model(ids)
        torch.testing.assert_close(model(ids)[0], plain(model)(ids)[0])
        assert explain(model, ids).summary.endswith("; no CUDA graph: the capture failed: a stream was asked")
        assert len(model._graphs) == 0
        for _ in range(2):
            model(other)
    assert len(model._graphs) == 1


@pytest.mark.filterwarnings("ignore:albert_fast")  # of the operator that falls back
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float32), ("auto", torch.float64)])
def test_a_model_without_kernels_is_not_captured(backend, dtype):
    model = ALBERTModel(CONFIG, backend=backend).to(dtype)
    assert "runs on backend 'reference', which waits for the GPU" in CUDACapture().why_not(model)


def test_a_deleted_model_is_freed_at_once_and_waited_for(capture):
    model = ALBERTModel(CONFIG, backend="reference").eval().to(DEVICE)
    model._graphs = GraphCache(capture)
    ids = batch(2, 9)[0]
    with torch.no_grad():
        model(ids)  # not captured yet: what the stand-in remembers holds the model
    gone, running = weakref.ref(model), capture.waits
    gc.disable()
    try:
        del model
        assert gone() is None, "a circle of references keeps the weights until garbage is collected"
        assert capture.waits == running + 1
    finally:
        gc.enable()


def test_a_converted_model_captures_anew(model, capture):
    ids = batch(2, 9)[0]
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.float32):
            model.to(dtype)
            for _ in range(3):
                assert model(ids)[0].dtype == dtype
    assert capture.captured == 3
    assert capture.waits == 2


def test_graphs_may_be_turned_off_while_others_call(model):
    ids, failures, start = batch(2, 9)[0], [], threading.Barrier(3)
    expected = plain(model)(ids)[0].detach()

    def work():
        start.wait()
        try:
            for _ in range(10):
                with torch.no_grad():
                    torch.testing.assert_close(model(ids)[0], expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    start.wait()
    for _ in range(5):
        model.cuda_graphs = False
        model._graphs = GraphCache(Capture())
    for thread in threads:
        thread.join()
    assert failures == []
