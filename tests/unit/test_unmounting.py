"""How a reader of /dev/fuse learns that the mount has ended.

An unmount that comes while a request is being read is told as ECONNABORTED (fs/fuse/dev.c,
fuse_dev_do_read), which cannot be had at will: here the reader only says that it was.
"""

import errno
import logging
import os
import socket
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest

from unionfuse.express.lane import Lane
from unionfuse.layers.layer import LayerStack
from unionfuse.options import parse
from unionfuse.pyfuse.eventloop import EventLoop
from unionfuse.union import Union
from unionfuse.wire import protocol


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EIO])
def test_pyfuse3_ends_with_the_mount(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyfuse3

    async def main() -> None:
        raise BaseExceptionGroup("Exceptions from Trio nursery", [OSError(number, "")])

    monkeypatch.setattr(pyfuse3, "main", main)
    options = parse(["-o", f"lowerdir={tmp_path}", "/mnt"]).options
    union = Union(LayerStack.open(options.lowerdir), options)
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    init = b"".join([(7).to_bytes(4, "little"), (39).to_bytes(4, "little"), bytes(56)])
    header = protocol.IN_HEADER.pack(40 + len(init), protocol.Opcode.INIT, 2, 0, 0, 0, 0, 0, 0)
    kernel.send(protocol.init_for_libfuse(header + init))
    ended = Event()
    with kernel:
        loop = EventLoop(fuse.detach(), union, options, lambda: None, ended.set)
        assert ended.wait(20)
    assert loop.failed == (number == errno.EIO)


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EIO])
def test_the_lane_ends_with_the_mount(number: int, caplog: pytest.LogCaptureFixture) -> None:
    ended = Event()
    loop = SimpleNamespace(run=lambda _slot: number)
    lane = SimpleNamespace(_loop=loop, _survivor=None, _end=ended.set)
    with caplog.at_level(logging.ERROR):
        Lane._serve_until_end(cast(Any, lane), None)
    assert ended.is_set()
    assert (os.strerror(number) in caplog.text) == (number == errno.EIO)
