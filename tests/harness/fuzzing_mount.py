"""Targets for atheris: requests through the doors of a mount (see fuzzing.py and malformed.py).

An input is a few requests, each an opcode and a node (a byte each), the length of its body (two)
and the body. Whatever they are, each is answered, and layers and what lies beside them stay as
they were. What earlier inputs have made is still there.
"""

import itertools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["unionfuse"], enable_loader_override=False):
    from harness.malformed import Door, clean

from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode

_MOST_REQUESTS = 8
_CHECK_EVERY = 2000  # inputs


def _fuzz(kind: str) -> Callable[[bytes], None]:
    made: list[Door] = []
    inputs = itertools.count(1)

    def fuzz(data: bytes) -> None:
        if not made:
            made.append(Door(_directory(), kind))
        door = made[0]
        for _ in range(_MOST_REQUESTS):
            if len(data) < 4:
                break
            opcode, node, length = data[0], data[1], int.from_bytes(data[2:4], "little")
            door.ask(opcode, node, data[4 : 4 + length])
            data = data[4 + length :]
        if next(inputs) % _CHECK_EVERY == 0:
            door.check()

    return fuzz


def _directory() -> Path:
    """A directory for this process, which is a child from here on: libFuzzer ends without a word,
    and its parent cleans up."""
    logging.disable()
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    child = os.fork()
    if child == 0:
        return directory
    code = 1
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        clean(directory)
        os._exit(code if code >= 0 else 128 - code)


def _request(opcode: int, body: bytes, node: int = 1) -> bytes:
    return bytes([opcode, node]) + len(body).to_bytes(2, "little") + body


def _seeds() -> list[bytes]:
    open_in = protocol.OPEN_IN.pack(os.O_RDWR, 0)
    read_in = protocol.READ_IN.pack(1, 0, 4096, 0, 0, 0, 0)
    return [
        _request(Opcode.LOOKUP, b"a\0") + _request(Opcode.GETATTR, bytes(16), 255),
        _request(Opcode.LOOKUP, b"a\0") + _request(Opcode.OPEN, open_in, 255)
        + _request(Opcode.READ, read_in, 255) + _request(Opcode.RELEASE, bytes(24), 255),
        _request(Opcode.READDIRPLUS, read_in) + _request(Opcode.STATFS, b""),
        _request(Opcode.MKDIR, protocol.MKDIR_IN.pack(0o755, 0) + b"new\0"),
        _request(Opcode.RENAME, protocol.RENAME_IN.pack(1) + b"new\0d\0"),
        _request(Opcode.SYMLINK, b"s2\0/etc\0") + _request(Opcode.UNLINK, b"s2\0"),
        _request(Opcode.LINK, protocol.LINK_IN.pack(2) + b"l\0"),
        _request(Opcode.CREATE, protocol.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + b"c\0"),
        _request(Opcode.SETXATTR, protocol.SETXATTR_EXT_IN.pack(1, 0, 0, 0) + b"user.a\0x"),
        _request(Opcode.GETXATTR, protocol.GETXATTR_IN.pack(64, 0) + b"user.a\0"),
        _request(Opcode.SETATTR, bytes(88)),
        _request(Opcode.BMAP, bytes(16)),
    ]  # fmt: skip


TARGETS = {kind: (_fuzz(kind), _seeds()) for kind in ("lane", "pyfuse3")}
