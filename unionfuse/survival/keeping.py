"""A daemon's line to its keeper: what it leaves there, and what the one before it left."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from unionfuse import syscalls

_SOCKET = "UNIONFUSE_KEEPER"
_CWD = "UNIONFUSE_CWD"
SLEEP = 76  # a daemon that ends with this wants to be replaced when there is a request
UPGRADE = 75  # a daemon that ends with this wants to be replaced (EX_TEMPFAIL)
KEEPER = os.fsencode(Path(__file__).with_name("unionfuse-keeper"))
# The keeper waits for these; until it does so they are blocked.
_SIGNALS = (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
_FIRST_STORED = 3  # SD_LISTEN_FDS_START


def stored_descriptors() -> dict[str, int]:
    """What a service manager kept for this process, by name; see sd_listen_fds(3).

    It is empty unless the mount is among it: then a mount has lost its daemon and its keeper.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "0")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or int(count) != len(names):
        return {}
    found = {name: _FIRST_STORED + number for number, name in enumerate(names)}
    for descriptor in found.values():
        os.set_inheritable(descriptor, False)
    return found if "fuse" in found and "memory" in found else {}


class Keeping:
    """The line.

    Attributes:
        kept: what an earlier daemon left, by name; empty for the first.
        cwd: what relative paths on the command line are relative to.
    """

    def __init__(self, line: socket.socket, kept: dict[str, int], cwd: bytes) -> None:
        self._line = line
        self.kept = kept
        self.cwd = cwd

    @classmethod
    def join(cls) -> Keeping | None:
        """The line that a keeper gave to this process; None where none did."""
        number = os.environ.pop(_SOCKET, None)
        if number is None:
            return None
        line = socket.socket(fileno=int(number))
        line.set_inheritable(False)
        if os.environ.pop("NOTIFY_SOCKET", None) is not None:
            syscalls.die_with_parent()
        kept: dict[str, int] = {}
        while True:
            name, descriptors, _, _ = socket.recv_fds(line, 256, 1)
            if not descriptors:
                break
            os.set_inheritable(descriptors[0], False)
            kept[name.decode()] = descriptors[0]
        return cls(line, kept, os.fsencode(os.environ.pop(_CWD)))

    @classmethod
    def begin(
        cls,
        words: Sequence[str],
        ready: int,
        log: bytes,
        stored: dict[str, int] | None = None,
        mountpoint: bytes = b"",
    ) -> Keeping:
        """Split in two: the first daemon, who returns from here, and its parent, the keeper.

        Arguments:
            words: the mount program's arguments, for daemons to come.
            ready: a descriptor that gets a newline once the mount answers; -1 for none.
            log: the file that the keeper writes to; `-` for standard error, empty for syslog.
            stored: what a service manager kept of a mount that has lost its keeper, too.
            mountpoint: of that mount.
        """
        stored = stored or {}
        cwd = os.getcwdb()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A signal waits until the keeper has begun: it would die, and leave the mount without one.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            if ready >= 0:
                os.close(ready)
            if os.environ.pop("NOTIFY_SOCKET", None) is not None:
                syscalls.die_with_parent()  # who comes next must find nobody serving
            return cls(ours, stored, cwd)
        ours.close()
        for descriptor in (theirs.fileno(), *([ready] if ready >= 0 else []), *stored.values()):
            os.set_inheritable(descriptor, True)
        numbers = [b"%d" % number for number in (theirs.fileno(), child, ready)]
        kept = b",".join(b"%s=%d" % (os.fsencode(name), fd) for name, fd in stored.items())
        arguments = [*numbers, cwd, log, mountpoint, kept]
        command = [os.fsencode(sys.executable), b"-P", b"-m", b"unionfuse"]
        os.execv(KEEPER, [KEEPER, *arguments, b"--", *command, *map(os.fsencode, words)])

    def keep(self, name: str, descriptor: int) -> None:
        """Have the keeper hold a descriptor for the next daemon, too."""
        self._say(b"FDSTORE=1\nFDNAME=" + name.encode(), descriptor)

    def let_go(self, name: str) -> None:
        """Have it closed there."""
        self._say(b"FDSTOREREMOVE=1\nFDNAME=" + name.encode())

    def serves(self, mountpoint: bytes, device: bytes) -> None:
        """Tell where the mount is, and its device as /proc/self/mountinfo has it."""
        self._say(b"X_MOUNTPOINT=%s\nX_DEVICE=%s" % (mountpoint, device))

    def ready(self) -> None:
        """Tell that the mount answers."""
        self._say(b"READY=1")

    def crash_ends(self, reason: str) -> None:
        """Tell that no daemon can take this mount over."""
        self._say(b"X_ENDS=" + reason.encode())

    def _say(self, message: bytes, descriptor: int = -1) -> None:
        try:
            if descriptor < 0:
                self._line.send(message)
            else:
                socket.send_fds(self._line, [message], [descriptor])
        except (BrokenPipeError, ConnectionError):
            pass  # without its keeper a mount lives as long as its daemon
