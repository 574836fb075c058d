"""The readers of the compiled loop, with a test in the place of the kernel: who reads and looks."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.waiting import wait_until

from unionfuse.express._lane import Loop
from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode

QUICK, PYTHON = Opcode.ACCESS, Opcode.MKDIR  # what the loop answers by itself, and what it does not
WAYS = ("off", "auto", "on")


class Readers:
    """Two threads of a loop, and what they read."""

    def __init__(self, way: str) -> None:
        self.kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(20)
        self.may_go_on = threading.Event()
        self.called = threading.Event()
        self._fuse = fuse
        self.loop = Loop(fuse.fileno(), self._handle)
        if way != "off":
            self.loop.spin(always=way == "on")
        self._threads = [threading.Thread(target=self.loop.run) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def _handle(self, *_: object) -> bytes:
        self.called.set()
        assert self.may_go_on.wait(20)
        return b""

    def send(self, opcode: int, unique: int) -> None:
        self.kernel.send(protocol.IN_HEADER.pack(40, opcode, unique, 1, 0, 0, 0, 0, 0))

    def answered(self) -> int:
        _, error, unique = protocol.OUT_HEADER.unpack(self.kernel.recv(100))
        assert error == 0
        return int(unique)

    def ask(self, count: int) -> None:
        """One request after the other."""
        for unique in range(2, 2 + count):
            self.send(QUICK, unique)
            assert self.answered() == unique

    def switches(self) -> dict[str, str]:
        """How often each reader was put to sleep, or taken off its processor."""
        found = {}
        for thread in self._threads:
            status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            found[str(thread.native_id)] = status[status.index("voluntary_ctxt") :]
        return found

    def close(self) -> None:
        self.may_go_on.set()
        self.loop.stop()
        self.kernel.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self._threads)
        self.kernel.close()
        self._fuse.close()


@pytest.fixture(params=WAYS)
def readers(request: pytest.FixtureRequest) -> Iterator[Readers]:
    found = Readers(request.param)
    yield found
    found.close()


def test_each_request_is_answered_once(readers: Readers) -> None:
    readers.ask(3000)
    for unique in range(10_000, 10_100):
        readers.send(QUICK, unique)
    assert sorted(readers.answered() for _ in range(100)) == list(range(10_000, 10_100))


def test_requests_are_served_while_python_is_busy(readers: Readers) -> None:
    for number in range(20):
        readers.ask(40)
        readers.called.clear()
        readers.may_go_on.clear()
        readers.send(PYTHON, 1000 + number)
        assert readers.called.wait(20)
        readers.ask(40)
        readers.may_go_on.set()
        assert readers.answered() == 1000 + number


def test_idle_readers_sleep(readers: Readers) -> None:
    readers.ask(2000)

    def asleep() -> bool:
        before = readers.switches()
        return threading.Event().wait(0.3) or readers.switches() == before

    wait_until(asleep, what="sleep")
    readers.ask(100)  # and wake up again


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is nobody to wait for")
def test_requests_are_found_by_looking_where_that_is_asked_for() -> None:
    found = {}
    for way in ("off", "on"):
        readers = Readers(way)
        readers.ask(3000)
        found[way] = readers.loop.found_awake()
        readers.close()
    assert found["off"] == 0 and found["on"] > 0


def test_nobody_looks_on_one_processor() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # of this thread, and of those that it starts
    try:
        readers = Readers("on")
        readers.ask(500)
        assert readers.loop.found_awake() == 0
        readers.close()
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("way", WAYS)
def test_readers_end_wherever_they_are(way: str) -> None:
    for count in (0, 1, 50, 400, 401, 402):
        readers = Readers(way)
        readers.ask(count)
        readers.close()
