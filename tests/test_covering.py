"""The choice of few test cases that hold every pair of two parameters' values, and which cases a test run takes."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from albert_fast.testing.covering import cover, pairwise
from albert_fast.testing.parity import parity_grid, without_thorough


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


def test_pairwise_holds_every_pair_in_few_rows_and_the_same_ones_again():
    rows = list(itertools.product("abc", range(9), (None, 0.2, "relu", "tanh")))
    chosen = [rows[at] for at in pairwise(rows)]
    assert pairs(chosen) == pairs(rows)
    assert 36 <= len(chosen) <= 45, "9 x 4 is the least"
    assert chosen == [rows[at] for at in pairwise(rows)]


def test_pairs_that_no_row_holds_are_not_asked_for():
    assert pairwise([("a", 1), ("b", 2)]) == [0, 1]
    assert pairwise([]) == []


def test_cover_takes_the_preferred_among_equals():
    same = {"first": {1}, "second": {1}}
    assert cover(same) == ["first"]
    assert cover(same, lambda case, chosen: float(case == "second")) == ["second"]


@pytest.mark.parametrize("op", ["attention", "quantized_encoder"])
def test_a_quick_run_keeps_every_value_on_every_backend(op):
    grid = parity_grid(op, "reference", "cpp")
    kept = without_thorough(grid)
    assert len(kept) < len(grid)
    for of in (2, 3, 4):
        assert {(row[5], repr(row[of])) for row in kept} == {(row[5], repr(row[of])) for row in grid}


def test_thorough_tests_run_when_they_are_asked_for(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = thorough\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\n@pytest.mark.thorough\ndef test_b(): pass\n"
    )
    passed = {"test_it.py": 1, "--thorough": 2, "test_it.py::test_b": 1}
    # In one process, so that libraries are imported once.
    script = f"import pytest\nfor one in {list(passed)}: pytest.main(['-q', '-rA', one]); print('END')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    outputs = done.stdout.split("END\n")[:-1]
    for (argument, count), output in zip(passed.items(), outputs, strict=True):
        assert f"{count} passed" in output, done.stdout + done.stderr
        assert ("test_b" in output) == (argument != "test_it.py")
