"""Changes of names: create, delete and link in the writable layer.

Each change becomes visible by one system call, so that a crash leaves the tree as it was before
or as it is after. A name that lower layers have is deleted by a whiteout; a directory made over
one is opaque. The steps are those of overlayfs (fs/overlayfs/dir.c). Callers hold the union's
lock, and have checked that the kernel's request is about names of at most 255 bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from unionfuse import syscalls
from unionfuse.changes.copyup import CopyUp
from unionfuse.layers import whiteout
from unionfuse.layers.upperdir import UpperDirectory
from unionfuse.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from unionfuse.tree import view
from unionfuse.tree.attributes import shown
from unionfuse.tree.node import WHITEOUT, Caller, Directory, Node
from unionfuse.tree.tree import Tree, failure

Make = Callable[[int, bytes], int]
"""Creates something under a free name in a directory; returns a descriptor, -1 for none."""


class Made(NamedTuple):
    """What was created: its node, its status on disk, and a descriptor, -1 for none."""

    node: Node
    status: os.stat_result
    descriptor: int = -1


class Upper:
    """The changing half of a union.

    Arguments:
        changed: called with a directory whose names have changed, or a node whose file has.
    """

    def __init__(self, tree: Tree, copy: CopyUp, changed: Callable[[Node], None]) -> None:
        assert tree.upper is not None
        os.umask(0)  # the umask that counts is the caller's: the kernel sends it with each request
        self._tree = tree
        self._copy = copy
        self._changed = changed
        self.store: UpperDirectory = tree.upper
        self._identity = (os.geteuid(), os.getegid())

    # --- create --------------------------------------------------------------------------

    def mknod(self, parent: Directory, name: bytes, mode: int, device: int, caller: Caller) -> Made:
        """Create a regular file, FIFO, socket or device."""
        if stat.S_ISCHR(mode) and device == 0:
            raise failure(errno.EPERM)  # it would be a whiteout; overlayfs refuses it, too
        if stat.S_ISREG(mode):
            made = self.create(parent, name, mode, os.O_WRONLY, caller)
            os.close(made.descriptor)
            return made

        def make(directory: int, free: bytes) -> int:
            syscalls.mknod(directory, free, self._mode(parent, mode, caller), device)
            return -1

        return self._create(parent, name, make, caller)

    def create(self, parent: Directory, name: bytes, mode: int, flags: int, caller: Caller) -> Made:
        """Create and open a regular file."""

        def make(directory: int, free: bytes) -> int:
            bits = self._mode(parent, mode, caller) & 0o7777
            return syscalls.create(directory, free, flags, bits)

        return self._create(parent, name, make, caller)

    def tmpfile(self, parent: Directory, mode: int, caller: Caller) -> tuple[Node, int]:
        """Create and open a regular file without a name; returns its node and descriptor."""
        if parent.deleted and parent is not self._tree.root:
            raise failure(errno.ENOENT)
        self._copy.copy_up(parent)
        directory = self._tree.upper_directory(parent)
        owner = self._tree.owners.stored(caller.uid, caller.gid)
        bits = self._mode(parent, mode, caller) & 0o7777

        def make(directory: int, _: bytes) -> int:
            return syscalls.create_unnamed(directory, bits)

        try:
            descriptor = self._make_as(owner, make, directory, b"")
        except PermissionError:
            descriptor = syscalls.create_unnamed(directory, bits)
            with _ClosedOnFailure(descriptor):
                syscalls.chown(descriptor, b"", *owner)
        node = Node(stat.S_IFREG)
        node.in_upper = True
        with _ClosedOnFailure(descriptor):
            node.unnamed = os.open(syscalls.proc_path(descriptor), os.O_PATH | os.O_CLOEXEC)
        node.ino = self._tree.inodes.of(os.fstat(descriptor))
        self._tree.number(node)
        self._tree.nameless(node)
        return node, descriptor

    def mkdir(self, parent: Directory, name: bytes, mode: int, caller: Caller) -> Made:
        """Create a directory."""

        def make(directory: int, free: bytes) -> int:
            syscalls.mkdir(directory, free, self._mode(parent, mode, caller) & 0o7777)
            return -1

        return self._create(parent, name, make, caller, is_directory=True)

    def symlink(self, parent: Directory, name: bytes, target: bytes, caller: Caller) -> Made:
        """Create a symbolic link."""

        def make(directory: int, free: bytes) -> int:
            syscalls.symlink(target, directory, free)
            return -1

        return self._create(parent, name, make, caller)

    def _create(
        self,
        parent: Directory,
        name: bytes,
        make: Make,
        caller: Caller,
        is_directory: bool = False,
    ) -> Made:
        directory = self._ready(parent, name)
        assert parent.changes is not None
        owner = self._tree.owners.stored(caller.uid, caller.gid)
        if parent.changes.get(name) == WHITEOUT or self._tree.below(parent, name) is not None:
            descriptor = self._make_over_whiteout(parent, name, make, owner, is_directory)
        else:
            descriptor = self._make_owned(directory, name, make, owner)
        with _ClosedOnFailure(descriptor):
            return self._new_node(parent, name, directory, descriptor, caller)

    def _ready(self, parent: Directory, name: bytes) -> int:
        """Check that a name may be created, bring its directory into upper, return that."""
        if len(name) > 255:
            raise failure(errno.ENAMETOOLONG)
        if name.startswith(whiteout.WHITEOUT_PREFIX):
            raise failure(errno.EINVAL)
        if not parent.names and parent is not self._tree.root:
            raise failure(errno.ENOENT)
        if self._tree.exists(parent, name):
            raise failure(errno.EEXIST)
        if not parent.in_upper:
            self._copy.copy_up(parent)
        return self._tree.upper_directory(parent)

    def _make_as(self, owner: tuple[int, int], make: Make, directory: int, name: bytes) -> int:
        if owner == self._identity or self._tree.owners.override is not None:
            return make(directory, name)
        with syscalls.FileIdentity(*owner):
            return make(directory, name)

    def _make_owned(self, directory: int, name: bytes, make: Make, owner: tuple[int, int]) -> int:
        """Create in place as the caller, so that no crash leaves it with another owner."""
        try:
            return self._make_as(owner, make, directory, name)
        except PermissionError:
            # The kernel has checked the caller's rights in the merged tree; what is missing here
            # are groups and capabilities that fsuid does not carry.
            if owner == self._identity:
                raise
        with self._staging(directory) as (holder, staged):
            descriptor = make(holder, staged)
            with _ClosedOnFailure(descriptor):
                self._set_owner(holder, staged, owner)
                syscalls.rename(holder, staged, directory, name, RENAME_NOREPLACE)
            return descriptor

    def _set_owner(self, directory: int, name: bytes, owner: tuple[int, int]) -> None:
        if self._tree.owners.override is not None:
            return
        status = view.entry_status(directory, name)
        parent = os.stat(directory)
        gid = status.st_gid if parent.st_mode & stat.S_ISGID else owner[1]
        if (status.st_uid, status.st_gid) != (owner[0], gid):
            mode = stat.S_IMODE(status.st_mode)
            syscalls.chown(directory, name, owner[0], gid)
            if not stat.S_ISLNK(status.st_mode) and mode & 0o6000:
                syscalls.chmod(directory, name, mode)

    def _mode(self, parent: Directory, mode: int, caller: Caller) -> int:
        """The mode to create with: umask counts unless the directory hands an ACL down."""
        return mode if self.hands_down_acl(parent) else mode & ~caller.umask

    def hands_down_acl(self, parent: Directory) -> bool:
        """Whether what is made in a directory inherits an ACL from it."""
        if parent.default_acl is None:
            parent.default_acl = self._has_default_acl(parent)
        return parent.default_acl

    def _has_default_acl(self, parent: Directory) -> bool:
        if self._tree.options.noacl:
            return False
        return bool(self._default_acl(self._tree.location(parent)[0]))

    def _make_over_whiteout(
        self,
        parent: Directory,
        name: bytes,
        make: Make,
        owner: tuple[int, int],
        is_directory: bool,
    ) -> int:
        directory = self._tree.upper_directory(parent)
        with self._staging(directory) as (holder, staged):
            try:
                descriptor = self._make_as(owner, make, holder, staged)
            except PermissionError:  # fsuid may not write to the staging directory
                descriptor = make(holder, staged)
            with _ClosedOnFailure(descriptor):
                self._set_owner(holder, staged, owner)
                if is_directory:
                    self.store.marker.set_opaque(holder, staged)
                    syscalls.rename(holder, staged, directory, name, RENAME_EXCHANGE)
                else:
                    syscalls.rename(holder, staged, directory, name)
            return descriptor

    @contextmanager
    def _staging(self, like: int) -> Iterator[tuple[int, bytes]]:
        """A directory in work and a free name in it; whatever is left there afterwards goes.

        What is made there inherits just what it would in the directory `like`: a set-gid bit's
        group and a default ACL.
        """
        name = self.store.staging_name()
        status = os.stat(like)
        acl = self._default_acl(like)
        try:
            if not acl and not status.st_mode & stat.S_ISGID:
                yield self.store.work, name
                return
            syscalls.mkdir(self.store.work, name, 0o700)
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            holder = os.open(name, flags, dir_fd=self.store.work)
            try:
                syscalls.chown(holder, b"", -1, status.st_gid)
                syscalls.chmod(holder, b"", 0o777 | (status.st_mode & stat.S_ISGID))
                if acl:
                    syscalls.setxattr(holder, b"", b"system.posix_acl_default", acl)
                yield holder, name
            finally:
                os.close(holder)
        finally:
            self.store.discard(name)

    def _default_acl(self, directory: int) -> bytes:
        try:
            return syscalls.getxattr(directory, b"", b"system.posix_acl_default")
        except OSError:
            return b""

    def _new_node(
        self, parent: Directory, name: bytes, directory: int, descriptor: int, caller: Caller
    ) -> Made:
        status = os.fstat(descriptor) if descriptor >= 0 else view.entry_status(directory, name)
        if self._tree.owners.override is not None:
            mode = stat.S_IMODE(status.st_mode)
            self._tree.owners.write_override(directory, name, caller.uid, caller.gid, mode)
        node: Node
        if stat.S_ISDIR(status.st_mode):
            node = Directory()
            node.opaque = self._tree.below(parent, name) is not None
        else:
            node = Node(stat.S_IFMT(status.st_mode))
        node.in_upper = True
        node.ino = self._tree.inodes.of(status)
        self.record(parent, name, node.kind)
        self._tree.adopt(node, parent, name)
        if isinstance(node, Directory):
            self._tree.load_empty(node)
        return Made(node, status, descriptor)

    def record(self, parent: Directory, name: bytes, kind: int) -> None:
        """Note what upper now has under a name, and tell that the directory differs."""
        assert parent.changes is not None and parent.order is not None
        self._tree.note(parent, name, kind)
        if kind != WHITEOUT and self._tree.below(parent, name) is None:
            parent.order.add(name)
        self._changed(parent)

    def erase(self, parent: Directory, name: bytes, hidden: bool) -> None:
        """Note that a name is gone; `hidden`: a whiteout stands for it."""
        assert parent.changes is not None and parent.order is not None
        if hidden:
            self._tree.note(parent, name, WHITEOUT)
        else:
            parent.changes.pop(name, None)
        parent.order.discard(name)
        self._changed(parent)

    # --- link ----------------------------------------------------------------------------

    def link(self, node: Node, parent: Directory, name: bytes) -> None:
        """Give a file one more name."""
        if node.is_directory:
            raise failure(errno.EPERM)
        directory = self._ready(parent, name)
        self._copy.copy_up(node, data=not self._tree.options.metacopy)
        if node.metacopy:
            self.keep_redirect(node)
        if node.index_name:
            self.keep_link_count(node)
        source, old = self._tree.location(node)
        if self._tree.below(parent, name) is not None:
            staged = self.store.staging_name()
            try:
                syscalls.link(source, old, self.store.work, staged)
                syscalls.rename(self.store.work, staged, directory, name)
            except BaseException:
                self.store.discard(staged)
                raise
        else:
            syscalls.link(source, old, directory, name)
        self.record(parent, name, node.kind)
        self._tree.alias(node, parent, name)
        self._tree.journal.name(node)
        self._tree.links.remember_upper(node, view.entry_status(directory, name))
        self._changed(node)

    def keep_redirect(self, node: Node) -> None:
        """A metacopy that moves has to say where its data is."""
        assert node.lower is not None
        directory, name = self._tree.location(node)
        path = b"/" + node.lower.inside()
        self.store.marker.set(directory, name, b"redirect", path)

    # --- delete --------------------------------------------------------------------------

    def unlink(self, parent: Directory, name: bytes) -> Node:
        """Delete a name of anything but a directory; returns the node that had it."""
        node = self._tree.find(parent, name)
        if node.is_directory:
            raise failure(errno.EISDIR)
        if not parent.in_upper:
            self._copy.copy_up(parent)
        self.before_losing_name(node, parent, name)
        self._remove_name(parent, name, is_directory=False)
        self.lose_name(node, parent, name)
        return node

    def rmdir(self, parent: Directory, name: bytes) -> Node:
        """Delete an empty directory; returns its node."""
        node = self._tree.find(parent, name)
        if not isinstance(node, Directory):
            raise failure(errno.ENOTDIR)
        if not self._tree.is_empty(node):
            raise failure(errno.ENOTEMPTY)
        self._copy.copy_up(parent)
        self.before_losing_directory(node)
        self._remove_name(parent, name, is_directory=True)
        self.lose_name(node, parent, name)
        return node

    def _remove_name(self, parent: Directory, name: bytes, is_directory: bool) -> None:
        directory = self._tree.upper_directory(parent)
        physical = self._tree.is_physical(parent, name)
        hidden = self._tree.below(parent, name) is not None
        if hidden and physical:
            self._replace_by_whiteout(directory, name, is_directory)
        elif hidden:
            self.place_whiteout(directory, name)
        elif is_directory:
            self._remove_directory(directory, name)
        elif physical:
            syscalls.unlink(directory, name)
        self.erase(parent, name, hidden)

    def place_whiteout(self, directory: int, name: bytes) -> None:
        """Hide a lower name that upper has nothing under."""
        if self.store.marker.make_device(directory, name):
            return
        staged = self.store.staging_name()
        try:
            self.store.marker.make_whiteout(self.store.work, staged)
            self.store.marker.allow_whiteouts(directory)
            syscalls.rename(self.store.work, staged, directory, name, RENAME_NOREPLACE)
        finally:
            self.store.discard(staged)

    def _replace_by_whiteout(self, directory: int, name: bytes, is_directory: bool) -> None:
        staged = self.store.staging_name()
        try:
            self.store.marker.make_whiteout(self.store.work, staged)
            self.store.marker.allow_whiteouts(directory)
            flags = RENAME_EXCHANGE if is_directory else 0
            syscalls.rename(self.store.work, staged, directory, name, flags)
        finally:
            self.store.discard(staged)

    def _remove_directory(self, directory: int, name: bytes) -> None:
        """Remove a directory that shows nothing, though it may hold whiteouts."""
        try:
            syscalls.rmdir(directory, name)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        staged = self.store.staging_name()
        syscalls.rename(directory, name, self.store.work, staged)
        self.store.discard(staged)

    def before_losing_name(self, node: Node, parent: Directory, name: bytes) -> None:
        """Keep what is needed of a file whose name is about to go."""
        if not node.in_upper and node.lower_key is not None:
            # Overlayfs does so, too: the link count of the names that stay is kept in the copy.
            self._copy.copy_up(node)
        if node.index_name:
            # Only a real name goes: then the real and the shown count fall in one step.
            if not self._tree.is_physical(parent, name):
                self._copy.link_up(node, parent, name)
            self.keep_link_count(node)
        if len(node.names) == 1 and self._last_link(node):
            if node.opened and node.in_upper and node.unnamed < 0:
                self._keep_unnamed(node)
            self._keep_last_attributes(node)
        if len(node.names) == 1:
            self._tree.about_to_lose_last_name(node)

    def before_losing_directory(self, node: Directory) -> None:
        """Keep what is needed of a directory whose name is about to go."""
        self._keep_last_attributes(node)
        self._tree.about_to_lose_last_name(node)

    def _keep_last_attributes(self, node: Node) -> None:
        node.last = shown(self._tree, node)
        node.last.nlink = 0 if node.is_directory else max(0, node.last.nlink - 1)

    def _last_link(self, node: Node) -> bool:
        if not node.index_name:
            return True
        status = self._tree.status(node)
        return status.st_nlink + node.link_offset <= 1

    def _keep_unnamed(self, node: Node) -> None:
        directory, name = self._tree.location(node)
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        node.unnamed = os.open(name, flags, dir_fd=directory)

    def keep_link_count(self, node: Node) -> None:
        """Write down an indexed file's link count as a difference to the real one (`U`)."""
        directory, name = self._tree.location(node)
        value = b"U%+d" % node.link_offset
        self.store.marker.set(directory, name, b"nlink", value)

    def lose_name(self, node: Node, parent: Directory, name: bytes) -> None:
        parent.children.pop(name, None)
        try:
            node.names.remove((parent, name))
        except ValueError:
            pass
        if node.names:
            self._tree.journal.name(node)
        else:
            self._tree.journal.gone(node)
        if node.names or not node.index_name:
            self._changed(node)
            return
        # Other lower names may exist that nobody has looked up; the index keeps the file for them.
        status = self._tree.status(node) if node.unnamed < 0 else os.stat(node.unnamed)
        if status.st_nlink + node.link_offset <= 0:
            syscalls.unlink(self.store.index, node.index_name)
            self.store.index_names.discard(node.index_name)
            node.index_name = b""
            self._tree.nameless(node)
        self._changed(node)


class _ClosedOnFailure:
    """Close what was opened for a caller who will not get it; -1 for none.

    Every CREATE comes through it: a generator (contextlib) would take four times as long.
    """

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._descriptor >= 0:
            os.close(self._descriptor)
