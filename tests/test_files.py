"""Files that are written whole or not at all, and what killed processes leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from albert_fast.checkpoints import weights
from albert_fast.runtime import files
from albert_fast.text.tokenizer import train_tokenizer
from albert_fast.training import checkpointing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_text("old")
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"

    def stopped() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        stopped()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["note.json"]


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_file(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from albert_fast.runtime import files
with files.replacing(Path(sys.argv[1])) as file:
    file.write(bytes(1 << 16))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "state.pt"
    path.write_text("old")
    run = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert run.returncode == -signal.SIGKILL
    (left,) = files.scratch_folders(path)
    assert (left / "state.pt").stat().st_size == 1 << 16
    with files.replacing(tmp_path / "state") as file:  # another file: none of its business
        file.write(b"x")
    assert left.is_dir()
    with files.replacing(path) as file:
        file.write(b"new")
    assert names(tmp_path) == ["state", "state.pt"]
    assert path.read_text() == "new"


def test_what_a_living_writer_needs_stays(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with files.replacing(path) as slow:
        slow.write(b"slow")
        with files.replacing(path) as fast:
            fast.write(b"fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow"
    assert names(tmp_path) == ["state.pt"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), files.replacing(tmp_path / "nowhere" / "note"):
        pass
    assert names(tmp_path) == []


def test_every_writer_removes_what_killed_ones_left(tmp_path: Path) -> None:
    """The state and log of training, a tokenizer's files and the note of `encode`: the checkpoint is in test_saving."""
    left = []
    for name in ("training_state.pt", "log.jsonl", "tokenizer.json", "tokenizer_config.json", weights.CHECKPOINT):
        left.append(tmp_path / f".{name}.0123456789abcdef.part")
        left[-1].mkdir()
        (left[-1] / "half").write_bytes(bytes(1000))
    checkpointing.save_state(tmp_path, {"step": 3})
    checkpointing.write_log(tmp_path, [{"loss": 0.5}])
    train_tokenizer(["ein kleiner Text, noch ein Text"] * 9, 60, kind="wordpiece").save(tmp_path)
    assert [path for path in left if path.exists()] == [tmp_path / f".{weights.CHECKPOINT}.0123456789abcdef.part"]
    assert os.path.getsize(tmp_path / "training_state.pt") > 0
