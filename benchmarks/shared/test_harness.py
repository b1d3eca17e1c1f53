"""Tests of harness.py and workers.py: which answers fail a row or take no part; processes of other environments."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from shared import harness, sides, workers
from shared.records import Record

EXACT = (torch.tensor([1.0, 2.0, 3.0]),)
WRONG = (torch.tensor([-1.0, 0.5, 9.0]),)


def judged(answers: dict) -> dict:
    samples = {"albert_fast-int8": [3.0, 3.0], "onnxruntime-int8": [1.0, 1.0], "openvino-int8": [2.0, 2.0]}
    returned = {name: partial(answers.get, name, EXACT) for name in samples}
    return harness.judged(samples, returned, EXACT, lambda side: harness.allowed_error(side, torch.float32), sides.ours)


def test_wrong_integers_of_another_engine_are_named_and_not_compared():
    found = judged({"onnxruntime-int8": WRONG})
    wrong = found["onnxruntime-int8"]
    assert wrong["wrong"]
    assert wrong["relative_error"] > 0.9
    assert "times_ours" not in wrong
    assert "ratio_to_best_other" not in wrong
    assert found["albert_fast-int8"]["best_other"] == "openvino-int8", "not the faster one, whose answers are wrong"
    assert found["albert_fast-int8"]["ratio_to_best_other"] == pytest.approx(2 / 3)
    extra_info = {"id": "cpu_peers/fwd/float32/plbert-1/onnxruntime-int8", "milliseconds": 1.0, **wrong}
    assert not Record.of(json.loads(json.dumps(extra_info))).right


def test_our_own_wrong_integers_fail():
    found = judged({"albert_fast-int8": WRONG})
    assert isinstance(found["albert_fast-int8"], AssertionError)
    assert "computes something else" in str(found["albert_fast-int8"])
    assert found["onnxruntime-int8"]["best_other"] == "openvino-int8"


def test_an_answer_with_nan_is_wrong():
    nan = (torch.tensor([1.0, math.nan, 3.0]),)
    assert harness.compare(nan, EXACT)["relative_error"] == math.inf
    assert judged({"openvino-int8": nan})["openvino-int8"]["wrong"]
    with pytest.raises(AssertionError, match="computes something else"):
        harness.checked_errors(nan, EXACT, "hf-sdpa", 1e-4)


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "double.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(Path(workers.__file__).parents[1])!r})
from shared.workers import serve

def double(number):
    print("a library's own line", flush=True)
    os.system("echo another, of a child")
    if number == 0:
        os._exit(3)
    return {{"twice": number * 2, "calls": calls.append(number) or len(calls), "torch": "torch" in sys.modules}}

calls = []
print("before the first request", file=sys.stderr, flush=True)
serve(double)
"""
    )
    worker = workers.Worker(sys.executable, script)
    yield worker
    worker.close()


def test_a_worker_keeps_its_state_and_answers_whatever_libraries_print(worker):
    assert worker.ask(number=2) == {"twice": 4, "calls": 1, "torch": False}
    assert worker.ask(number=[1]) == {"twice": [1, 1], "calls": 2, "torch": False}


def test_a_worker_that_raises_says_so_and_goes_on_one_that_ends_shows_its_log(worker):
    with pytest.raises(RuntimeError, match="TypeError: unsupported operand"):
        worker.ask(number={})
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'count'"):
        worker.ask(count=1)
    assert worker.ask(number=1)["calls"] == 1
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*before the first request.*another, of a child"):
        worker.ask(number=0)
    with pytest.raises(RuntimeError, match="ended with 3"):
        worker.ask(number=1)
