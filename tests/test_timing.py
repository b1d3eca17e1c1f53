"""albert_fast.inspect.timing: sides take turns, preparation costs nothing, one side's failure stays its own."""

import pytest

from albert_fast.inspect import timing
from albert_fast.inspect.timing import Side, interleaved, paired_ratio


class Clock:
    """Stands in for the module `time`: it moves only when it is told to."""

    def __init__(self):
        self.now = 0.0
        self.pauses = []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def lasting(self, seconds, calls=None, name=None):
        """A side whose calls last that long, and note their name."""

        def call():
            self.now += seconds
            if calls is not None:
                calls.append(name)

        return Side(call)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_sides_take_turns_and_long_calls_are_not_repeated(clock):
    calls = []
    sides = {"a": clock.lasting(2.0, calls, "a"), "b": clock.lasting(3.0, calls, "b")}
    assert interleaved(sides, rounds=3, warmup=2) == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert "".join(calls) == "aabb" + "ab" * 3
    assert clock.pauses == [0.25] * 6


def test_short_calls_are_woken_and_fill_a_block(clock):
    calls = []
    [sample] = interleaved({"a": clock.lasting(0.002, calls)}, rounds=1, warmup=1, block_seconds=0.05)["a"]
    assert len(calls) == 1 + 1 + 25
    assert sample == pytest.approx(0.002)


def test_preparation_is_handed_over_and_not_timed(clock):
    received = []

    def call(argument):
        received.append(argument)
        clock.now += 1.0

    side = Side(call, lambda: clock.sleep(5.0) or "prepared")
    assert interleaved({"a": side}, rounds=2, warmup=1, pause=0)["a"] == [1.0, 1.0]
    assert received == ["prepared"] * 3


def test_a_failing_side_leaves_the_others_alone(clock):
    sides = {"good": clock.lasting(1.0), "bad": Side(lambda: 1 / 0)}
    failures: dict[str, Exception] = {}
    assert list(interleaved(sides, rounds=2, failures=failures)) == ["good"]
    assert isinstance(failures["bad"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        interleaved(sides, rounds=2)


def test_real_time_is_measured_in_seconds():
    assert 0 < interleaved({"a": Side(lambda: sum(range(10_000)))}, rounds=1, pause=0)["a"][0] < 1


def test_the_ratio_is_paired_so_drift_cancels():
    assert paired_ratio([1.0, 2.0, 8.0], [1.5, 3.0, 12.0]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("arguments", [{"rounds": 0}, {"warmup": 0}, {"sides": {}}])
def test_nothing_to_measure_is_an_error(arguments):
    with pytest.raises(ValueError, match="interleaved"):
        interleaved(**{"sides": {"a": Side(lambda: None)}, **arguments})
