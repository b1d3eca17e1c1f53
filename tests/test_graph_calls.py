"""Tests calls around CUDA graphs: launches per call, what explain and warnings say when no graph is used, the switch, and failed
captures."""

import contextlib
import gc
import itertools
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from albert_fast import ALBERTForSequenceClassification, ALBERTModel, explain, ops
from albert_fast.execution import capture as capture_module
from albert_fast.execution import graphs
from albert_fast.execution.capture import CaptureError, CUDACapture
from albert_fast.ops import _reports
from albert_fast.testing import poison_empty
from albert_fast.testing.gpu.fake_graphs import CONFIG, DEVICE, Capture, batch, graphed, plain

pytest.importorskip("triton")


@pytest.fixture
def capture(monkeypatch):
    # On a CPU operators insist that sequences hold all tokens, which on a GPU they cannot see without waiting for it.
    monkeypatch.setattr(sys.modules["albert_fast.ops.attention"], "check_ranges", lambda *_: None)
    return Capture()


@pytest.fixture
def model(capture):
    return graphed(capture)


@pytest.fixture(autouse=True)
def _say_again():
    graphs._say.cache_clear()


class Counted(TorchDispatchMode):
    """Notes what torch is asked for, views of memory aside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Beside the graph and the copy of its report.
DENSE = ["empty", "graph_inputs", "clone"]
MASKED = ["count_nonzero", "empty", "empty", "graph_inputs", "clone", "clone", "new_full", "index_copy_"]
CALLS = [("all", "no", [*DENSE, "clone"]), ("first", "no", [*DENSE, "new_empty"]),
         ("all", "all", ["count_nonzero", *DENSE, "clone"]), ("all", "some", MASKED)]  # fmt: skip


@pytest.mark.parametrize(("wanted_tokens", "masked", "expected"), CALLS)
def test_a_replay_asks_torch_for_little(model, monkeypatch, wanted_tokens, masked, expected):
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
            model(ids, given, wanted_tokens=wanted_tokens)
        counted.calls.clear()
        with counted:
            model(ids, given, wanted_tokens=wanted_tokens)
    waiting = ("_local_scalar_dense", "_to_copy")  # what `tolist` asks for
    calls = [name for name in counted.calls if name not in waiting]
    assert calls == expected


def test_short_sequences_in_a_wide_batch_take_a_narrow_bucket(model, capture):
    ids, _ = batch(3, 60)
    mask = torch.zeros_like(ids)
    mask[:, -9:] = 1
    with torch.no_grad():
        for _ in range(2):
            model(ids, mask)
        (bucket,) = model.execution_state.graphs._graphs
        assert (bucket.tokens, bucket.sequences, bucket.max_seqlen) == (32, 4, 16)
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
    assert len(model.execution_state.graphs) == 1


def test_wrong_arguments_are_told_as_without_graphs(model):
    ids, mask = batch(2, 9)
    wrong = [((ids.float(),), {}), ((ids, mask[:, :4]), {}), ((ids, -mask.float()), {}), ((ids, mask, ids[:, :4]), {}),
             ((ids, mask), {"position_ids": ids[:, :3]}), ((ids,), {"wanted_tokens": "none"}),
             ((ids, None, ids.to("meta")), {})]  # fmt: skip
    exact = plain(model)
    with torch.no_grad():
        for arguments, options in wrong:
            told = []
            for one in (model, model, exact):
                with pytest.raises((TypeError, ValueError)) as error:
                    one(*arguments, **options)
                told.append((type(error.value), str(error.value)))
            assert told[0] == told[1] == told[2]


def test_a_replay_takes_one_row_for_all_rows(model):
    ids, _ = batch(3, 9)
    row, types = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        expected = plain(model)(ids, row.repeat(3, 1), types.repeat(3, 1)).last_hidden_state
        for _ in range(3):
            torch.testing.assert_close(model(ids, row, types).last_hidden_state, expected)
    assert len(model.execution_state.graphs) == 1


def test_the_switch_turns_graphs_off_and_on(capture):
    model, (ids, _) = graphed(capture, ALBERTForSequenceClassification), batch(3, 7)
    assert not plain(model).execution.cuda_graphs
    with torch.no_grad():
        model.execution.warmup([(3, 7)])
        assert model.execution.cuda_graphs
        assert model.albert.execution.cuda_graphs
        expected = model(ids).logits
        kept = model.albert.execution_state.graphs
        model.execution.cuda_graphs = False
        assert (len(kept), kept._inputs, capture.waits) == (0, None, 1)
        torch.testing.assert_close(model(ids).logits, expected)
        assert capture.captured == 1
        assert not model.albert.execution.cuda_graphs
        model.albert.execution.cuda_graphs = True
        assert model.execution.cuda_graphs
        assert model.albert.execution_state.graphs is not kept


def test_explain_says_what_becomes_of_a_call(model, monkeypatch):
    ids, mask = batch(2, 9)
    bucket = "a CUDA graph for 24 tokens in 2 sequence(s) of at most 16"

    def said(*arguments):
        return explain(model, *arguments).summary.rpartition("; ")[2]

    assert "under torch.no_grad() calls replay graphs" in explain(model, ids).summary
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
    model.execution.cuda_graphs = False
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
        assert len(model.execution_state.graphs) == 0
        for _ in range(2):
            model(other)
        assert len(model.execution_state.graphs) == 1
        model.pooler.weight.data = model.pooler.weight.data.clone()
        model(ids)  # with weights that are elsewhere it is tried again
        model(ids)
        assert "a replay of the CUDA graph" in explain(model, ids).summary


@pytest.mark.filterwarnings("ignore:albert_fast")  # of the operator that falls back
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float32), ("auto", torch.float64)])
def test_a_model_without_kernels_is_not_captured(backend, dtype):
    model = ALBERTModel(CONFIG, backend=backend).to(dtype)
    assert "runs on backend 'reference', which waits for the GPU" in CUDACapture().why_not(model)


def test_a_deleted_model_is_freed_at_once_and_waited_for(capture):
    model = graphed(capture)
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


class FakeStream:
    cuda_stream = 7

    def __init__(self, log):
        self._log = log

    def wait_event(self, event):
        self._log.append("wait_event")


@pytest.fixture
def cuda_log(monkeypatch):
    """What CUDACapture asks torch.cuda for, in order, with nothing behind it."""
    log = []
    main, current, pools, streams = FakeStream(log), [], itertools.count(), itertools.count()

    class Event:
        def record(self, stream):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def stream(entered):
        current.append(entered)
        try:
            yield
        finally:
            current.pop()

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        log.append(f"capture into {pool} on {stream}, {capture_error_mode}")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        try:
            yield
        finally:
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    fakes = {
        "Event": Event, "CUDAGraph": Graph, "stream": stream, "graph": graph,
        "current_stream": lambda _device=None: current[-1] if current else main, "device": contextlib.nullcontext,
        "graph_pool_handle": lambda: f"pool {next(pools)}",
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(capture_module, "_own_stream", lambda _device: f"stream {next(streams)}")
    monkeypatch.setattr(CUDACapture, "device_type", "cpu")
    monkeypatch.setattr(CUDACapture, "why_not", lambda *_: None)
    return log


CAPTURED = ["capture into pool 0 on stream 0, thread_local"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/test_gpu_graphs.py has the real one")
def test_what_a_capture_and_a_replay_ask_a_gpu_for(capture, cuda_log):
    model, ids = graphed(None), batch(2, 9)[0]
    with torch.no_grad():
        model(ids)
        assert cuda_log == []
        model(ids)
        assert cuda_log == [*CAPTURED, "replay", "record"]
        cuda_log.clear()
        model(ids)
        assert cuda_log == ["wait_event", "replay", "record"]
        cuda_log.clear()
        model(batch(1, 60)[0])
        model(batch(1, 60)[0])
        assert cuda_log == ["wait_event", *CAPTURED, "replay", "record"], "into the same pool"
    cuda_log.clear()
    model.execution.cuda_graphs = False
    assert cuda_log == ["synchronize"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/test_gpu_graphs.py has the real one")
def test_a_replay_is_not_started_before_an_earlier_call_s_error_is_raised(capture, cuda_log, monkeypatch):
    class Arrived:
        def query(self):
            return True

    model, ids, queue = graphed(None), batch(2, 9)[0], _reports.Queue()
    monkeypatch.setattr(_reports, "_QUEUE", queue)
    with torch.no_grad():
        for _ in range(2):
            model(ids)
        cuda_log.clear()
        queue.add(DEVICE, _reports.Pending(_reports.Slot(Arrived(), torch.tensor(3)), IndexError, 0))
        with pytest.raises(IndexError, match="3"):
            model(ids)
        assert cuda_log == []
        model(ids)
    assert cuda_log == ["wait_event", "replay", "record"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/test_gpu_graphs.py has the real one")
def test_a_capture_that_fails_leaves_its_pool(capture, cuda_log, monkeypatch):
    model, ids = graphed(None), batch(2, 9)[0]
    whole = ALBERTModel.compute

    def waits(self, *arguments):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return whole(self, *arguments)

    monkeypatch.setattr(ALBERTModel, "compute", waits)
    with torch.no_grad():
        model(ids)
        with pytest.warns(UserWarning, match="the capture failed: operation not permitted when stream is capturing$"):
            model(ids)
        assert cuda_log == [*CAPTURED, "record"]
        monkeypatch.setattr(ALBERTModel, "compute", whole)
        for _ in range(2):
            model(batch(1, 60)[0])
    assert "capture into pool 1 on stream 1, thread_local" in cuda_log, (
        "what a workspace of the old pool is kept for is not met"
    )
    assert ops.CAPTURE.acquire(blocking=False), "the lock is given back"
    ops.CAPTURE.release()


@pytest.mark.parametrize("error", [0, 2])
def test_captures_have_a_stream_that_torch_gives_nobody_else(monkeypatch, error):
    asked = []

    class Driver:
        def cuStreamCreate(self, stream, flags):
            asked.append(flags)
            stream._obj.value = 2**40 + 8
            return error

    monkeypatch.setattr(capture_module.ctypes, "CDLL", {"libcuda.so.1": Driver()}.__getitem__)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: (address, device))
    if error:
        with pytest.raises(CaptureError, match="cuStreamCreate returned 2"):
            capture_module._own_stream(DEVICE)
    else:
        assert capture_module._own_stream(DEVICE) == (2**40 + 8, DEVICE)
    assert asked == [1], "it does not wait for the default stream, nor that for it"
