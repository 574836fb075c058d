"""Who a container's process is: `--user` and the image's USER, looked up in the image's own files.

The files are opened confined to the root file system: a symbolic link in an image cannot lead out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from unionimage.errors import UserError

LARGEST_FILE = 1 << 20


class User(NamedTuple):
    """uid, gid, the further groups, and the home directory."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


def find(root: Path, text: str, further: Sequence[str] = ()) -> User:
    """The user that `text` means (`NAME`, `UID`, `USER:GROUP`; empty is root) in an image.

    `further` are the names or numbers of --group-add. A number need not be in the files. Raises
    UserError for a name that is not there.
    """
    name, colon, group = (text or "0").partition(":")
    passwd = _table(root, "etc/passwd", 7)
    groups = _table(root, "etc/group", 4)
    row = _row(passwd, name)
    if row is None and not name.isdigit():
        raise UserError(f"unable to find user {name}: no matching entries in passwd file")
    uid = int(row[2]) if row else int(name)
    gid = int(row[3]) if row else 0
    login = row[0] if row else ""
    memberships = [int(entry[2]) for entry in groups if login and login in entry[3].split(",")]
    if colon:
        gid, memberships = _group(groups, group), []
    memberships += [_group(groups, one) for one in further]
    if uid > 0xFFFFFFFE or gid > 0xFFFFFFFE:
        raise UserError(f"user {text!r}: the number is out of range")
    unique = tuple(dict.fromkeys(number for number in memberships if number != gid))
    return User(uid, gid, unique, (row[5] if row and row[5] else "/"))


def _group(groups: Iterable[Sequence[str]], name: str) -> int:
    row = _row(groups, name)
    if row is None and not name.isdigit():
        raise UserError(f"unable to find group {name}: no matching entries in group file")
    return int(row[2]) if row else int(name)


def _row(table: Iterable[Sequence[str]], name: str) -> Sequence[str] | None:
    rows = list(table)
    for row in rows:
        if row[0] == name:
            return row
    return next((row for row in rows if name.isdigit() and row[2] == name), None)


def _table(root: Path, path: str, width: int) -> list[list[str]]:
    """The well-formed lines of a colon-separated file; empty when there is none."""
    try:
        descriptor = open_inside(root, path)
    except OSError:
        return []
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(LARGEST_FILE).decode(errors="replace")
    rows = [line.split(":") for line in text.splitlines() if not line.startswith("#")]
    return [row for row in rows if len(row) >= width and row[2].isdigit() and _gid_fits(row, width)]


def _gid_fits(row: Sequence[str], width: int) -> bool:
    return width == 4 or row[3].isdigit()


def open_inside(root: Path, path: str, flags: int = os.O_RDONLY) -> int:
    """Open a path below `root` as if root were /; symbolic links cannot lead out of it."""
    from unionfuse import syscalls

    if not flags & os.O_PATH:
        flags |= os.O_NONBLOCK  # a FIFO in an image must not hang us
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.openat2(
            directory,
            os.fsencode(path),
            flags | os.O_CLOEXEC,
            resolve=syscalls.RESOLVE_IN_ROOT,
        )
    finally:
        os.close(directory)
