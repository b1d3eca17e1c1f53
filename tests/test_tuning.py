"""The tuner of tile sizes, with a clock of its own in place of a GPU's."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from albert_fast.kernels import _tuning
from albert_fast.kernels._capture import CAPTURE
from triton.runtime.errors import OutOfResources

SLOW, FAST, MIDDLE = CANDIDATES = [{"BLOCK_M": 16}, {"BLOCK_M": 32}, {"BLOCK_M": 64}]


class Clock:
    """A timer for which a launch takes as long as its tiles are said to take."""

    def __init__(self) -> None:
        self.launched: list[dict[str, int]] = []

    def __call__(self, call):
        call()
        return {16: 3.0, 32: 1.0, 64: 2.0}[self.launched[-1]["BLOCK_M"]]

    def launch(self, tiles):
        self.launched.append(tiles)


def tuned(path: Path, machine: str = "H100", key: str = "op D64", candidates=CANDIDATES) -> tuple[dict, int]:
    """What a new tuner chooses, and how many launches it has timed."""
    clock = Clock()
    winner = _tuning.Tuner(path, machine, clock).choose(key, candidates, clock.launch)
    return winner, len(clock.launched)


def test_the_fastest_wins_and_is_timed_once(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    clock = Clock()
    tuner = _tuning.Tuner(path, "H100", clock)
    assert [tuner.choose("op D64", CANDIDATES, clock.launch) for _ in range(2)] == [FAST, FAST]
    assert clock.launched == CANDIDATES
    assert tuned(path) == (FAST, 0), "another process reads it"
    assert json.loads(path.read_text()) == {"H100": {"op D64": FAST}}
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiles.json", "tiles.lock"]


def test_another_machine_or_key_is_timed_for_itself(tmp_path):
    path = tmp_path / "tiles.json"
    assert tuned(path) == tuned(path, machine="A100") == tuned(path, key="op D128") == (FAST, 3)
    assert json.loads(path.read_text()) == {"H100": {"op D64": FAST, "op D128": FAST}, "A100": {"op D64": FAST}}


def test_a_winner_that_is_no_candidate_any_more_is_replaced(tmp_path):
    path = tmp_path / "tiles.json"
    assert tuned(path) == (FAST, 3)
    assert tuned(path, candidates=[SLOW, MIDDLE]) == (MIDDLE, 2)
    assert tuned(path, candidates=[SLOW, MIDDLE]) == (MIDDLE, 0)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"H100": 3}', b'{"H100": {"op D64": [1]}}', b'{"A100": {}}']
)
def test_a_broken_file_is_written_anew(tmp_path, content):
    path = tmp_path / "tiles.json"
    path.write_bytes(content)
    assert tuned(path) == (FAST, 3)
    assert json.loads(path.read_text())["H100"] == {"op D64": FAST}


def test_where_nothing_can_be_written_the_winner_is_used_and_the_loss_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    clock = Clock()
    tuner = _tuning.Tuner(tmp_path / "file" / "tiles.json", "H100", clock)
    with pytest.warns(UserWarning, match="not kept for later runs"):
        assert tuner.choose("op D64", CANDIDATES, clock.launch) == FAST
    assert tuner.choose("op D64", CANDIDATES, clock.launch) == FAST
    assert len(clock.launched) == 3


def test_nothing_is_timed_while_a_graph_is_captured(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(_tuning, "capturing", lambda: True)
    assert tuned(path) == (SLOW, 0), "the default"
    assert not path.exists()
    path.write_text(json.dumps({"H100": {"op D64": FAST}}))
    assert tuned(path) == (FAST, 0), "a winner that is known already"


def test_threads_time_one_after_another_and_never_beside_a_capture(tmp_path):
    tuner, found, together = _tuning.Tuner(tmp_path / "tiles.json", "H100", None), [], threading.Semaphore(1)
    clock = Clock()

    def timer(call):
        assert together.acquire(blocking=False), "two clocks at once"
        time.sleep(0.01)
        together.release()
        return clock(call)

    tuner.timer = timer
    threads = [
        threading.Thread(target=lambda: found.append(tuner.choose("op D64", CANDIDATES, clock.launch)))
        for _ in range(4)
    ]
    with CAPTURE:
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert clock.launched == []
    for thread in threads:
        thread.join()
    assert found == [FAST] * 4
    assert clock.launched == CANDIDATES, "timed once for all of them"


def test_a_candidate_that_does_not_fit_the_chip_loses(tmp_path):
    clock = Clock()

    def launch(tiles):
        if tiles == FAST:
            raise OutOfResources(200_000, 100_000, "shared memory")
        clock.launch(tiles)

    assert _tuning.Tuner(tmp_path / "tiles.json", "RTX", clock).choose("op D64", CANDIDATES, launch) == MIDDLE


def test_processes_do_not_lose_each_others_winners(tmp_path):
    path = tmp_path / "tiles.json"
    script = (
        "import sys; from pathlib import Path; from albert_fast.kernels._tuning import Tuner\n"
        "tuner = Tuner(Path(sys.argv[1]), 'H100', lambda call: call())\n"
        "for i in range(30): tuner.choose(f'{sys.argv[2]} {i}', [{'BLOCK_M': 16}, {'BLOCK_M': 32}],\n"
        "                                 lambda tiles: -tiles['BLOCK_M'])\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    expected = {f"{name} {i}": {"BLOCK_M": 32} for name in "abc" for i in range(30)}
    assert json.loads(path.read_text()) == {"H100": expected}


@pytest.fixture
def fresh_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (_tuning.asked_for, _tuning._tuner)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("variable", "interpret", "expected"),
    [(None, False, SLOW), ("0", False, SLOW), ("1", False, FAST), ("1", True, SLOW)],
)
def test_only_the_variable_starts_it_and_never_in_the_interpreter(
    variable, interpret, expected, monkeypatch, tmp_path, fresh_caches
):
    monkeypatch.delenv("ALBERT_FAST_TUNE", raising=False)
    if variable is not None:
        monkeypatch.setenv("ALBERT_FAST_TUNE", variable)
    clock = Clock()
    monkeypatch.setattr(_tuning.triton.knobs.runtime, "interpret", interpret)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(_tuning, "time_on_gpu", clock)
    assert _tuning.choose("op", lambda: "D64", CANDIDATES, clock.launch) == expected
    assert _tuning.choose("other", lambda: "D64", [SLOW], clock.launch) == SLOW
    assert len(clock.launched) == (3 if expected is FAST else 0)
    assert (tmp_path / "albert_fast" / "tiles.json").exists() == (expected is FAST)


def test_another_value_of_the_variable_is_an_error(monkeypatch, fresh_caches):
    monkeypatch.setenv("ALBERT_FAST_TUNE", "true")
    with pytest.raises(ValueError, match="ALBERT_FAST_TUNE='true': must be 1"):
        _tuning.asked_for()
