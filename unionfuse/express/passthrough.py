"""Passthrough: the kernel reads and writes an open file's backing file by itself.

All opens of one inode must have the same backing file while any of them lives, and while an inode
has an open file that goes through the page cache, a passthrough open of it is refused. So what an
open gets depends on the opens there are, which are counted here. The kernel lets go of an open
before it sends RELEASE, so the counts never fall short.

Which files: those in upper, whose backing file never changes; and all files where there is no
upper. A lower file that may yet be copied up goes through the page cache. With passthrough, its
first writer would find readers that hold the lower file, and the kernel can then be brought to open
the copy only by another node and ESTALE, which some ways to open a file (bind mounts,
/proc/self/fd) hand on to the program.

Source: fs/fuse/passthrough.c, fs/fuse/iomode.c, fs/fuse/backing.c of Linux 6.18.
"""

from __future__ import annotations

import errno
import fcntl
import struct
import threading
from contextlib import AbstractContextManager

from unionfuse.tree.journal import Journal
from unionfuse.wire import protocol
from unionfuse.wire.protocol import OpenFlag

_CAP_SYS_ADMIN = 21


def is_permitted() -> bool:
    """Whether the kernel would let this process register backing files.

    A mount made inside a user namespace is offered passthrough, and then refused the ioctl: it
    takes CAP_SYS_ADMIN in the first namespace. The ioctl cannot be tried before INIT is answered.
    """
    try:
        with open("/proc/self/uid_map") as file:
            first_namespace = file.read().split() == ["0", "0", "4294967295"]
        with open("/proc/self/status") as file:
            effective = next(line for line in file if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return first_namespace and bool(int(effective.split()[1], 16) >> _CAP_SYS_ADMIN & 1)


class _Node:
    """The opens of one inode."""

    __slots__ = ("backing", "cached", "passing")

    def __init__(self) -> None:
        self.backing = 0
        self.passing: set[int] = set()  # handles
        self.cached: set[int] = set()


class Passthrough:
    """The open files of one mount, and their backing ids.

    Arguments:
        fuse: the mounted /dev/fuse.
        enabled: passthrough was negotiated; otherwise every open goes through the page cache.
        journal: where the next daemon finds the ids: the kernel keeps them when this one dies.
        lock: held while an id is asked for and noted: one that could not be noted is the next one.
    """

    def __init__(
        self,
        fuse: int,
        enabled: bool,
        journal: Journal,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._fuse = fuse
        self._enabled = enabled
        self._journal = journal
        self._nodes: dict[int, _Node] = {}
        self._lock = lock if lock is not None else threading.Lock()

    @property
    def enabled(self) -> bool:
        """Whether files are passed through, as far as is known."""
        return self._enabled

    def adopt(self, node: int, handle: int, backing: int) -> None:
        """Count an open that somebody else has answered, be it with a backing file."""
        with self._lock:
            known = self._nodes.setdefault(node, _Node())
            known.backing = backing
            (known.passing if backing else known.cached).add(handle)

    def opened(self, node: int, handle: int, descriptor: int, lasting: bool) -> tuple[int, int]:
        """(open_flags, backing id) for the reply to an open.

        Arguments:
            descriptor: the backing file.
            lasting: it is the node's file for good.
        """
        with self._lock:
            known = self._nodes.get(node)
            if known is None:
                known = self._nodes[node] = _Node()
            if known.cached or not lasting or not self._enabled:
                backing = 0
            else:
                backing = known.backing or self._register(descriptor)
            if not backing:
                known.cached.add(handle)
                return OpenFlag.KEEP_CACHE, 0
            known.backing = backing
            known.passing.add(handle)
            self._journal.passes(handle, backing)
            return OpenFlag.PASSTHROUGH, backing

    def released(self, node: int, handle: int) -> None:
        """The kernel has let go of a handle."""
        with self._lock:
            known = self._nodes.get(node)
            if known is None:
                return
            known.cached.discard(handle)
            known.passing.discard(handle)
            if known.backing and not known.passing:
                self._close(known.backing)
                known.backing = 0
            if not known.cached and not known.passing:
                del self._nodes[node]

    def take_over(self) -> None:
        """Go on with what the daemon before this one had open, and give back what it had not."""
        with self._lock:
            for handle in self._journal.handles():
                if handle.lent:
                    continue
                known = self._nodes.setdefault(handle.node, _Node())
                known.backing = known.backing or handle.backing
                (known.passing if handle.backing else known.cached).add(handle.number)
            for backing in self._journal.orphans():
                self._give_back(backing)
            self._journal.orphans_closed()

    def close(self) -> None:
        """Give all backing files back."""
        with self._lock:
            for known in self._nodes.values():
                if known.backing:
                    self._close(known.backing)
            self._nodes.clear()

    def _register(self, descriptor: int) -> int:
        """A backing id for a file; 0 where the kernel refuses it: the page cache always will do.

        Where it is not permitted nothing more is tried.
        """
        request = bytearray(protocol.BACKING_MAP.pack(descriptor, 0, 0))
        try:
            backing: int = fcntl.ioctl(self._fuse, protocol.FUSE_DEV_IOC_BACKING_OPEN, request)
        except OSError as error:
            if error.errno == errno.EPERM:
                self._enabled = False
            return 0
        return backing

    def _close(self, backing: int) -> None:
        self._journal.gives_back(backing)
        self._give_back(backing)

    def _give_back(self, backing: int) -> None:
        try:
            request = struct.pack("=I", backing)
            fcntl.ioctl(self._fuse, protocol.FUSE_DEV_IOC_BACKING_CLOSE, request)
        except OSError:
            pass  # after the end of the mount the ids are gone already
