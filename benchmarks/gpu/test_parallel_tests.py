"""parallel_tests.py on small tests: which run, in which order, and what becomes of a test that ends its process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import parallel_tests


def outcomes(folder: Path, first: Sequence[str] = (), **options: Any) -> list[tuple[str, str, str]]:
    """(test, outcome, why) of the tests in a folder, in the order of their reports."""
    settings = {"processes": 1, "seconds": 300.0, **options}
    arguments = [str(folder), "-c", os.devnull, "--rootdir", str(folder)]
    reports = parallel_tests.run_tests(arguments, first, folder=folder, **settings)
    return [(report.test.rpartition("::")[2], report.outcome, report.why) for report in reports]


def test_a_test_that_breaks_the_context_fails_alone(tmp_path, capfd):
    (tmp_path / "test_it.py").write_text(
        "import torch\nbroken = []\n"
        "def synchronize():\n    if broken: raise RuntimeError('an illegal memory access was encountered')\n"
        "torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize\n"
        "def test_before(): pass\n"
        "def test_breaks():\n    broken.append(1)\n    raise ValueError('the reason')\n"
        "def test_fails(): raise ValueError('something else')\n"
        "def test_after(): assert not broken\n"
    )
    found = {test: (outcome, why) for test, outcome, why in outcomes(tmp_path)}
    assert {test: outcome for test, (outcome, _) in found.items()} == {
        "test_before": "passed",
        "test_breaks": "failed",
        "test_fails": "failed",
        "test_after": "passed",
    }
    assert "crashed while running" in found["test_breaks"][1]
    assert "something else" in found["test_fails"][1]
    log = capfd.readouterr().err
    assert "ValueError: the reason" in log
    assert "illegal memory access" in log


def test_a_test_that_kills_its_process_or_hangs_fails_alone(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os, signal, time\n"
        "def test_dies(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_hangs(): time.sleep(100)\n"
        "def test_after(): pass\n"
    )
    found = {test: outcome for test, outcome, _ in outcomes(tmp_path, longest=5.0)}
    assert found == {"test_dies": "failed", "test_hangs": "failed", "test_after": "passed"}


def test_every_test_runs_once_in_some_process(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(9))\ndef test_alone(n): assert n != 5\n"
        "def test_skipped(): pytest.skip('why not')\n"
    )
    found = outcomes(tmp_path, processes=3)
    names = [f"test_alone[{n}]" for n in range(9)] + ["test_skipped"]
    expected = {"test_alone[5]": "failed", "test_skipped": "skipped"}
    assert sorted(report[:2] for report in found) == sorted((name, expected.get(name, "passed")) for name in names)


def test_what_runs_first_what_does_not_exist_and_what_cannot_be_collected(tmp_path):
    (tmp_path / "test_bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n")
    found = outcomes(tmp_path, ["test_it.py::test_c", "test_it.py::test_d", "test_it.py::test_b"])
    (collecting,) = [report for report in found if report[0].startswith("collecting")]
    assert collecting[1] == "failed"
    assert "nothing_of_this_name" in collecting[2]
    found.remove(collecting)
    assert found[0] == ("test_d", "failed", "there is no such test")
    assert found[1:] == [(f"test_{name}", "passed", "") for name in "cba"]


def test_tests_that_the_time_does_not_suffice_for_are_named(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a(): pass\n"
        "def test_b():\n    open('begun', 'w').close()\n    time.sleep(100)\n"
        "def test_c(): pass\n"
    )
    now, begun = time.monotonic, tmp_path / "begun"
    monkeypatch.setattr(parallel_tests.time, "monotonic", lambda: now() + 1e6 * begun.exists())
    assert outcomes(tmp_path, longest=1000.0) == [
        ("test_a", "passed", ""),
        ("test_b", "not run", ""),
        ("test_c", "not run", ""),
    ]


def test_a_pytest_that_collects_nothing_fails(tmp_path):
    (only,) = parallel_tests.run_tests(["--no-such-option"], [], 2, 300.0, tmp_path)
    assert (only.test, only.outcome) == ("pytest", "failed")
    assert only.why == "pytest did not collect the tests and ended with status 4"
