"""The mounted /dev/fuse as pyfuse3 gets it where no lane stands between (`express=off`).

INIT is answered before pyfuse3 is loaded.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

from unionfuse.options import MountOptions
from unionfuse.pyfuse.eventloop import EventLoop
from unionfuse.union import Union
from unionfuse.wire import protocol


class Channel:
    """A FUSE connection whose INIT we answer ourselves, and which libfuse then takes over.

    libfuse does not negotiate what a union needs (umask left to us, ACLs, explicit invalidation),
    so it is not asked. It shakes hands over a socket, with a kernel that we play. In the middle
    of it, when it calls `init`, its end of the socket is replaced by the real channel; what it
    answers goes to the kernel with a number that no request has, and is dropped there.

    """

    def __init__(self, fuse: int, union: Union, options: MountOptions) -> None:
        """Answer INIT, which is waiting in `fuse`, and serve. Raises protocol.ProtocolError."""
        self._fuse = fuse
        self._on_end: Callable[[], None] = lambda: None
        self._ended = threading.Event()
        request = os.read(fuse, 1 << 20)
        header = protocol.parse_header(request)
        # libfuse does not pass on which write is to drop set-uid bits: let the kernel drop them.
        # A truncating open is ours to judge, by who asks; with ALLOW_IDMAP only creators are told.
        refused = protocol.InitFlag.HANDLE_KILLPRIV_V2 | protocol.InitFlag.ALLOW_IDMAP
        if options.noacl:
            refused |= protocol.InitFlag.POSIX_ACL
        wanted = protocol.Wanted(flags=protocol.ALWAYS & ~refused)
        answer = protocol.negotiate(request[protocol.IN_HEADER.size :], wanted)
        os.write(fuse, protocol.reply(header.unique, answer))
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.send(protocol.init_for_libfuse(request))
        self._theirs = theirs.detach()
        self._loop = EventLoop(self._theirs, union, options, self._started, self._end)

    def _started(self) -> None:
        """libfuse has shaken hands: it reads and writes the real channel from here on."""
        os.dup2(self._fuse, self._theirs, inheritable=False)
        self._ours.close()

    def _end(self) -> None:
        self._ended.set()
        self._on_end()

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have a function called, from any thread, once the mount has ended."""
        self._on_end = callback
        if self._ended.is_set():
            callback()

    @property
    def failed(self) -> bool:
        """Whether serving ended by a failure of our own."""
        return self._loop.failed

    def counts(self) -> dict[str, int]:
        """Requests by opcode."""
        return dict(self._loop.requests)

    def handed(self) -> int:
        """How many of them were answered by Python."""
        return sum(self.counts().values())

    def close(self) -> None:
        """Stop serving, and close the channel; a mount that is still there is dead from now on."""
        self._loop.stop()
        os.close(self._fuse)
