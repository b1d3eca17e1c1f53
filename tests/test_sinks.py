"""Outputs of `encode`: who may write them, and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from albert_fast.commands._errors import UsageError
from albert_fast.commands._lines import Record
from albert_fast.commands._sinks import NpyForm, ResumableFile, State


def test_the_output_is_locked_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second writer that comes while the first one finishes must not touch the first one's rows."""
    output, form = tmp_path / "out.npy", NpyForm(4, "float32")
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    records = [Record(line, "text") for line in (1, 2, 3)]
    first = ResumableFile(output, form, {}, State.new)
    first.append(rows, records, "digest")
    seen = []

    def step(name: str) -> None:
        original = getattr(Path, name)

        def call(self, *arguments, **options):
            for when in ("before", "after"):
                if when == "after":
                    result = original(self, *arguments, **options)
                if self.name in ("out.npy.partial", "out.npy.progress"):
                    with pytest.raises(UsageError, match="is being written by another process"):
                        ResumableFile(output, form, {}, State.new)
                    seen.append((name, self.name, when))
            return result

        monkeypatch.setattr(Path, name, call)

    step("replace")
    step("unlink")
    first.finish()
    monkeypatch.undo()
    assert {("replace", "out.npy.partial", "after"), ("unlink", "out.npy.progress", "before")} <= set(seen)
    assert np.array_equal(np.load(output), rows)
    second = ResumableFile(output, form, {}, State.new)
    second.close()
    assert np.array_equal(np.load(output), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]
