"""Requests and replies in the union's terms: a request taken apart, the bodies of replies made.

Between the wire format (protocol.py) and the values of the union (node.py); asks nobody anything.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from unionfuse.syscalls import NOW
from unionfuse.tree.node import Caller, Entry
from unionfuse.wire import protocol
from unionfuse.wire._attributes import Attributes

ENTRY_SIZE = protocol.ENTRY_OUT.size + protocol.ATTR.size
_STATX_BASIC_STATS = 0x7FF

MALFORMED = (struct.error, ValueError, IndexError, OverflowError)
"""What unpacking a malformed request raises; the caller gets EINVAL."""


class Call(NamedTuple):
    """One request. `body` is what follows the header."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: bytes

    def names(self, offset: int, count: int) -> list[bytes]:
        """NUL-terminated names at the end of the body. Raises EINVAL where they are malformed."""
        parts = self.body[offset:].split(b"\0")
        if parts.pop() or len(parts) != count or b"" in parts:
            raise OSError(errno.EINVAL, "malformed names")
        return parts

    def caller(self, umask: int = 0) -> Caller:
        """Who asks."""
        return Caller(self.uid, self.gid, self.pid, umask)


Method = Callable[[Call], bytes | None]
"""Serves a request: the body of its reply, or None where the reply comes later (or never)."""


def entry_out(entry: Entry, timeout: float) -> bytes:
    """struct fuse_entry_out; `timeout` is how many seconds the name holds."""
    return entry_header(entry.node, timeout, entry.attr_valid) + entry.attributes.wire()


def entry_header(node: int, name_valid: float, attr_valid: float) -> bytes:
    """What comes before the attributes in it: a node id, and how many seconds what holds."""
    return node.to_bytes(8, sys.byteorder) + _lasting(name_valid, attr_valid)


@cache
def _lasting(name_valid: float, attr_valid: float) -> bytes:
    """An entry's header behind the node id: only few differ."""
    name_seconds, name_nanoseconds = _duration(name_valid)
    seconds, nanoseconds = _duration(attr_valid)
    header = protocol.ENTRY_OUT.pack(0, 0, name_seconds, seconds, name_nanoseconds, nanoseconds)
    return header[8:]


def _duration(seconds: float) -> tuple[int, int]:
    if seconds >= protocol.FOREVER:
        return protocol.FOREVER, 0
    return int(seconds), int(seconds % 1 * 10**9)


def dirent(name: bytes, cookie: int, entry: Entry, timeout: float, plus: bool) -> bytes:
    """struct fuse_dirent, or fuse_direntplus where `plus`; arguments as for `entry_out`."""
    found = entry.attributes
    own = protocol.DIRENT.pack(found.ino, cookie, len(name), stat.S_IFMT(found.mode) >> 12)
    return (entry_out(entry, timeout) if plus else b"") + own + name + bytes(-len(name) % 8)


def sized(value: bytes, room: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR: the size alone where no room was offered."""
    if not room:
        return protocol.GETXATTR_OUT.pack(len(value), 0)
    if len(value) > room:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value


def moment(fields: int, given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
    """A time of SETATTR as in `Changes`; `given` and `now` are its bits in `fields`."""
    if not fields & given:
        return None
    if fields & now:
        return NOW
    if seconds >> 63:
        seconds -= 1 << 64
    return seconds * 10**9 + nanoseconds


def attr_out(found: Attributes, valid: float) -> bytes:
    """struct fuse_attr_out; `valid` is how many seconds the attributes hold."""
    return protocol.ATTR_OUT.pack(*_duration(valid), 0) + found.wire()


def statx_out(found: Attributes, valid: float) -> bytes:
    """struct fuse_statx_out; `valid` as for `attr_out`."""
    return protocol.STATX_OUT.pack(*_duration(valid), 0) + _statx(found)


def _statx(found: Attributes) -> bytes:
    def parts(nanoseconds: int) -> tuple[int, int, int]:
        return nanoseconds // 10**9, nanoseconds % 10**9, 0

    return protocol.STATX.pack(
        _STATX_BASIC_STATS,
        found.blksize,
        0,
        found.nlink,
        found.uid,
        found.gid,
        found.mode,
        0,
        found.ino,
        found.size,
        found.blocks,
        0,
        *parts(found.atime_ns),
        *parts(0),
        *parts(found.ctime_ns),
        *parts(found.mtime_ns),
        os.major(found.rdev),
        os.minor(found.rdev),
        0,
        0,
    )
