"""Locks on files: exclusive, released at once and by a dying process, no file left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from albert_fast.runtime.locking import LockedError, locked, try_lock, unlock

HOLD = """
import sys
from pathlib import Path
from albert_fast.runtime.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold_elsewhere(path: Path) -> subprocess.Popen[bytes]:
    """Another process that holds the lock until its standard input closes."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_another_process_is_kept_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = hold_elsewhere(path)
    with pytest.raises(LockedError, match=rf"lock: another process {process.pid} holds"), locked(path):
        pytest.fail("both hold the lock")
    process.communicate()
    assert not path.exists()
    with locked(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only")
def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = hold_elsewhere(path)
    process.kill()
    process.wait()
    assert path.exists()
    with locked(path):
        pass
    assert not path.exists()


def test_an_error_inside_releases_the_lock_while_its_traceback_lives(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside") as kept, locked(tmp_path / "lock"):
        raise ValueError("inside")
    with locked(tmp_path / "lock"), pytest.raises(LockedError), locked(tmp_path / "lock"):
        pytest.fail("locked twice by one process")
    assert kept.tb is not None


def test_a_lock_file_that_was_removed_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder removes the file between our opening and our locking of it: the lock must be on a file that is there."""
    path, real = tmp_path / "lock", os.open
    opened = []

    def open_then_lose(name, flags, mode=0o777):
        opened.append(real(name, flags, mode))
        if len(opened) == 1:
            os.unlink(name)
        return opened[-1]

    monkeypatch.setattr(os, "open", open_then_lose)
    with locked(path):
        monkeypatch.undo()
        assert len(opened) == 2
        with pytest.raises(LockedError), locked(path):
            pytest.fail("the lock is on a file that nobody else finds")


def test_unlock_works_although_a_copy_of_the_descriptor_is_open(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, (tmp_path / "file").open("rb") as other:
        copy = os.dup(file.fileno())  # as a forked child holds one
        assert try_lock(file.fileno())
        assert not try_lock(other.fileno())
        unlock(file.fileno())
        assert try_lock(other.fileno())
        os.close(copy)
