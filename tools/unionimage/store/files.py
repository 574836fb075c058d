"""Files and trees of the store: published by one rename, removed out of sight."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

# Of linux/fs.h, for machines of 64 bits.
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x20000


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
        is_tree = stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_tree:
        path.unlink(missing_ok=True)
        return
    parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_tree(parent, path.name)
    finally:
        os.close(parent)


def _remove_tree(parent: int, name: str) -> None:
    """As shutil.rmtree does it, which is slow to import; somebody else may be removing it too."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            opened = os.open(name, flags, dir_fd=parent)
        except PermissionError:
            os.chmod(name, 0o700, dir_fd=parent)
            opened = os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        with os.scandir(opened) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        if found and os.geteuid() != 0:
            os.fchmod(opened, 0o700)
        for one, is_tree in found:
            if is_tree:
                _remove_tree(opened, one)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(one, dir_fd=opened)
    finally:
        os.close(opened)
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=parent)


def spread_trees(directory: Path) -> None:
    """Have ext4 begin each tree below a directory in a part of the disk of its own (chattr +T).

    Where files have just been deleted it looks at each of their inodes for every new file, for
    minutes: a layer that is unpacked there after a `prune` takes twice the time. (Linux,
    fs/ext4/ialloc.c, `find_group_orlov` and `recently_deleted`.) Other file systems refuse.
    """
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            answer = fcntl.ioctl(opened, _FS_IOC_GETFLAGS, bytes(8))
            flags = int.from_bytes(answer[:4], sys.byteorder)
            if not flags & _FS_TOPDIR_FL:
                wanted = (flags | _FS_TOPDIR_FL).to_bytes(4, sys.byteorder)
                fcntl.ioctl(opened, _FS_IOC_SETFLAGS, wanted + bytes(4))
    finally:
        os.close(opened)


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
