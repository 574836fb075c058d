"""Files and trees of the store: published by one rename, removed out of sight."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def new_id() -> str:
    """A name that nobody else has."""
    return os.urandom(16).hex()


def publish(staged: Path, place: Path, staging: Path) -> None:
    """Rename into place. What lies there is a leftover without a row and is moved out of the way.

    To be called inside a write transaction that also writes the row.
    """
    try:
        os.rename(staged, place)
    except OSError:
        if not os.path.lexists(place):
            raise
        hide(place, staging)
        os.rename(staged, place)


def hide(path: Path, staging: Path) -> Path:
    """Move something away into a staging directory; whoever owns that removes it."""
    staging.mkdir(mode=0o700, parents=True, exist_ok=True)
    away = staging / f"removed-{new_id()}"
    os.rename(path, away)
    return away


def remove(path: Path) -> None:
    """Remove a file or a tree, also one whose directories are not writable; never follows links."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            path.unlink()
            return
    except FileNotFoundError:
        return
    import shutil

    shutil.rmtree(path, onerror=_make_writable)


def _make_writable(function: Callable[..., Any], path: str, error: Any) -> None:
    kind, value, _ = error
    if issubclass(kind, FileNotFoundError):
        return
    if not issubclass(kind, PermissionError):
        raise value
    for one in (os.path.dirname(path), path):
        if stat.S_ISDIR(os.lstat(one).st_mode):
            os.chmod(one, 0o700)
    if function in (os.open, os.lstat, os.scandir, os.listdir):
        import shutil

        shutil.rmtree(path)
    elif stat.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)


def sync_file_system(path: Path) -> None:
    """syncfs(2): wait until all of a file system is on the disk."""
    import ctypes

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), os.fspath(path))
    finally:
        os.close(descriptor)
