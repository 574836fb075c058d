"""Open files: handles, and the descriptors behind them.

All programs on a mount together may have more files open than this one process may have
descriptors (RLIMIT_NOFILE). So a descriptor that nobody is using right now may be closed, the one
opened longest ago first; it is opened again when its handle is next used. The file is still the
same one then: its node knows where it is, also after a rename or an unlink.

Handles are guarded by the union's lock, their descriptors by a lock of their own, for the moment it
takes to say "in use": reads and writes never wait for the union.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unionfuse import syscalls
from unionfuse.tree import view
from unionfuse.tree.node import Directory, Node
from unionfuse.tree.tree import Tree, failure

log = logging.getLogger(__name__)

_FEW = 16  # descriptors; whatever the limit is, these are not too many


class OpenFile:
    """An open regular file: where to read and write now, and the descriptors it had before.

    Attributes:
        descriptor: -1 while it is closed for want of room.
        users: how many are reading or writing through the descriptor.
        pinned: somebody has noted the descriptor's number: it stays open until the release.
    """

    __slots__ = ("descriptor", "flags", "node", "pinned", "replaced", "users")

    def __init__(self, node: Node, descriptor: int, flags: int) -> None:
        self.node = node
        self.descriptor = descriptor
        self.flags = flags
        self.users = 0
        self.pinned = False
        self.replaced: list[int] = []

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class OpenFiles:
    """All handles of one mount.

    Arguments:
        lock: the union's. Methods need it held by the caller, unless they say otherwise.
    """

    def __init__(self, tree: Tree, lock: threading.RLock) -> None:
        self._tree = tree
        self._union_lock: Any = lock
        self._handles: dict[int, OpenFile | Directory] = {}
        self._readers: dict[int, set[int]] = {}  # node id -> handles on lower data
        self._closable: OrderedDict[int, OpenFile] = OrderedDict()  # by handle, oldest open first
        self._pinned = 0
        self._lock = threading.Lock()  # of descriptor and users; taken last

    def __len__(self) -> int:
        return len(self._handles)

    def handles(self) -> list[int]:
        """Every handle that is open."""
        return list(self._handles)

    # --- open ----------------------------------------------------------------------------

    def open(self, node: Node, flags: int) -> int:
        """Open a node that has all it needs in place; returns a handle."""
        append = flags & os.O_APPEND
        flags &= ~os.O_APPEND
        try:
            descriptor = self._open(node, flags)
        except PermissionError:
            if not append:
                raise
            flags |= append  # an append-only file (chattr +a) is not to be had without
            descriptor = self._open(node, flags)
        return self.add(node, descriptor, flags)

    def add(self, node: Node, descriptor: int, flags: int) -> int:
        """A handle for a descriptor that is open already, and that is ours from here on."""
        handle = self._tree.journal.fresh_handle()
        flags &= ~os.O_TRUNC
        self._tree.journal.opened(handle, node.id, flags)
        self._take_in(handle, node, descriptor, flags)
        return handle

    def add_directory(self, directory: Directory) -> int:
        """A handle for a directory."""
        handle = self._tree.journal.fresh_handle()
        self._handles[handle] = directory
        directory.opened += 1
        return handle

    def adopt(self, handle: int, node: Node, descriptor: int, flags: int) -> None:
        """Go on with what somebody else has opened, and noted in the journal (young.py)."""
        self._take_in(handle, node, descriptor, flags)

    def reopen(self, handle: int, node: Node, flags: int) -> None:
        """Open a file again under a handle that the kernel has from an earlier daemon."""
        self._take_in(handle, node, self._open_again(node, flags), flags)

    def _take_in(self, handle: int, node: Node, descriptor: int, flags: int) -> None:
        opened = OpenFile(node, descriptor, flags)
        if len(self._closable) >= _FEW:
            self._make_room()
        self._handles[handle] = self._closable[handle] = opened
        node.opened += 1
        node.mappable = node.mappable or flags & os.O_ACCMODE == os.O_RDWR
        if not node.in_upper or node.metacopy:
            self._readers.setdefault(node.id, set()).add(handle)

    def _open(self, node: Node, flags: int) -> int:
        if node.unnamed >= 0 and not node.metacopy:
            return os.open(syscalls.proc_path(node.unnamed), flags | os.O_CLOEXEC)
        directory, name = self._tree.data_location(node)
        if node.in_upper and not node.metacopy:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        return view.open_entry(directory, name, flags)

    def _open_again(self, node: Node, flags: int) -> int:
        try:
            return self._open(node, flags)
        except PermissionError:
            if not node.in_upper:
                raise
            # Only who created the file could open it so: let us in for a moment, as its owner.
            directory, name = self._tree.location(node)
            status = view.entry_status(directory, name) if name else os.stat(directory)
            mode = stat.S_IMODE(status.st_mode)
            syscalls.chmod(directory, name, mode | stat.S_IRUSR | stat.S_IWUSR)
            try:
                return self._open(node, flags)
            finally:
                syscalls.chmod(directory, name, mode)

    # --- room ----------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Close descriptors until half of what this process may have is free for other things."""
        if len(self._closable) < _FEW:
            return
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        for _ in range(len(self._closable) - most if most > 0 else 0):
            handle, opened = self._closable.popitem(last=False)
            with self._lock:
                if opened.users:
                    self._closable[handle] = opened
                    continue
                descriptor, opened.descriptor = opened.descriptor, -1
            os.close(descriptor)

    def pin(self, handle: int) -> int:
        """The descriptor of a file, for who notes its number; -1: there are too many such."""
        opened = self._file(handle)
        if not opened.pinned:
            if self._pinned > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8 > 0:
                return -1
            self.descriptor(handle)
            self._closable.pop(handle, None)
            opened.pinned = True
            self._pinned += 1
        return opened.descriptor

    # --- use -----------------------------------------------------------------------------

    def file(self, handle: int) -> OpenFile | None:
        """The open file of a handle, if it is one. Needs no lock."""
        opened = self._handles.get(handle)
        return opened if isinstance(opened, OpenFile) else None

    def _file(self, handle: int) -> OpenFile:
        opened = self._handles.get(handle)
        if not isinstance(opened, OpenFile):
            raise failure(errno.EBADF)
        return opened

    def directory(self, handle: int) -> Directory:
        """The directory behind a handle. Needs no lock."""
        opened = self._handles.get(handle)
        if not isinstance(opened, Directory):
            raise failure(errno.EBADF)
        return opened

    def descriptor(self, handle: int) -> int:
        """The descriptor of an open file; good for as long as the caller holds the union's lock."""
        opened = self._handles.get(handle)
        if not isinstance(opened, OpenFile):
            raise failure(errno.EBADF)
        if opened.descriptor < 0:
            descriptor = self._open_again(opened.node, opened.flags)
            self._make_room()
            with self._lock:
                opened.descriptor = descriptor
            self._closable[handle] = opened
        return opened.descriptor

    def begin(self, handle: int) -> OpenFile:
        """An open file whose descriptor stays open until `end`. Takes the locks it needs."""
        opened = self._file(handle)
        with self._lock:
            if opened.descriptor >= 0:
                opened.users += 1
                return opened
        with self._union_lock:
            self.descriptor(handle)
            with self._lock:
                opened.users += 1
        return opened

    def end(self, opened: OpenFile) -> None:
        """Give back what `begin` gave. Takes the lock it needs."""
        with self._lock:
            opened.users -= 1

    @contextmanager
    def using(self, handle: int) -> Iterator[int]:
        """`begin` and `end`; the value is the descriptor."""
        opened = self.begin(handle)
        try:
            yield opened.descriptor
        finally:
            self.end(opened)

    def published(self, node: Node) -> None:
        """A node's file is upper's now: whoever reads the lower one goes on with the copy.

        For whom that cannot be opened (EMFILE) goes on with the lower one, as on kernel overlayfs.
        """
        for handle in self._readers.pop(node.id, ()):
            opened = self._file(handle)
            if opened.descriptor >= 0:
                try:
                    copy = self._open(node, os.O_RDONLY)
                except OSError as error:
                    log.warning("a reader keeps the file before its copy-up: %s", error.strerror)
                    continue
                with self._lock:
                    opened.replaced.append(opened.descriptor)
                    opened.descriptor = copy

    # --- the end -------------------------------------------------------------------------

    def release(self, handle: int) -> Node | None:
        """Close a handle; returns its node, which may not be needed any more."""
        opened = self._handles.pop(handle, None)
        self._tree.journal.released(handle)
        if opened is None:
            return None
        if isinstance(opened, OpenFile):
            self._close(handle, opened)
            node = opened.node
        else:
            node = opened
        node.opened -= 1
        return node

    def _close(self, handle: int, opened: OpenFile) -> None:
        self._closable.pop(handle, None)
        self._pinned -= opened.pinned
        for descriptor in (opened.descriptor, *opened.replaced):
            if descriptor >= 0:
                os.close(descriptor)
        readers = self._readers.get(opened.node.id)
        if readers is not None:
            readers.discard(handle)
            if not readers:
                del self._readers[opened.node.id]
