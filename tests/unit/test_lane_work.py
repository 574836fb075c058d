"""What the lane does in threads that may wait, and opens that the kernel does not take over."""

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness.layers import build

from unionfuse.express.lane import Lane
from unionfuse.express.passthrough import Passthrough
from unionfuse.layers.layer import LayerStack
from unionfuse.options import parse
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire.protocol import OpenFlag

INIT_BODY = struct.pack("=IIII48x", 7, 39, 1 << 17, int(protocol.ALWAYS & 0xFFFFFFFF))


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[tuple[Lane, socket.socket]]:
    """A lane, and the kernel's end of its channel."""
    layer = build(tmp_path / "layer", {"a": "x"})
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(20)
    options = parse(["-o", f"lowerdir={layer},passthrough=off,uring=off", "/mnt"]).options
    union = Union(LayerStack.open(options.lowerdir), options)
    size = protocol.IN_HEADER.size + len(INIT_BODY)
    header = protocol.IN_HEADER.pack(size, protocol.Opcode.INIT, 2, 0, 0, 0, 0, 0, 0)
    kernel.send(header + INIT_BODY)
    made = Lane(fuse.detach(), union, options)
    kernel.recv(1 << 20)
    yield made, kernel
    made._loop.stop()
    kernel.shutdown(socket.SHUT_RDWR)  # readers see the end
    made.close()
    kernel.close()
    union.close()


def answered(kernel: socket.socket) -> int:
    return int(protocol.OUT_HEADER.unpack_from(kernel.recv(1 << 20))[2])


def test_works_that_wait_for_each_other_are_done_at_once(
    lane: tuple[Lane, socket.socket],
) -> None:
    """A thread that has been told of one work is not free for the next, though it still waits."""
    made, kernel = lane
    for round_number in range(20):
        made.later(4, lambda: b"")  # leaves a thread that waits for the next one
        assert answered(kernel) == 4
        together = threading.Barrier(3)

        def wait(together: threading.Barrier = together) -> bytes:
            together.wait(10)
            return b""

        for unique in (6, 8, 10):
            made.later(unique + 100 * round_number, wait)
        got = sorted(answered(kernel) - 100 * round_number for _ in range(3))
        assert got == [6, 8, 10]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EIO, errno.EPERM])
def test_what_the_kernel_does_not_take_over_is_read_through_the_page_cache(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[tuple[object, ...]]()

    def refuse(*call: object) -> int:
        calls.append(call)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    files = Passthrough(-1, True, cast(Any, SimpleNamespace()))
    assert files.opened(7, 1, 3, True) == (OpenFlag.KEEP_CACHE, 0)
    assert len(calls) == 1
    files.released(7, 1)
    files.close()
    assert len(calls) == 1  # nothing was registered that has to be given back
