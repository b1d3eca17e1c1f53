"""The stages of a forward on a CPU: they hold all of its work and all threads, and no other calls."""

import threading

import pytest
import torch

from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTModel, explain, ops
from albert_fast.inspect.profiling import profile
from albert_fast.quantization.calibration import quantize
from albert_fast.runtime.dispatch import BackendUnavailableError

ROUNDING = "rounding to integers"  # a stage of integer models alone
SMALL = ALBERTConfig(
    vocab_size=61, embedding_size=12, hidden_size=40, num_attention_heads=4, intermediate_size=56, num_hidden_layers=3
)


def batch():
    ids, mask = torch.randint(0, 61, (4, 30)), torch.ones(4, 30, dtype=torch.long)
    mask[0, 7:] = 0
    return ids, mask


@pytest.mark.parametrize("bits", [None, 8, 16])
@pytest.mark.parametrize("model", [ALBERTModel, ALBERTForMaskedLM])
def test_stages_hold_all_the_work_of_the_layers(model, bits):
    network, (ids, mask) = model(SMALL).eval(), batch()
    if bits is not None:
        quantize(network.base_model, f"int{bits}")
    stages = profile(network, ids, mask, rounds=3)
    assert tuple(stage.name for stage in stages) == ops.STAGES
    with torch.no_grad():
        (encoder,) = (step for step in explain(network, ids, mask).steps if step.name.endswith("encoder"))
    work = sum(stage.work for stage in stages if stage.unit in ("GFLOPS", "GOPS"))
    assert work == pytest.approx(1e9 * encoder.gflop)
    for stage in stages:
        assert stage.seconds > 0 or stage.name == "waiting" or (stage.name == ROUNDING and bits is None)
        assert (stage.limit > 0) == bool(stage.unit)
        assert stage.of_limit == pytest.approx(stage.rate / stage.limit if stage.limit else 0)


def test_every_thread_counts():
    network, (ids, mask) = ALBERTModel(SMALL).eval(), batch()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), ops.stage_seconds() as seconds:
            network(ids, mask)
            once = seconds.clone()
            network(ids, mask)
        assert seconds.shape == (2, len(ops.STAGES))
        counted = [stage not in (ROUNDING, "waiting") for stage in ops.STAGES]
        assert (once[:, counted] > 0).all()
        assert (seconds >= once).all()
        after = seconds.clone()
        with torch.no_grad():
            network(ids, mask)
        assert torch.equal(seconds, after), "outside nothing is counted"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [None, 8])
def test_threads_that_come_later_count_too(bits):
    network, (ids, mask) = ALBERTModel(SMALL).eval(), batch()
    if bits is not None:
        quantize(network, f"int{bits}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), ops.stage_seconds() as seconds:
            network(ids, mask)
            once = seconds.clone()
            torch.set_num_threads(4)
            network(ids, mask)
        assert seconds.shape == (4, len(ops.STAGES))
        assert (seconds[0] >= once[0]).all(), "what was counted stays"
        assert (seconds.sum(1) > 0).all()
    finally:
        torch.set_num_threads(before)


def test_calls_of_other_threads_do_not_count():
    network, (ids, mask) = ALBERTModel(SMALL).eval().requires_grad_(False), batch()
    with ops.stage_seconds() as seconds:
        thread = threading.Thread(target=network, args=(ids, mask))
        thread.start()
        thread.join()
        assert not seconds.any()
        network(ids, mask)
        assert seconds.any()


def test_a_model_without_the_one_call_says_why():
    ids, mask = batch()
    with pytest.raises(BackendUnavailableError, match=r"operator by operator, as .*not bfloat16"):
        profile(ALBERTModel(SMALL).eval().bfloat16(), ids, mask)
    with pytest.raises(BackendUnavailableError, match="training mode"):
        profile(ALBERTModel(SMALL), ids, mask)
    with pytest.raises(TypeError, match="Linear"):
        profile(torch.nn.Linear(2, 2), ids, mask)
