"""Locks between processes, by way of files. The operating system releases a lock when its process ends or is killed."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# Not inside the functions: a lock may be released while the interpreter shuts down, when nothing can be imported any more.
if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


class LockedError(RuntimeError):
    """Another process holds the lock, or this process does by another open file."""


def try_lock(descriptor: int) -> bool:
    """Locks an open file until `unlock` or until the descriptor is closed. Returns False where another one holds the lock.

    On a file system without locks it warns and returns True: the work goes on unprotected.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warnings.warn(
            f"this file system has no locks ({error}): do not start a second process that writes there", stacklevel=2
        )
    return True


def unlock(descriptor: int) -> None:
    """Releases the lock now, even if a forked child still has the descriptor open."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file while the block runs. The file contains this process's id and is removed at the end.

    Raises:
        LockedError: another process holds the lock; the message names the file and that process.
        OSError: the file cannot be created.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot remove an open file: an empty file stays
            path.unlink()
        unlock(descriptor)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Creates and locks the file; returns its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(descriptor):
                raise LockedError(f"{path}: another process{_holder(path)} holds this lock")
            if _is_file_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the previous holder removed the file after we opened it: create it again


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """The process id in a lock file, after a space; "" where the file holds none."""
    with contextlib.suppress(OSError):
        number = path.read_text(encoding="ascii", errors="replace").strip()
        if number.isdigit():
            return f" {number}"
    return ""


__all__ = ["LockedError", "locked", "try_lock", "unlock"]
