"""The lane with a test in the place of the kernel: what it does not know is answered by pyfuse3."""

import errno
import os
import socket
import struct
import sys
from pathlib import Path

from harness.layers import build

from unionfuse.express.lane import Lane
from unionfuse.layers.layer import LayerStack
from unionfuse.options import parse
from unionfuse.union import Union
from unionfuse.wire import protocol

INIT_BODY = struct.pack("=IIII48x", 7, 39, 1 << 17, int(protocol.ALWAYS & 0xFFFFFFFF))


def asked(kernel: socket.socket, opcode: int, unique: int, body: bytes = b"") -> tuple[int, int]:
    """Send a request as the kernel would; returns (errno, unique) of the reply."""
    size = protocol.IN_HEADER.size + len(body)
    kernel.send(protocol.IN_HEADER.pack(size, opcode, unique, 1, 0, 0, os.getpid(), 0, 0) + body)
    _, error, answered = protocol.OUT_HEADER.unpack_from(kernel.recv(1 << 20))
    return -error, answered


def relayed(layer: Path) -> str:
    """What went wrong; empty for nothing."""
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    options = parse(["-o", f"lowerdir={layer},passthrough=off,uring=off", "/mnt"]).options
    union = Union(LayerStack.open(options.lowerdir), options)
    size = protocol.IN_HEADER.size + len(INIT_BODY)
    kernel.send(
        protocol.IN_HEADER.pack(size, protocol.Opcode.INIT, 2, 0, 0, 0, 0, 0, 0) + INIT_BODY
    )
    lane = Lane(fuse.detach(), union, options)
    if protocol.OUT_HEADER.unpack_from(kernel.recv(1 << 20))[1:] != (0, 2):
        return "INIT was refused"
    if asked(kernel, protocol.Opcode.GETATTR, 4, bytes(16)) != (0, 4):
        return "GETATTR of the root failed"
    if "pyfuse3" in sys.modules:
        return "pyfuse3 was loaded before it was needed"
    for unique, opcode in ((6, protocol.Opcode.BMAP), (8, 63), (10, 4000)):
        if asked(kernel, opcode, unique, bytes(64)) != (errno.ENOSYS, unique):
            return f"opcode {opcode}"
    if "pyfuse3" not in sys.modules or lane.failed:
        return "pyfuse3 did not answer"
    return ""


def test_what_the_lane_does_not_know_is_answered_by_pyfuse3(tmp_path: Path) -> None:
    layer = build(tmp_path / "layer", {"a": "x"})
    child = os.fork()  # there can be one pyfuse3 in a process
    if child == 0:
        said = "an exception"
        try:
            said = relayed(layer)
        finally:
            os.write(2, said.encode())
            os._exit(bool(said))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
