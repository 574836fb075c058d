"""The union as the doors see it: node ids and names in, entries and errnos out.

Synchronous, thread-safe and free of FUSE: a method takes the lock, does what it has to and
raises OSError. What may take long (the copy-up of a big file, an fsync) does not hold the lock
while it lasts: see `copy_up_size`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from unionfuse import syscalls
from unionfuse.changes.copyup import CopyUp
from unionfuse.changes.renaming import Renaming
from unionfuse.changes.staging import INLINE_SIZE
from unionfuse.changes.upper import Upper
from unionfuse.layers.layer import LayerStack
from unionfuse.layers.upperdir import UpperDirectory
from unionfuse.options import MountOptions
from unionfuse.tree import attributes, view, xattrs
from unionfuse.tree.forgetting import Forgetting
from unionfuse.tree.journal import Journal
from unionfuse.tree.node import Caller, Changes, Directory, Entry, Node
from unionfuse.tree.openfiles import OpenFiles
from unionfuse.tree.revival import Revival
from unionfuse.tree.tree import Tree, failure
from unionfuse.wire._attributes import Attributes

if TYPE_CHECKING:
    from unionfuse.index.lookup import LookupIndex

log = logging.getLogger(__name__)

_OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
_MAPPABLE_VALID = 1.0  # seconds; a shared map may be there still, and change the times


class Watcher(Protocol):
    """Is told when the lookup index's answer for a node stops being true."""

    def changed(self, node: int) -> None: ...

    def opens_by_itself(self, value: bool) -> None:
        """Whether it may open files that the union does not hear of; if not, hand over those."""


class Union:
    """One mounted union.

    Arguments:
        stack: the lower layers.
        options: as parsed from the `-o` line.
        index: the lookup index of this very stack, checked by the caller; None to read layers.
        journal: what the next daemon must know; None where there will be none.
        taken_over: another daemon has served this mount, and did not end it.

    Raises:
        LayerError: upper or work cannot be used.
    """

    def __init__(
        self,
        stack: LayerStack,
        options: MountOptions,
        index: LookupIndex | None = None,
        journal: Journal | None = None,
        taken_over: bool = False,
    ) -> None:
        self.options = options
        self.lock = threading.RLock()
        self._watcher: Watcher | None = None
        self._stack = stack
        self.index = index
        upper = None
        if options.upperdir is not None:
            upper = UpperDirectory(options, taken_over=taken_over)
        self.tree = Tree(stack, upper, options, index, journal)
        self._forgetting = Forgetting(self.tree)
        self.revival = Revival(self.tree)
        self.tree.revive = self.revival.node
        self._journal = self.tree.journal
        self.tree.changed = self._changed
        self._store = upper
        self.files = OpenFiles(self.tree, self.lock)
        self._copy = CopyUp(self.tree, self.lock, self._published)
        read_only = upper is None or options.read_only
        self._upper = None if read_only else Upper(self.tree, self._copy, self._changed)
        self._renaming = None
        if self._upper is not None:
            self._renaming = Renaming(self.tree, self._copy, self._upper, self._forgetting)

    def close(self) -> None:
        """Let go of everything; the staging directory is empty afterwards."""
        with self.lock:
            for handle in self.files.handles():
                self.release(handle)
            for node in self.tree.nodes.values():
                self.tree.close_unnamed(node)
            self.tree.nodes.clear()
            self._copy.close()
            if self._store is not None:
                self._store.close()
            self._stack.close()

    def status(self) -> tuple[int, int]:
        """How many nodes are known and how many files are open."""
        with self.lock:
            known = self.tree.nodes.keys() | self.tree.tables.counted()
            young = self.tree.young
            return len(known) + len(young), len(self.files) + young.opened()

    # --- who watches ---------------------------------------------------------------------

    @property
    def watcher(self) -> Watcher | None:
        """Is told of every node whose answer is no longer the index's, before the request ends."""
        return self._watcher

    @watcher.setter
    def watcher(self, watcher: Watcher) -> None:
        with self.lock:
            self._watcher = watcher
            for node in self.tree.nodes.values():
                if node.in_upper:
                    watcher.changed(node.id)
            for record in self.tree.linked_records():
                watcher.changed(record)

    # --- help ----------------------------------------------------------------------------

    def _changes(self) -> Upper:
        if self._upper is None:
            raise failure(errno.EROFS)
        return self._upper

    def _to_change(self, number: int) -> Node:
        """A node whose file may be changed now. Raises EROFS, ESTALE."""
        self._changes()
        node = self.tree.node(number)
        self._copy.wait(node)
        return node

    def _changed(self, node: Node) -> None:
        if node.tabled:
            self.tree.leave_table(node)
        if self._watcher is not None:
            self._watcher.changed(node.id)

    def _published(self, node: Node) -> None:
        """A node's file is upper's now: whoever reads the lower one goes on with the copy."""
        self.files.published(node)
        self._changed(node)

    def _entry(
        self, node: Node, status: os.stat_result | None = None, valid: float | None = None
    ) -> Entry:
        if valid is None:
            valid = self._valid(node)
        entry = Entry(node.id, attributes.shown(self.tree, node, status), valid)
        if node.id <= self.tree.indexed_ids:
            self._forgetting.release_if_unused(node)
        elif node.tabled:
            self.tree.tables.count(node.id)
            self._forgetting.release_if_unused(node)
        else:
            node.lookups += 1
            self._journal.count(node)
        return entry

    def _valid(self, node: Node) -> float:
        if not node.mappable:
            return self.options.timeout
        return 0.0 if node.opened else min(_MAPPABLE_VALID, self.options.timeout)

    # --- looking -------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Entry:
        """The entry under a name. Raises ENOENT, ENAMETOOLONG."""
        with self.lock:
            directory = self.tree.directory(parent)
            if name == b".":
                return self._entry(directory)
            if name == b"..":
                return self._entry(directory.names[0][0] if directory.names else directory)
            return self._entry(self.tree.find(directory, name))

    def forget(self, number: int, count: int) -> None:
        """The kernel has dropped `count` of the lookups that it was answered."""
        with self.lock:
            node = self.tree.nodes.get(number)
            if node is None and self.tree.young.adopt(number):
                node = self.tree.nodes[number]
            if node is None or node.tabled:
                known = self.tree.tables.forgotten(number, count)
                if node is not None:
                    self._forgetting.release_if_unused(node)
                elif not known:
                    self._journal.forgotten(number, count)
            else:
                if number > self.tree.indexed_ids or node.deleted:
                    node.lookups -= count
                    self._journal.count(node)
                self._forgetting.release_if_unused(node)

    def getattr(self, number: int, handle: int | None = None) -> Attributes:
        """What stat(2) shows."""
        with self.lock:
            return attributes.shown(self.tree, self.tree.node(number))

    def attr_valid(self, number: int) -> float:
        """For how many seconds the kernel may keep a node's attributes."""
        with self.lock:
            return self._valid(self.tree.node(number))

    def readlink(self, number: int) -> bytes:
        """The target of a symbolic link."""
        with self.lock:
            directory, name = self.tree.location(self.tree.node(number))
            if not name:
                return os.readlink(b"", dir_fd=directory)
            return os.readlink(name, dir_fd=directory)

    def statfs(self) -> os.statvfs_result:
        """Of the upper's file system; of the top layer's without one."""
        if self._store is not None:
            return os.statvfs(self._store.descriptor)
        return os.statvfs(self._stack.layers[0].descriptor)

    # --- attributes ----------------------------------------------------------------------

    def setattr(self, number: int, changes: Changes, handle: int | None = None) -> Attributes:
        """Change mode, owner, size or times; returns the new attributes."""
        with self.lock:
            node = self._to_change(number)
            if changes.mode is not None and stat.S_ISLNK(node.kind):
                raise failure(errno.EOPNOTSUPP)
            if node.is_directory and node.deleted and node.last is not None:
                attributes.change_remembered(node.last, changes)
                self.tree.nameless(node)
                return node.last
            copied = self._copy.copy_up(node, data=changes.size is not None, size=changes.size)
            attributes.change(self.tree, node, changes, self._writable(handle))
            self._changed(node)
            if copied and changes.size is None:
                self._copy.attributes_changed(node)
            return attributes.shown(self.tree, node)

    def _writable(self, handle: int | None) -> int:
        """The descriptor behind a handle, if there is one that writes; else -1."""
        if handle is None:
            return -1
        opened = self.files.file(handle)
        return self.files.descriptor(handle) if opened is not None and opened.writable else -1

    def read_inode_flags(self, number: int, command: int) -> bytes:
        """What lsattr(1) asks; see syscalls.READ_INODE_FLAGS. Raises ENOTTY: there are none."""
        with self.lock:
            descriptor = self._open_itself(self.tree.node(number))
        try:
            return syscalls.read_inode_flags(descriptor, command)
        finally:
            os.close(descriptor)

    def write_inode_flags(self, number: int, command: int, flags: bytes) -> None:
        """What chattr(1) sets, in upper; see syscalls.WRITE_INODE_FLAGS."""
        with self.lock:
            node = self._to_change(number)
            self._copy.copy_up(node)
            descriptor = self._open_itself(node)
            try:
                syscalls.write_inode_flags(descriptor, command, flags)
            finally:
                os.close(descriptor)
            self._changed(node)

    def _open_itself(self, node: Node) -> int:
        """A readable descriptor of a regular file or directory, for what has to have one."""
        directory, name = self.tree.location(node)
        if name:
            return view.open_entry(directory, name, os.O_RDONLY)
        return os.open(syscalls.proc_path(directory), os.O_RDONLY | os.O_CLOEXEC)

    # --- names ---------------------------------------------------------------------------

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        """Create a file, FIFO, socket or device."""
        with self.lock:
            directory = self.tree.directory(parent)
            made = self._changes().mknod(directory, name, mode, rdev, caller)
            return self._entry(made.node, made.status)

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
        """Create a directory."""
        with self.lock:
            directory = self.tree.directory(parent)
            made = self._changes().mkdir(directory, name, mode, caller)
            return self._entry(made.node, made.status)

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        """Create a symbolic link."""
        with self.lock:
            directory = self.tree.directory(parent)
            made = self._changes().symlink(directory, name, target, caller)
            return self._entry(made.node, made.status)

    def link(self, number: int, new_parent: int, new_name: bytes) -> Entry:
        """Give a file one more name."""
        with self.lock:
            node, directory = self.tree.node(number), self.tree.directory(new_parent)
            self._changes().link(node, directory, new_name)
            return self._entry(node)

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Entry, int]:
        """Create and open a regular file; returns its entry and a handle."""
        with self.lock:
            directory = self.tree.directory(parent)
            flags &= _OPEN_FLAGS & ~os.O_TRUNC
            made = self._changes().create(directory, name, mode, flags, caller)
            handle = self.files.add(made.node, made.descriptor, flags)
            # An empty file has no page that a map could change: what makes it grow tells us, or
            # has the kernel ask. One that was just opened would be asked for at once otherwise.
            return self._entry(made.node, made.status, self.options.timeout), handle

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> tuple[Entry, int]:
        """Create a regular file without a name in a directory (O_TMPFILE)."""
        with self.lock:
            node, descriptor = self._changes().tmpfile(self.tree.directory(parent), mode, caller)
            handle = self.files.add(node, descriptor, os.O_RDWR)
            return self._entry(node), handle

    def unlink(self, parent: int, name: bytes) -> None:
        """Delete a name of anything but a directory."""
        with self.lock:
            node = self._changes().unlink(self.tree.directory(parent), name)
            self._forgetting.release_if_unused(node)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Delete an empty directory."""
        with self.lock:
            node = self._changes().rmdir(self.tree.directory(parent), name)
            self._forgetting.release_if_unused(node)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Rename; `flags` may be RENAME_NOREPLACE or RENAME_EXCHANGE."""
        with self.lock:
            source, goal = self.tree.directory(parent), self.tree.directory(new_parent)
            if self._renaming is None:
                raise failure(errno.EROFS)
            nodes = self._renaming.rename(source, name, goal, new_name, flags)
            for node in nodes:
                if node is not None:
                    self._forgetting.release_if_unused(node)

    # --- what a daemon asks that takes over ----------------------------------------------

    def subject(self, parent: int, name: bytes) -> tuple[int, int, int] | None:
        """(id, inode number, type) of what a name leads to; None for nothing."""
        with self.lock:
            try:
                directory = self.tree.directory(parent)
                if not self.tree.exists(directory, name):
                    return None
                node = self.tree.find(directory, name)
            except OSError:
                return None
            self._forgetting.release_if_unused(node)
            return node.id, node.ino, node.kind

    def shows(self, parent: int, name: bytes) -> bool:
        """Whether there is anything under a name."""
        with self.lock:
            try:
                return self.tree.exists(self.tree.directory(parent), name)
            except OSError:
                return False

    def finish_rename(self, parent: int, name: bytes) -> None:
        """Make sure that a name does not show any more that was renamed."""
        with self.lock:
            if self._renaming is not None:
                self._renaming.finish(self.tree.directory(parent), name)

    # --- copy-up -------------------------------------------------------------------------

    def copy_up_size(self, number: int, data: bool = True) -> int:
        """Bytes that a change of this node must copy first; 0 where it takes no time.

        A door that finds a number here calls `copy_up` in a thread that may wait before it does
        what it was asked for; otherwise that would hold the lock while it copies.
        """
        with self.lock:
            if self._upper is None or not number:
                return 0
            node = self.tree.node(number)
            size = self._copy.size(node, data)
            return size if size > INLINE_SIZE else 0

    def linked(self, parent: int, name: bytes) -> int:
        """The node under a name if it is a lower file with more names, else 0.

        Such a file is copied up before one of its names goes, so that the link count of the
        others stays right.
        """
        with self.lock:
            directory = self.tree.directory(parent)
            node = directory.children.get(name)
            if node is None:
                if self._upper is None or not self.tree.exists(directory, name):
                    return 0
                node = self.tree.find(directory, name)
            if node.in_upper or node.lower_key is None or self._upper is None:
                return 0
            return node.id

    def copy_up(self, number: int, data: bool = True) -> None:
        """Copy a node up; for a thread that may wait. Two at once cause one copy."""
        with self.lock:
            node = self.tree.node(number)
            self._changes()
            if node.copying is None:
                node.copying = threading.Lock()
        with node.copying:
            self._copy.copy_up(node, data)

    # --- open files ----------------------------------------------------------------------

    def open(self, number: int, flags: int, kill_privileges: bool = False) -> int:
        """Open a regular file; returns a handle. O_APPEND and O_DIRECT are the kernel's concern."""
        with self.lock:
            node = self.tree.node(number)
            if node.is_directory:
                raise failure(errno.EISDIR)
            append = flags & os.O_APPEND
            flags &= _OPEN_FLAGS
            if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
                self._changes()
                self._copy.copy_up(node, size=0 if flags & os.O_TRUNC else None)
            handle = self.files.open(node, flags | append)
            if kill_privileges and flags & os.O_TRUNC:
                attributes.kill_privileges(self.tree, node)
            return handle

    def reopen(self, handle: int, number: int, flags: int) -> None:
        """Open a file again under a handle that the kernel has from an earlier daemon."""
        with self.lock:
            self.files.reopen(handle, self.tree.node(number), flags)

    def directory_in_upper(self, number: int) -> tuple[int, int, bool] | None:
        """(descriptor, inode number, whether nothing lies below) of a directory that upper has.

        None for anything else, and for what is deleted. The tree's cache owns the descriptor.
        """
        node = self.tree.nodes.get(number)
        if not isinstance(node, Directory) or not node.in_upper or self.is_deleted(number):
            return None
        return self.tree.upper_directory(node), node.ino, not node.lowers

    def hands_down_acl(self, directory: Directory) -> bool:
        """Whether what is made in a directory inherits an ACL, or nothing may be made at all."""
        return self._upper is None or self._upper.hands_down_acl(directory)

    def is_deleted(self, number: int) -> bool:
        """Whether no name leads to a node any more, or nobody knows it."""
        node = self.tree.nodes.get(number)
        return node is None or (node.deleted and node is not self.tree.root)

    def is_settled(self, number: int) -> bool:
        """Whether no copy-up will ever give a node's open files another descriptor."""
        node = self.tree.node(number)
        return self._store is None or (node.in_upper and not node.metacopy)

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Bytes from an open file."""
        opened = self.files.begin(handle)
        try:
            return os.pread(opened.descriptor, size, offset)
        finally:
            self.files.end(opened)

    def write(self, handle: int, offset: int, data: bytes, kill_privileges: bool = False) -> int:
        """Write at an offset, wherever the file was opened to append; returns the byte count."""
        opened = self.files.begin(handle)
        try:
            if kill_privileges:
                with self.lock:
                    attributes.kill_privileges(self.tree, opened.node)
            done = syscalls.pwrite(opened.descriptor, data, offset)
            while done < len(data):
                done += syscalls.pwrite(opened.descriptor, data[done:], offset + done)
            return done
        finally:
            self.files.end(opened)

    def release(self, handle: int) -> None:
        """Close a handle of a file or directory."""
        with self.lock:
            node = self.files.release(handle)
            if node is not None:
                self._forgetting.release_if_unused(node)

    releasedir = release

    def flush(self, handle: int) -> None:
        """Nothing is held back that a close would have to write."""

    def fsync(self, handle: int, datasync: bool) -> None:
        """Bring an open file's data to disk; may take long and holds no lock."""
        if self._store is not None and self._store.sync:
            with self.files.using(handle) as descriptor:
                syscalls.fsync(descriptor, datasync)

    # --- directories ---------------------------------------------------------------------

    def opendir(self, number: int) -> int:
        """Open a directory; returns a handle."""
        with self.lock:
            directory = self.tree.directory(number)
            self.tree.load(directory)
            return self.files.add_directory(directory)

    def opened_directory(self, handle: int) -> int:
        """The node id behind a handle that `opendir` gave."""
        return self.files.directory(handle).id

    def listing(self, number: int, cookie: int) -> Iterator[tuple[bytes, int, Entry]]:
        """(name, cookie, entry) of a directory's names behind a cookie, without `.` and `..`.

        Every entry counts one lookup as soon as it is produced: who does not hand it on gives
        it back with `unlist`. One without a node counts none: it is about name, type and inode
        number alone. Hold the lock while iterating.
        """
        directory = self.tree.directory(number)
        for name, next_cookie in self.tree.names_after(directory, cookie):
            try:
                entry = self.tree.young.listed(directory, name)
                if entry is None:
                    entry = self._entry(self.tree.find(directory, name))
            except OSError as error:
                # Gone behind our back, or broken below: that must not hide the other names.
                log.warning("%r in a listing: %s", name, error.strerror)
                continue
            yield name, next_cookie, entry

    def unlist(self, number: int) -> None:
        """Take back the lookup of an entry that was not handed on."""
        self.forget(number, 1)

    def parent(self, number: int) -> int:
        """The node id of a directory's parent; of the root, itself."""
        with self.lock:
            directory = self.tree.directory(number)
            return directory.names[0][0].id if directory.names else directory.id

    def fsyncdir(self, handle: int, datasync: bool) -> None:
        """Bring a directory's names to disk."""
        if self._store is None or not self._store.sync:
            return
        with self.lock:
            directory = self.tree.directory(self.opened_directory(handle))
            if not directory.in_upper:
                return
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            readable = os.open(b".", flags, dir_fd=self.tree.upper_directory(directory))
        try:
            syscalls.fsync(readable, datasync)
        finally:
            os.close(readable)

    def sync(self) -> None:
        """Bring everything in upper to disk."""
        if self._store is not None and self._store.sync:
            self._store.sync_all()

    # --- extended attributes -------------------------------------------------------------

    def getxattr(self, number: int, attribute: bytes) -> bytes:
        """The value of an extended attribute. Raises ENODATA, EOPNOTSUPP."""
        with self.lock:
            return xattrs.get(self.tree, self.tree.node(number), attribute)

    def listxattr(self, number: int, pid: int) -> list[bytes]:
        """The names of a node's extended attributes that a thread may see; none of the union's."""
        with self.lock:
            found = xattrs.names(self.tree, self.tree.node(number))
        return xattrs.shown_to(pid, found)

    def setxattr(self, number: int, attribute: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute; `flags` are XATTR_CREATE and XATTR_REPLACE."""
        with self.lock:
            self._changes()
            if attribute == xattrs.LAYER:
                raise failure(errno.EPERM)
            stored = xattrs.stored_name(self.tree, attribute)
            node = self._to_change(number)
            self._copy.copy_up(node, data=False)
            syscalls.setxattr(*self.tree.location(node), stored, value, flags)
            self._attribute_changed(node, attribute)

    def removexattr(self, number: int, attribute: bytes) -> None:
        """Remove an extended attribute. Raises ENODATA."""
        with self.lock:
            self._changes()
            stored = xattrs.stored_name(self.tree, attribute)
            node = self._to_change(number)
            if not node.in_upper:
                syscalls.getxattr(*self.tree.location(node), stored)  # ENODATA before any copy
            self._copy.copy_up(node, data=False)
            syscalls.removexattr(*self.tree.location(node), stored)
            self._attribute_changed(node, attribute)

    def _attribute_changed(self, node: Node, attribute: bytes) -> None:
        if isinstance(node, Directory) and attribute.startswith(xattrs.ACL_PREFIX):
            node.default_acl = None
        self._changed(node)
