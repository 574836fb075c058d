"""The doors of a mount with a test in the place of the kernel, which sends whatever it likes.

A socket stands for /dev/fuse; behind it is all that a mount has: the compiled loop, the union on
real directories, pyfuse3. There can be one in a process, as there can be one pyfuse3.
"""

import os
import resource
import signal
import socket
import struct
import subprocess
from pathlib import Path

from harness.layers import Dir, HardLink, Layer, Symlink, Whiteout, build
from harness.mounts import fingerprint, remove_tree
from unionfuse.express.lane import Lane
from unionfuse.layers.layer import LayerStack
from unionfuse.options import parse
from unionfuse.pyfuse.eventloop import EventLoop
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode

_LOWER: Layer = {
    "a": "x" * 5000,
    "b": HardLink("a"),
    "d/e": "y",
    "d/f/g": "deep",
    "s": Symlink("../../outside/secret"),
    "gone": "hidden",
}
_TOP: Layer = {"d/e": "top", "gone": Whiteout(), "o": Dir(opaque="kernel"), "d/h": Symlink("/")}

_INIT = struct.pack("=IIII48x", 7, 39, 1 << 17, int(protocol.ALWAYS & 0xFFFFFFFF))
_UNANSWERED = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY}
_ONCE = {Opcode.INIT, 38}  # and DESTROY: what the kernel says at the beginning and at the end
_MAKE_ENTRIES = {
    *(Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK, Opcode.CREATE),
}
_LARGEST_FILE = 32768  # bytes; a request may ask for more than there is
_NOBODY_ANSWERS = 10.0  # seconds

# Where libfuse, which takes the kernel at its word, reads how much follows: the number's offset in
# the body, and that of what it counts in units of so many bytes.
_COUNTS = {
    Opcode.WRITE: (16, 40, 1),
    Opcode.SETXATTR: (0, 8, 1),
    Opcode.BATCH_FORGET: (0, 8, 16),
    Opcode.IOCTL: (24, 32, 1),
}


class Door:
    """A union behind one of its doors: "lane" or "pyfuse3".

    `directory` gets the layers, upper and work, and a file beside them that must stay as it is.
    """

    def __init__(self, directory: Path, kind: str) -> None:
        self._directory, self._kind = directory, kind
        self._beside = directory / "outside"
        self._beside.mkdir()
        (self._beside / "secret").write_text("secret")
        self._layers = [build(directory / "top", _TOP), build(directory / "lower", _LOWER)]
        for name in ("upper", "work"):
            (directory / name).mkdir()
        self._before = self._fingerprints()
        self._nodes = [1]
        self._unique = 2
        os.umask(0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
        layers = ":".join(map(str, self._layers))
        line = f"lowerdir={layers},upperdir={directory}/upper,workdir={directory}/work"
        options = parse(["-o", f"{line},passthrough=off,uring=off", "/mnt"]).options
        self._kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kernel.settimeout(_NOBODY_ANSWERS)
        self.union = Union(LayerStack.open(options.lowerdir), options)
        if kind == "lane":
            self._send(Opcode.INIT, 0, _INIT)
            Lane(fuse.detach(), self.union, options)
        else:
            request = protocol.IN_HEADER.pack(40 + len(_INIT), Opcode.INIT, 2, 0, 0, 0, 0, 0, 0)
            self._kernel.send(protocol.init_for_libfuse(request + _INIT))
            EventLoop(fuse.detach(), self.union, options, lambda: None, lambda: None)
        self._kernel.recv(1 << 16)

    def _fingerprints(self) -> list[object]:
        return [fingerprint(path) for path in (self._beside, *self._layers)]

    def _send(self, opcode: int, node: int, body: bytes) -> int:
        self._unique += 2
        size = protocol.IN_HEADER.size + len(body)
        header = protocol.IN_HEADER.pack(size, opcode, self._unique, node, 0, 0, os.getpid(), 0, 0)
        self._kernel.send(header + body)
        return self._unique

    def ask(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes] | None:
        """The answer to a request, (errno, body); None where none is due.

        `node` below 16 is meant as it is; others stand for nodes that were answered before.
        """
        if opcode in _ONCE:
            return None
        if self._kind == "pyfuse3":
            body = _as_libfuse_needs_it(opcode, body)
        number = node if node < 16 else self._nodes[node % len(self._nodes)]
        allowed = {0}
        unique = self._send(opcode, number, body)
        if opcode in _UNANSWERED:
            if opcode == Opcode.INTERRUPT:
                allowed.add(unique)  # EAGAIN: there was nothing to interrupt
            unique = self._send(Opcode.GETATTR, 1, bytes(16))
        while True:
            reply = self._kernel.recv((1 << 20) + 8192)
            length, error, answered = protocol.OUT_HEADER.unpack_from(reply)
            assert length == len(reply) and -4096 < error <= 0, (opcode, length, error)
            if answered == unique:
                break
            assert answered in allowed, f"{opcode}: an answer to {answered} instead of {unique}"
        if opcode in _UNANSWERED:
            assert error == 0, "the root is gone"
            return None
        if opcode in _MAKE_ENTRIES and not error:
            (found,) = struct.unpack_from("=Q", reply, protocol.OUT_HEADER.size)
            self._nodes = [*self._nodes[-200:], found or 1]
        return -error, reply[protocol.OUT_HEADER.size :]

    def check(self) -> None:
        """The layers, and what lies beside them, are as before; the root answers."""
        assert self._fingerprints() == self._before
        assert self.ask(Opcode.GETATTR, 1, bytes(16)) is not None


def clean(directory: Path) -> None:
    """Remove what a door was made in: some of it may be immutable by now."""
    command = ["chattr", "-R", "-f", "-i", "-a", directory / "upper", directory / "work"]
    subprocess.run(command, stderr=subprocess.DEVNULL)
    remove_tree(directory)


def _as_libfuse_needs_it(opcode: int, body: bytes) -> bytes:
    """No shorter than any request's fixed part, names ended, and no more counted than there is."""
    body = body.ljust(128, b"\0") + bytes(2)
    if opcode in _COUNTS:
        at, start, unit = _COUNTS[Opcode(opcode)]
        (count,) = struct.unpack_from("=I", body, at)
        if opcode == Opcode.SETXATTR:
            start = body.index(b"\0", start) + 1
            body = body[:4] + bytes([body[4] & 3, 0, 0, 0]) + body[8:]  # pyfuse3 ends otherwise
        count = min(count, (len(body) - start) // unit)
        body = body[:at] + struct.pack("=I", count) + body[at + 4 :]
    return body
