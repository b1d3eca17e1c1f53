"""Errors that a GPU finds are told later: in order, once each, by whichever thread asks, with the place of their own call."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import types
import weakref

import pytest
import torch
from torch import Tensor

import albert_fast
from albert_fast import ALBERTConfig, ALBERTModel, ops
from albert_fast.ops import _reports
from albert_fast.ops._reports import NOTHING, CapturedReports, Pending, Queue, Slot
from albert_fast.runtime import dispatch

CPU, OTHER = torch.device("cpu"), torch.device("meta")


class Fake:
    """An event that happens when it is told to, or waited for."""

    def __init__(self, arrived: bool = True):
        self.arrived, self.waited, self.asked = arrived, 0, 0

    def query(self) -> bool:
        self.asked += 1
        return self.arrived

    def synchronize(self) -> None:
        self.arrived, self.waited = True, self.waited + 1


def pending(code: int = NOTHING, event: Fake | None = None, stream: int = 0) -> Pending:
    return Pending(Slot(event or Fake(), torch.tensor(code)), lambda found: IndexError(f"code {found}"), stream)


def raised(queue: Queue, device: torch.device = CPU, wait: bool = False) -> str | None:
    try:
        queue.raise_arrived(device, wait)
    except IndexError as error:
        return str(error)
    return None


def test_errors_come_in_order_and_once():
    queue = Queue()
    for code in (NOTHING, 5, NOTHING, 3, 5):
        queue.add(CPU, pending(code))
    assert [raised(queue) for _ in range(5)] == ["code 5", "code 3", "code 5", None, None]


def test_nobody_waits_for_what_has_not_arrived():
    queue, late = Queue(), Fake(arrived=False)
    queue.add(CPU, pending(1, late))
    queue.add(CPU, pending(2, stream=7))
    assert raised(queue) == "code 2"
    assert raised(queue) is None
    assert late.waited == 0
    late.arrived = True
    assert raised(queue) == "code 1"


def test_behind_a_call_on_its_way_the_stream_s_others_are_not_asked():
    queue, events = Queue(), [Fake(arrived=False) for _ in range(20)]
    for event in events:
        queue.add(CPU, pending(event=event))
    queue.add(CPU, pending(stream=7))
    before = [event.asked for event in events]
    queue.raise_arrived(CPU)
    assert [event.asked - n for event, n in zip(events, before, strict=True)] == [1] + [0] * 19
    assert len(queue._pending[CPU]) == 20, "that of the other stream was"


def test_what_has_arrived_lends_its_event_and_its_word_to_later_calls():
    queue, calls = Queue(), [pending(), pending(3), pending(event=Fake(arrived=False))]
    assert queue.slot(CPU) is None
    for call in calls:
        queue.add(CPU, call)
    assert raised(queue) == "code 3"
    assert queue.slot(OTHER) is None
    assert {id(queue.slot(CPU)) for _ in range(2)} == {id(call.slot) for call in calls[:2]}
    assert queue.slot(CPU) is None, "the third is on its way"


def test_waiting_tells_everything_so_far():
    queue, events = Queue(), [Fake(arrived=False) for _ in range(3)]
    for event, code in zip(events, (NOTHING, 7, 8), strict=True):
        queue.add(CPU, pending(code, event))
    assert raised(queue, wait=True) == "code 7"
    assert [event.waited for event in events] == [1, 1, 1]
    assert [raised(queue, wait=True), raised(queue, wait=True)] == ["code 8", None]


def test_devices_are_told_apart():
    queue = Queue()
    queue.add(CPU, pending(1))
    assert raised(queue, OTHER, wait=True) is None
    assert raised(queue) == "code 1"


def test_a_host_far_ahead_waits_for_the_oldest():
    queue, events = Queue(limit=3), [Fake(arrived=False) for _ in range(5)]
    for event in events:
        queue.add(CPU, pending(event=event))
        assert len(queue._pending[CPU]) <= 3
    assert [event.waited for event in events] == [1, 1, 0, 0, 0]


def test_an_error_of_the_oldest_is_raised_where_the_host_waits_for_it():
    queue = Queue(limit=1)
    queue.add(CPU, pending(4, Fake(arrived=False)))
    with pytest.raises(IndexError, match="code 4"):
        queue.add(CPU, pending(event=Fake(arrived=False)))
    assert len(queue._pending[CPU]) == 1


def test_nothing_is_kept_of_a_call_that_went_well():
    class Kept:
        def __call__(self, code: int) -> Exception:
            return IndexError(code)

    queue, describe = Queue(), Kept()
    gone = weakref.ref(describe)
    queue.add(CPU, Pending(Slot(Fake(), torch.tensor(NOTHING)), describe, 0))
    del describe
    gc.collect()
    assert gone() is not None
    queue.raise_arrived(CPU)
    gc.collect()
    assert gone() is None


def test_threads_share_the_errors_among_them():
    queue, found, start = Queue(limit=10_000), [], threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        for code in range(first, first + 50):
            queue.add(CPU, pending(code))
            if message := raised(queue):
                found.append(message)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while message := raised(queue):
        found.append(message)
    assert sorted(found) == sorted(f"code {1000 * i + j}" for i in range(8) for j in range(50))


@pytest.fixture
def gpu(monkeypatch):
    """Has embedding_projection take the CUDA way on CPU tensors, with a kernel that only looks for bad ids; the value holds
    whether a graph is being captured, and whether what a call found has arrived."""
    state = {"capturing": False, "event": Fake()}
    resolve = dispatch.resolve

    def choose(op: str, *arguments) -> str:
        return "cuda" if op == "embedding_projection" else resolve(op, *arguments)

    def launch(function: str, *arguments) -> None:
        (ids, types, positions), (out, first_bad), sizes = arguments[:3], arguments[10:12], arguments[15:18]
        out.zero_()
        bad = torch.stack([(x < 0) | (x >= size) for x, size in zip((ids, types, positions), sizes, strict=True)], 1)
        if bad.any():
            first_bad.fill_(bad.flatten().int().argmax())

    def on_its_way(flag: Tensor, describe: _reports.Describe) -> Pending:
        return Pending(Slot(state["event"], flag.clone()), describe, 0)

    monkeypatch.setattr(dispatch, "resolve", choose)
    monkeypatch.setattr(sys.modules["albert_fast.ops.embedding_projection"], "_launch", launch)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(_reports, "_QUEUE", Queue())
    monkeypatch.setattr(_reports, "_on_its_way", on_its_way)
    return state


def test_calls_in_a_row_share_a_few_words_and_events(monkeypatch):
    made: list[Slot] = []

    def new_slot() -> Slot:
        made.append(Slot(Fake(arrived=False), torch.tensor(NOTHING)))
        made[-1].arrived.record = lambda _stream: None
        return made[-1]

    monkeypatch.setattr(_reports, "_QUEUE", Queue())
    monkeypatch.setattr(_reports, "_new_slot", new_slot)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for call in range(50):
        _reports.raise_pending(CPU)
        _reports.report(torch.tensor(NOTHING), IndexError)
        if call % 2:  # the GPU is two calls behind
            for slot in made:
                slot.arrived.arrived = True
    assert len(made) == 2
    assert _reports._QUEUE._pending[CPU][-1].stream == 3


def embed(ids: Tensor, vocabulary: int = 10) -> Tensor:
    tables = torch.zeros(vocabulary, 8), torch.zeros(2, 8), torch.zeros(20, 8)
    nothing = torch.zeros_like(ids)
    rest = (torch.ones(8), torch.zeros(8), torch.zeros(16, 8), torch.zeros(16), 1e-12)
    return ops.embedding_projection(ids, nothing, nothing, *tables, *rest)


def test_a_captured_graph_reports_what_its_replays_find(gpu):
    ids = torch.tensor([1, 2, 3])
    gpu["capturing"] = True
    with CapturedReports() as reports:
        embed(ids)
    embed(ids)  # captured for nobody
    gpu["capturing"] = False
    ((flag, _),) = reports._captured
    reports.replayed()
    embed(ids)
    for value, place in ((99, 1), (-1, 2)):
        ids[place] = value
        flag.fill_(place * 3)  # as the replay's kernel would
        reports.replayed()
        with pytest.raises(
            ops.TokenIndexError, match=rf"input_ids\[{place}\] is {value}, outside its table of 10 rows"
        ):
            embed(torch.tensor([1]))
        flag.fill_(NOTHING)
    flag.fill_(4)
    reports.replayed(lambda code: KeyError(f"code {code}, as the replay's caller tells it"))
    with pytest.raises(KeyError, match="code 4, as the replay's caller tells it"):
        embed(torch.tensor([1]))
    flag.fill_(NOTHING)
    embed(torch.tensor([1]))


def test_nothing_is_asked_or_noted_while_a_graph_is_captured(gpu):
    embed(torch.tensor([77]))
    gpu["capturing"] = True
    embed(torch.tensor([88]))
    gpu["capturing"] = False
    with pytest.raises(IndexError, match="77"):
        embed(torch.tensor([1]))
    embed(torch.tensor([1]))


def test_an_id_that_was_written_again_is_not_shown(gpu):
    ids = torch.tensor([4, 10])
    embed(ids)
    ids[1] = 3
    with pytest.raises(IndexError, match=r"input_ids\[1\] was outside its table of 10 rows .* written again since"):
        embed(ids)


def test_a_model_names_the_place_in_the_batch_that_was_wrong(gpu):
    config = ALBERTConfig(
        vocab_size=30,
        embedding_size=8,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
    )
    model = ALBERTModel(config).eval()
    ids, mask = torch.full((3, 5), 4), torch.ones(3, 5, dtype=torch.int64)
    mask[0, 2:], mask[1, 0] = 0, 0
    ids[1, 3], ids[0, 4] = 30, 99  # the second is padding
    gpu["event"].arrived = False
    with torch.no_grad():
        model(ids, mask)
        model(torch.full((2, 2), 4))
        gpu["event"].arrived = True
        with pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 30, outside its table of 30 rows"):
            model(torch.full((2, 2), 4))
        model(torch.full((2, 2), 4))


def test_synchronize_waits_and_tells(gpu, monkeypatch):
    cuda = torch.device("cuda", 1)
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for device in (None, "cuda", "cuda:1", cuda):
        event = Fake(arrived=False)
        _reports._QUEUE.add(cuda, pending(6, event))
        with pytest.raises(IndexError, match="code 6"):
            albert_fast.synchronize(device)
        assert event.waited == 1
        albert_fast.synchronize(device)
    assert waited == [cuda] * 8


def test_a_whole_device_is_not_waited_for_while_a_graph_is_captured(gpu, monkeypatch):
    free: list[bool] = []

    def from_another_thread(_device: torch.device) -> None:
        thread = threading.Thread(target=lambda: free.append(ops.CAPTURE.acquire(blocking=False)))
        thread.start()
        thread.join()

    monkeypatch.setattr(torch.cuda, "synchronize", from_another_thread)
    albert_fast.synchronize("cuda:1")
    assert free == [False], "nobody can begin a capture meanwhile"


def test_on_a_cpu_there_is_nothing_to_wait_for():
    albert_fast.synchronize("cpu")
    if not torch.cuda.is_available():
        albert_fast.synchronize()
