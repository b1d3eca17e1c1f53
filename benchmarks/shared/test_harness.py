"""Tests of harness.py: which answers fail a row, and which leave it out of the comparison."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from shared import harness, sides
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
