"""The default network of RUN steps: one of their own, which leads out through slirp4netns.

A network namespace is made when a step needs one and serves the next step afterwards; steps that
run side by side have different ones. It hangs on nothing but a descriptor and a pipe of the build:
a build that is killed leaves no interface, address or firewall rule behind. `unionfuse run` as
root makes bridges instead: containers publish ports and talk to each other, steps do neither.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unionfuse import syscalls
from unionimage.errors import UserError
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    from unionimage.container.slirp import Connection

_CLONE_NEWNET = 0x40000000


class Network(NamedTuple):
    """What a step is given.

    Attributes:
        namespace: of its network: a path; or `host`; or empty, for a fresh one with only `lo`.
        resolver: what it sees as /etc/resolv.conf.
    """

    namespace: str
    resolver: bytes


class Networks:
    """The networks of one build; used from several threads."""

    def __init__(self, scratch: Callable[[], Path]) -> None:
        """Args: `scratch` gives an empty directory."""
        self._scratch = scratch
        self._lock = threading.Lock()
        self._free: list[tuple[int, Connection]] = []
        self._all: list[tuple[int, Connection]] = []
        self._missing = ""

    @contextlib.contextmanager
    def taken(self, mode: str, warn: Callable[[bytes], None]) -> Iterator[Network]:
        """The network of one step, for as long as it runs.

        Args:
            mode: default, none or host.
            warn: is told when `default` can only be the host's.
        """
        if mode == "default":
            with contextlib.ExitStack() as stack:
                try:
                    namespace = self._take(stack)
                except UserError as error:
                    if not self._missing:
                        self._missing = error.message
                        warn(f"RUN has the host's network: {error.message}\n".encode())
                else:
                    yield Network(f"/proc/{os.getpid()}/fd/{namespace}", _forwarder(_resolver()))
                    return
        yield Network("" if mode == "none" else "host", _resolver())

    def _take(self, stack: contextlib.ExitStack) -> int:
        with self._lock:
            made = self._free.pop() if self._free else None
        if made is None:
            made = _connected(self._scratch())
            self._all.append(made)
        stack.callback(self._free.append, made)
        return made[0]

    def close(self) -> None:
        """Take all networks away."""
        while self._all:
            namespace, connection = self._all.pop()
            connection.stop()
            os.close(namespace)


def _connected(directory: Path) -> tuple[int, Connection]:
    """A new namespace, by its descriptor, with a running slirp4netns. Raises UserError."""
    from unionimage.container import slirp

    slirp.program()
    made: list[tuple[int, int]] = []
    is_made, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.suppress(OSError):
            syscalls.unshare(_CLONE_NEWNET)
            descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            made.append((descriptor, threading.get_native_id()))
        is_made.set()
        may_end.wait()

    # A namespace is left by ending, hence the thread; slirp4netns finds it by the thread's id.
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        is_made.wait()
        if not made:
            raise UserError("a network namespace cannot be made here: build with --network host")
        namespace, identity = made[0]
        try:
            return namespace, slirp.Connection.start(identity, directory, ())
        except BaseException:
            os.close(namespace)
            raise
    finally:
        may_end.set()
        thread.join()


def _resolver() -> bytes:
    try:
        return Path("/etc/resolv.conf").read_bytes()
    except OSError:
        return b""


def _forwarder(resolver: bytes) -> bytes:
    """The host's resolv.conf with slirp4netns's forwarder for the servers, which may be on `lo`."""
    from unionimage.container import slirp

    kept = [line for line in resolver.splitlines() if not line.startswith(b"nameserver")]
    return b"\n".join([f"nameserver {slirp.NAME_SERVER}".encode(), *kept, b""])
