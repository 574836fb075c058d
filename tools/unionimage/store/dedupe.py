"""A file that several layers have is stored once, where that can be.

Files are found by xxh3 of their contents, which is taken while they are unpacked, and confirmed
byte by byte. `reflink` shares their blocks and nothing else; where the file system cannot, nothing
happens. `hardlink` makes them one file, which changes link counts, and only where owner, mode,
times and xattrs are equal too. Small files are left alone: they would cost more than they give.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from unionfuse import syscalls
from unionimage.changeset.unpack import Fingerprint
from unionimage.digest import CHUNK, Digest

if TYPE_CHECKING:
    from unionimage.store.contents import Contents

SMALLEST = 4096
"""Bytes of a file that is worth it: a block."""

_BENEATH = os.O_PATH | os.O_DIRECTORY


def possible(store: Contents, work: Path) -> bool:
    """Whether the configured way can be gone in this store; `work` is a directory in it."""
    if store.dedupe == "off":
        return False
    return store.dedupe == "hardlink" or _can_reflink(work)


def _can_reflink(work: Path) -> bool:
    source, target = work / "reflink-source", work / "reflink-target"
    try:
        source.write_bytes(b"x" * SMALLEST)
        with open(source, "rb") as old, open(target, "wb") as new:
            syscalls.clone_file(new.fileno(), old.fileno())
    except OSError:
        return False
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    return True


def share(store: Contents, directory: int, files: Sequence[Fingerprint]) -> int:
    """Share files of a layer that is not published yet with those of others.

    Args:
        directory: descriptor of the layer's directory.

    Returns:
        bytes that need no space of their own.
    """
    saved = 0
    for one in files:
        rows = store.database.rows(
            "SELECT diff_id, path FROM files WHERE hash = ? AND size = ? LIMIT 4",
            (one.hash, one.size),
        )
        for diff_id, path in rows:
            root = store.diff_path(Digest(diff_id))
            try:
                if _share(store.dedupe, root, path, directory, one.path):
                    saved += one.size
                    break
            except OSError:
                continue  # removed meanwhile, too many links, another file system
    return saved


def record(database: sqlite3.Connection, diff_id: Digest, files: Sequence[Fingerprint]) -> None:
    """Note the files of a layer, in the transaction that publishes it."""
    database.executemany(
        "INSERT INTO files VALUES (?, ?, ?, ?)",
        [(one.hash, one.size, diff_id, one.path) for one in files],
    )


def _share(how: str, root: Path, old_path: bytes, directory: int, new_path: bytes) -> bool:
    with ExitStack() as stack:
        layer = os.open(root, _BENEATH | os.O_CLOEXEC)
        stack.callback(os.close, layer)
        old_parent, old_name = _enter(stack, layer, old_path)
        new_parent, new_name = _enter(stack, directory, new_path)
        readable = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        old = os.open(old_name, readable, dir_fd=old_parent)
        stack.callback(os.close, old)
        new = os.open(new_name, readable, dir_fd=new_parent)
        stack.callback(os.close, new)
        was, now = os.fstat(old), os.fstat(new)
        if not stat.S_ISREG(was.st_mode) or now.st_nlink > 1 or not _equal(old, new):
            return False
        if how == "reflink":
            writable = os.open(new_name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=new_parent)
            stack.callback(os.close, writable)
            syscalls.clone_file(writable, old)
            os.utime(writable, ns=(now.st_mtime_ns, now.st_mtime_ns))
            return True
        if _metadata(old, was) != _metadata(new, now):
            return False
        times = os.fstat(new_parent)
        temporary = b".wh..wh.unionfuse-link"  # no layer can have this name
        os.link(old_name, temporary, src_dir_fd=old_parent, dst_dir_fd=new_parent)
        os.rename(temporary, new_name, src_dir_fd=new_parent, dst_dir_fd=new_parent)
        _restore(new_parent, times)
        return True


def _enter(stack: ExitStack, root: int, path: bytes) -> tuple[int, bytes]:
    above, _, name = path.rpartition(b"/")
    if not above:
        return root, name
    opened = syscalls.open_beneath(root, above, _BENEATH)
    stack.callback(os.close, opened)
    return opened, name


def _restore(directory: int, was: os.stat_result) -> None:
    os.utime(syscalls.proc_path(directory), ns=(was.st_atime_ns, was.st_mtime_ns))


def _metadata(file: int, status: os.stat_result) -> tuple[object, ...]:
    xattrs = {name: os.getxattr(file, name) for name in os.listxattr(file)}
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs


def _equal(old: int, new: int) -> bool:
    while True:
        data = os.read(old, CHUNK)
        if data != os.read(new, CHUNK):
            return False
        if not data:
            return True
