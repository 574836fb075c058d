"""What READDIRPLUS answers, taken apart."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from unionfuse.wire import protocol


def records(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, node id, cookie) of each record of READDIRPLUS."""
    at = 0
    while at < len(data):
        (node,) = struct.unpack_from("=Q", data, at)
        _, cookie, length, _ = protocol.DIRENT.unpack_from(data, at + 128)
        yield data[at + 152 : at + 152 + length], node, cookie
        at += (152 + length + 7) & ~7
