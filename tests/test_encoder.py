import os
import signal
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ops
from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_forward, make_inputs, parity_tests

FORWARD, _ = parity_tests("encoder")
CASE = ALL_CASES["encoder"]


def drawn(shape, **options):
    return make_inputs(CASE, shape, options, torch.float32)


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.sampled_from([(26, 1), (48, 3), (64, 2)]),
    st.integers(1, 200),
    st.booleans(),
)
def test_any_lengths(lengths, size, middle, wanted):
    check_forward(CASE, (tuple(lengths), *size, middle, 1, 2), {"wanted": wanted}, torch.float32, "cpp")


@pytest.mark.parametrize("lengths", [(3,), (40, 1, 7), (11,) * 30, (300,), (150, 0, 149, 2)])
@pytest.mark.parametrize("wanted", [False, True])
def test_bitwise_the_same_on_any_number_of_threads_and_in_any_batch(lengths, wanted, threads):
    # few rows are shared by columns, more of them by rows, with and without a sequence across a border
    inputs = drawn((lengths, 64, 2, 1000, 1, 3), wanted=wanted)
    threads(1)
    expected = CASE.run(inputs, "cpp")
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(CASE.run(inputs, "cpp"), expected)
    if wanted:
        return
    for begin, end in zip(inputs["cu_seqlens"][:-1].tolist(), inputs["cu_seqlens"][1:].tolist(), strict=True):
        alone = {**inputs, "hidden": inputs["hidden"][begin:end], "cu_seqlens": torch.tensor([0, end - begin]).int()}
        assert torch.equal(CASE.run(alone, "cpp"), expected[begin:end])


def test_changed_weights_are_packed_again():
    inputs = drawn(((9, 4), 48, 2, 100, 1, 2))
    matrices = [weight for weight in inputs["weights"] if weight.dim() == 2]
    before = CASE.run(inputs, "cpp")
    for change in (lambda w: w.mul_(0.5), lambda w: w.data.mul_(2.0), lambda w: w.data.copy_(torch.randn_like(w) / 7)):
        for matrix in matrices:
            change(matrix)
            after = CASE.run(inputs, "cpp")
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, CASE.run(inputs, "reference"), atol=1e-5, rtol=1e-5)
            before = after


def test_packed_weights_go_with_the_weights():
    from albert_fast.ops import encoder as module

    packed = __import__("sys").modules["albert_fast.ops.encoder"]._PACKED
    assert module is ops.encoder
    inputs = drawn(((4,), 26, 1, 40, 1, 1))
    before = len(packed)
    CASE.run(inputs, "cpp")
    assert len(packed) == before + 1
    inputs.clear()
    assert len(packed) == before


def test_two_threads_with_a_model_each():
    many = [drawn(((30, 5, 60), 48, 2, 96, 1, 3)) for _ in range(2)]
    expected = [CASE.run(inputs, "reference") for inputs in many]
    results = [[], []]

    def work(i):
        for _ in range(20):
            results[i].append(CASE.run(many[i], "cpp"))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(2):
        for result in results[i]:
            torch.testing.assert_close(result, expected[i], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_runs_on_one_thread(threads):
    threads(2)
    inputs = drawn(((130, 60), 64, 2, 200, 1, 2))
    expected = CASE.run(inputs, "cpp")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(CASE.run(inputs, "cpp"), expected) and torch.get_num_threads() == 1 else 1)
    ended = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < ended:
        time.sleep(0.02)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0), "the child waits for threads that it does not have, or computes something else"


def test_threads_rest_after_a_call(threads):
    threads(2)
    inputs = drawn(((130, 60), 64, 2, 200, 1, 2))
    CASE.run(inputs, "cpp")
    time.sleep(0.3)  # OpenMP's threads look for more work for some milliseconds
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_nan_stays_in_its_sequence():
    inputs = drawn(((6, 9, 3), 48, 2, 96, 1, 2))
    clean = CASE.run(inputs, "cpp")
    inputs["hidden"][8, 5] = float("nan")
    out = CASE.run(inputs, "cpp")
    assert out[6:15].isnan().all()
    assert torch.equal(out[:6], clean[:6])
    assert torch.equal(out[15:], clean[15:])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"multiple of num_heads, got \(7, 48\) and 5 heads", {"num_heads": 5}),
        ("unknown act 'swish'", {"act": "swish"}),
        (r"do not make the layers \[1\]", {"order": [1]}),
        (r"do not make the layers \[\]", {"order": []}),
        (r"cu_seqlens must run from 0 to 7", {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}),
        ("cu_seqlens must be int32", {"cu_seqlens": torch.tensor([0, 7])}),
        ("rows and cu_rows come together", {"rows": torch.tensor([0])}),
        (r"rows must lie in \[0, 7\)", {"rows": torch.tensor([7]), "cu_rows": torch.tensor([0, 1], dtype=torch.int32)}),
    ],
)
def test_bad_input_is_named(message, changes):
    with pytest.raises(ValueError, match=message):
        ops.encoder(**{**drawn(((7,), 48, 2, 96, 1, 1)), **changes})


def test_misshapen_weights_are_named():
    inputs = drawn(((7,), 48, 2, 96, 1, 1))
    inputs["weights"][2] = torch.zeros(48, 47)
    with pytest.raises(ValueError, match=r"expected dense of shape \(48, 48\)"):
        ops.encoder(**inputs)
    inputs["weights"][2] = torch.zeros(48, 48, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"got \(48, 48\) in torch.bfloat16"):
        ops.encoder(**inputs)
