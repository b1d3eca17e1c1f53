"""Options, ids and JSON of `pytest benchmarks/ --benchmark-only`; README.md explains how a figure is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one import each other by their plain names

from report import row_table
from shared.harness import Options, ReplayClock, Result, Row

_CLOCK = ReplayClock()
_RECORDS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("albert_fast")
    group.addoption(
        "--quick", action="store_true", help="small shapes, a small model and few rounds: a check, not a figure"
    )
    group.addoption(
        "--long", action="store_true", help="every shape, also the batch that takes ten seconds a call where padded"
    )
    group.addoption("--rounds", type=int, default=None, help="samples of each side (default 7, with --quick 3)")
    group.addoption(
        "--peer-python",
        action="append",
        default=[],
        help="the Python of an environment with libraries that cannot live in this one (README.md); may be repeated",
    )
    group.addoption("--threads", type=int, default=None, help="threads of every side (default: torch's)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops: an operator against its eager and compiled form")
    config.addinivalue_line("markers", "model: the whole model against other ways to run it in PyTorch")
    config.addinivalue_line("markers", "hosts: libraries as they are, accelerated, and on their other engines")
    config.addinivalue_line("markers", "cpu_peers: the whole model against engines on CPUs, in every precision")
    config.addinivalue_line(
        "markers", "decoding: texts written by an encoder and a decoder, against other engines on CPUs"
    )
    config.addinivalue_line("markers", "pretraining: a step of pre-training against transformers', time and memory")
    config.stash[_RECORDS] = []


def _options(config: pytest.Config) -> Options:
    quick, long, rounds, threads = (config.getoption(name) for name in ("quick", "long", "rounds", "threads"))
    return Options(
        quick=quick,
        long=long,
        rounds=rounds or (3 if quick else 7),
        threads=threads or torch.get_num_threads(),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        peer_pythons=tuple(config.getoption("peer_python")),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    rows = []
    for group in metafunc.module.groups(_options(metafunc.config)):
        for side in group.sides():
            reason = group.why_not(side)
            marks = [pytest.mark.benchmark(timer=_CLOCK, group=group.key)]
            if reason is not None:
                marks.append(pytest.mark.skip(reason=reason))
            row = Row(group, side)
            rows.append(pytest.param(row, id=str(row), marks=marks))
    metafunc.parametrize("row", rows)


@pytest.fixture(scope="session")
def _measured(request: pytest.FixtureRequest) -> Callable[[Row], Result | Exception]:
    """The result of a row; its group is measured when the first of its selected rows asks."""
    options = _options(request.config)
    torch.set_num_threads(options.threads)
    selected: dict[str, list[str]] = {}
    for item in request.session.items:
        row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
        if isinstance(row, Row) and item.get_closest_marker("skip") is None:
            selected.setdefault(row.group.key, []).append(row.side)
    results: dict[str, dict[str, Result | Exception]] = {}

    def measured(row: Row) -> Result | Exception:
        key = row.group.key
        if key not in results:
            try:
                results[key] = row.group.measure(selected[key], options)
            except (
                Exception
            ) as error:  # making the inputs or the expected answer failed, so no row of the group can be measured
                results[key] = dict.fromkeys(selected[key], error)
        return results[key][row.side]

    return measured


@pytest.fixture
def record(
    benchmark: Any, _measured: Callable[[Row], Result | Exception], request: pytest.FixtureRequest
) -> Callable[[Row], None]:
    """Hands a row's samples to pytest-benchmark, or fails the test with what its side raised."""

    def play_back(row: Row) -> None:
        result = _measured(row)
        if isinstance(result, Exception):
            raise result
        benchmark.name = str(row)
        benchmark.extra_info.update(result.extra_info)
        _CLOCK.load(result.seconds)
        benchmark.pedantic(lambda: None, rounds=len(result.seconds))
        request.config.stash[_RECORDS].append(result.extra_info)

    return play_back


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[_RECORDS]
    if records:
        terminalreporter.section("side by side")
        terminalreporter.write_line(row_table(records))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from albert_fast.inspect.info import describe

    machine_info.pop("node")  # a host's name says nothing about its speed
    machine_info["albert_fast"] = describe()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["quick"] = config.getoption("quick")  # so that a check cannot pass for a figure
    for benchmark in output_json["benchmarks"]:
        del benchmark["options"], benchmark["params"]  # the same for all, or in the id
