"""Locks on files that other processes respect. The system releases them when a process dies, however it dies."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path


class LockedError(RuntimeError):
    """Another process, or another open file of this one, holds the lock."""


def try_lock(descriptor: int) -> bool:
    """Locks an open file until `unlock`, or until its descriptor is closed; False where somebody else holds the lock.

    A file system without locks gets a warning and True: work goes on, unprotected.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warnings.warn(f"this file system has no locks ({error}): start no second process there", stacklevel=2)
    return True


def unlock(descriptor: int) -> None:
    """Releases the lock at once, although a forked child may still hold the descriptor."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file inside; it contains the holder's process id and is removed at the end.

    Raises:
        LockedError: another process holds it; the message names the file and that process.
        OSError: the file cannot be made.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file: an empty one stays there
            path.unlink()
        unlock(descriptor)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """The descriptor of the locked file."""
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
        os.close(descriptor)  # the holder before us removed the file after we opened it: make another


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """ " 123" for the process id in a lock file, "" where there is none to read."""
    with contextlib.suppress(OSError):
        number = path.read_text(encoding="ascii", errors="replace").strip()
        if number.isdigit():
            return f" {number}"
    return ""


__all__ = ["LockedError", "locked", "try_lock", "unlock"]
