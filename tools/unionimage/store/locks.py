"""File locks that end with their process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileLock:
    """An exclusive flock(2) on a file of its own. The descriptor is closed on exec."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def try_take(cls, path: Path, *, create: bool = True) -> FileLock | None:
        """The lock, or None where someone else has it (or, without `create`, no file is there).

        None, too, where someone else had it and removed the file just before it was ours.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_at(descriptor, path):
            return cls(path, descriptor)
        os.close(descriptor)
        return None

    @classmethod
    def wait(cls, path: Path) -> FileLock:
        """Take the lock, however long it takes; another may remove the file meanwhile."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                return cls(path, descriptor)
            os.close(descriptor)

    def release(self, *, remove: bool = True) -> None:
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether others who open the path now find the file that is open here."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
