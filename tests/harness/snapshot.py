"""A whole tree as data, and the difference of two in words."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass(frozen=True)
class Record:
    """What is compared of one file. Fields that mean nothing for its kind are None."""

    kind: str
    mode: str
    uid: int
    gid: int
    size: int | None
    content: str | None
    nlink: int | None
    xattrs: tuple[tuple[str, str], ...]
    rdev: tuple[int, int] | None
    target: bytes | None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    atime_ns: int | None = None
    ino: int | None = None


Tree = dict[bytes, Record]


def snapshot(
    root: Path | str,
    *,
    content: bool = True,
    times: Iterable[str] = (),
    inodes: bool = False,
    skip: Callable[[bytes], bool] = lambda path: False,
) -> Tree:
    """Return every file below `root` by its path, `root` itself as ``b"."``.

    `times` names the fields to fill out of "mtime_ns", "ctime_ns", "atime_ns". Contents are read by
    O_NOATIME where that is allowed, so looking changes nothing.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    tree: Tree = {}
    try:
        pending = [b"."]
        while pending:
            path = pending.pop()
            info = os.stat(path, dir_fd=top, follow_symlinks=False)
            tree[path] = _record(top, path, info, content, frozenset(times), inodes)
            if stat.S_ISDIR(info.st_mode):
                for name in _names(top, path):
                    child = name if path == b"." else path + b"/" + name
                    if not skip(child):
                        pending.append(child)
    finally:
        os.close(top)
    return tree


def _names(top: int, path: bytes) -> list[bytes]:
    directory = _open_quietly(top, path, os.O_DIRECTORY)
    try:
        return sorted(os.fsencode(name) for name in os.listdir(directory))
    finally:
        os.close(directory)


def _open_quietly(top: int, path: bytes, flags: int = 0) -> int:
    flags |= os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_NOATIME, dir_fd=top)
    except PermissionError:
        return os.open(path, flags, dir_fd=top)


def _record(
    top: int, path: bytes, info: os.stat_result, content: bool, times: frozenset[str], inodes: bool
) -> Record:
    kind = stat.S_IFMT(info.st_mode)
    regular, is_device = kind == stat.S_IFREG, kind in (stat.S_IFCHR, stat.S_IFBLK)
    # fd-relative listxattr does not exist; /proc names the same directory without a path of ours
    through = b"/proc/self/fd/%d/%s" % (top, path)
    names = sorted(os.listxattr(through, follow_symlinks=False))
    return Record(
        kind=KINDS[kind],
        mode=f"{stat.S_IMODE(info.st_mode):04o}",
        uid=info.st_uid,
        gid=info.st_gid,
        size=info.st_size if regular or kind == stat.S_IFLNK else None,
        content=_digest(top, path) if regular and content else None,
        nlink=None if kind == stat.S_IFDIR else info.st_nlink,
        xattrs=tuple(
            (name, os.getxattr(through, name, follow_symlinks=False).hex()) for name in names
        ),
        rdev=(os.major(info.st_rdev), os.minor(info.st_rdev)) if is_device else None,
        target=os.readlink(path, dir_fd=top) if kind == stat.S_IFLNK else None,
        **{name: getattr(info, f"st_{name}") for name in times},
        ino=info.st_ino if inodes else None,
    )


_BLOCK = 1 << 20


def _digest(top: int, path: bytes) -> str:
    """Return a digest in which holes and zeros are equal, without reading the holes."""
    descriptor = _open_quietly(top, path)
    digest, offset = hashlib.blake2b(digest_size=16), 0
    try:
        while (offset := _next_data(descriptor, offset)) >= 0:
            block = os.pread(descriptor, _BLOCK, offset)
            if not block:
                break
            if any(block):
                digest.update(b"%d:" % offset)
                digest.update(block)
            offset += _BLOCK
        return digest.hexdigest()
    finally:
        os.close(descriptor)


def _next_data(descriptor: int, offset: int) -> int:
    """Return the start of the block in which the next data at or after `offset` lies, or -1."""
    try:
        found = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        return -1 if error.errno == errno.ENXIO else offset
    return max(offset, found // _BLOCK * _BLOCK)


def difference(left: Tree, right: Tree, names: tuple[str, str] = ("left", "right")) -> list[str]:
    """Return one line for each way in which the trees differ; the empty list if they are equal."""
    lines = []
    for path in sorted(left.keys() | right.keys()):
        shown = os.fsdecode(path)
        if path not in left:
            lines.append(f"{shown}: only in {names[1]} ({right[path].kind})")
        elif path not in right:
            lines.append(f"{shown}: only in {names[0]} ({left[path].kind})")
        elif left[path] != right[path]:
            for item in fields(Record):
                one, other = getattr(left[path], item.name), getattr(right[path], item.name)
                if one != other:
                    lines.append(
                        f"{shown}: {item.name} is {one!r} in {names[0]}, {other!r} in {names[1]}"
                    )
    return lines


def assert_equal(left: Tree, right: Tree, names: tuple[str, str] = ("left", "right")) -> None:
    lines = difference(left, right, names)
    if lines:
        more = f"\n… and {len(lines) - 40} more" if len(lines) > 40 else ""
        raise AssertionError("the trees differ:\n" + "\n".join(lines[:40]) + more)
