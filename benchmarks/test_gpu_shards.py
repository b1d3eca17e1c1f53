"""gpu_shards.py on small tests: which are run, in which order, and what becomes of one that takes its process along."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_shards
from gpu_shards import Shards


def dealt(folder: Path, first: Sequence[str] = (), **options: Any) -> list[tuple[str, str, str]]:
    """(test, outcome, why) of the tests in a folder, in the order of their reports."""
    settings = {"processes": 1, "seconds": 300.0, **options}
    shards = Shards([str(folder), "-c", os.devnull, "--rootdir", str(folder)], first, folder=folder, **settings)
    return [(report.test.partition("::")[2], report.outcome, report.why) for report in shards.reports()]


def test_a_test_that_breaks_the_context_takes_no_other_along(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import torch\nbroken = []\n"
        "def synchronize():\n    if broken: raise RuntimeError('an illegal memory access was encountered')\n"
        "torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize\n"
        "def test_before(): pass\n"
        "def test_breaks():\n    broken.append(1)\n    raise ValueError('the reason')\n"
        "def test_fails(): raise ValueError('something else')\n"
        "def test_after(): assert not broken\n"
    )
    reports = dealt(tmp_path)
    outcomes = [
        ("test_before", "passed"),
        ("test_breaks", "failed"),
        ("test_fails", "failed"),
        ("test_after", "passed"),
    ]
    assert [report[:2] for report in reports] == outcomes
    assert re.search("ValueError: the reason(?s:.)*illegal memory access", reports[1][2])
    assert "something else" in reports[2][2]


def test_a_test_that_ends_its_process_or_hangs_fails_alone(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os, signal, time\n"
        "def test_leaves(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_hangs(): time.sleep(100)\n"
        "def test_after(): pass\n"
    )
    assert dealt(tmp_path, longest=15.0) == [
        ("test_leaves", "failed", "its process ended: by SIGKILL"),
        ("test_hangs", "failed", "it was ended after 15 s"),
        ("test_after", "passed", ""),
    ]


def test_every_test_is_run_once_by_some_process_and_those_of_a_group_by_one_after_another(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('n', range(9))\ndef test_alone(n): assert n != 5\n"
        "@pytest.mark.xdist_group('large')\n@pytest.mark.parametrize('n', range(3))\n"
        "def test_large(n):\n    with open('pids', 'a') as file: print(os.getpid(), file=file)\n"
        "def test_skipped(): pytest.skip('why not')\n"
    )
    reports = dealt(tmp_path, processes=3)
    names = [f"test_alone[{n}]" for n in range(9)] + [f"test_large[{n}]" for n in range(3)] + ["test_skipped"]
    outcomes = {"test_alone[5]": "failed", "test_skipped": "skipped"}
    assert sorted(report[:2] for report in reports) == sorted((name, outcomes.get(name, "passed")) for name in names)
    assert len(set((tmp_path / "pids").read_text().split())) == 1


def test_a_group_is_dealt_as_one_where_its_first_test_stands(tmp_path):
    shards = Shards([], ["c"], 1, 300.0, tmp_path)
    assert list(shards._plan([("a", "large"), ("b", ""), ("c", ""), ("d", "large")], {})) == []
    assert list(shards._ahead or ()) == [["c"], ["a", "d"], ["b"]]


def test_what_comes_first_what_is_not_there_and_what_cannot_be_collected(tmp_path):
    (tmp_path / "test_bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n")
    first = ["test_it.py::test_c", "test_it.py::test_d", "test_it.py::test_b"]
    collecting, *others = dealt(tmp_path, first)
    assert collecting[1] == "failed"
    assert "nothing_of_this_name" in collecting[2]
    assert others == [
        ("test_d", "failed", "there is no such test"),
        *((f"test_{name}", "passed", "") for name in "cba"),
    ]


def test_what_the_time_does_not_suffice_for_is_named(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a(): pass\n"
        "def test_b():\n    open('begun', 'w').close()\n    time.sleep(100)\n"
        "def test_c(): pass\n"
    )
    now, begun = time.monotonic, tmp_path / "begun"
    monkeypatch.setattr(time, "monotonic", lambda: now() + 1e6 * begun.exists())
    reports = dealt(tmp_path, longest=1e9)
    assert reports == [("test_a", "passed", ""), ("test_b", "not run", ""), ("test_c", "not run", "")]


def test_processes_that_collect_nothing_are_no_success(tmp_path):
    shards = Shards(["--no-such-option"], [], 2, 300.0, tmp_path)
    why = "a process ended before it had collected tests: exit status 4"
    assert [(r.test, r.outcome, r.why) for r in shards.reports()] == [("pytest", "failed", why)] * 2


def test_without_hypothesis_only_the_tests_that_draw_from_it_are_skipped(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "from hypothesis import given, settings\nfrom hypothesis import strategies as st\n"
        "@settings(max_examples=3)\n@given(st.lists(st.integers(0, 3)), st.integers())\n"
        "def test_draws(a, b): pass\n"
        "def test_plain(): pass\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(Path(gpu_shards.__file__).parent)!r}); import importlib.util as u, pytest; "
        "from gpu_shards import WithoutHypothesis; find = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'hypothesis' else find(name, *more); "
        "options = ['-p', 'no:hypothesispytest', '-p', 'no:cacheprovider', 'test_it.py']; "
        "sys.exit(pytest.main(options, plugins=[WithoutHypothesis()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
