"""The mounted /dev/fuse as pyfuse3 gets it where no lane stands between (`express=off`).

Nothing here is asynchronous, and nothing imports pyfuse3: INIT is answered before that is loaded.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from unionfuse.express import protocol
from unionfuse.options import MountOptions


class Channel:
    """A FUSE connection whose INIT we answer ourselves, and which libfuse then takes over.

    libfuse does not negotiate what a union needs (umask left to us, ACLs, explicit invalidation),
    so it is not asked. It shakes hands over a socket, with a kernel that we play. In the middle
    of it, when it calls `init`, its end of the socket is replaced by the real channel; what it
    answers goes to the kernel with a number that no request has, and is dropped there.

    Attributes:
        descriptor: for libfuse, to be named as /dev/fd/N; libfuse closes it.
    """

    def __init__(self, fuse: int, options: MountOptions) -> None:
        """Answer INIT, which is waiting in `fuse`. Raises protocol.ProtocolError."""
        self._fuse = fuse
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
        self.descriptor = theirs.detach()

    def started(self) -> None:
        """To be called from `init`: libfuse reads and writes the real channel from here on."""
        os.dup2(self._fuse, self.descriptor, inheritable=False)
        self._ours.close()

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Nothing to do: pyfuse3 sees the end of the mount by itself."""

    def counts(self) -> dict[str, int]:
        """Requests that were answered before pyfuse3 saw them: none."""
        return {}

    def close(self) -> None:
        """Close what libfuse does not know of; a mount that is still there is dead from now on."""
        os.close(self._fuse)
