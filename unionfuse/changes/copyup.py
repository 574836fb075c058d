"""Copy-up: how a lower file gets into upper before its first change.

Staged in the work directory, in the order of overlayfs (fs/overlayfs/copy_up.c): data, owner,
xattrs, mode, times, then one rename makes it visible. A crash leaves either the lower file or
the whole copy; what is left in work is thrown away by the next mount.

The union's lock is held to begin and to publish, but not while the data of a big file is
copied. Who finds that somebody else was faster throws his own copy away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any

from unionfuse import syscalls
from unionfuse.layers import whiteout
from unionfuse.layers.layer import Place
from unionfuse.tree import view
from unionfuse.tree.node import Directory, Node
from unionfuse.tree.tree import Tree, failure

INLINE_SIZE = 128 * 1024
"""Bytes that are copied at once; more is copied without the lock, by a thread that may wait."""

_CHUNK = 8 << 20  # bytes that are copied before their writing is begun


class CopyUp:
    """Copies nodes of one tree up.

    Arguments:
        lock: the union's.
        published: called with the lock held when a node's file has become upper's.
    """

    def __init__(
        self,
        tree: Tree,
        lock: threading.RLock,
        published: Callable[[Node], None],
    ) -> None:
        self._tree = tree
        self._lock: Any = lock
        self._published = published
        self._unshared: set[int] = set()  # st_dev of files whose blocks upper cannot share
        self._filling: set[Node] = set()  # metacopies whose data is being copied without the lock
        self._filled = threading.Condition(self._lock)

    # --- what is to be done --------------------------------------------------------------

    def needed(self, node: Node, data: bool) -> bool:
        """Whether a change must copy first; `data`: it changes or exposes the file's data."""
        return not node.in_upper or (data and node.metacopy)

    def size(self, node: Node, data: bool = True) -> int:
        """Bytes that copying up this node would have to copy."""
        if not node.is_regular or not self.needed(node, data) or not (data or self._whole(node)):
            return 0
        directory, name = self._tree.data_location(node)
        return view.entry_status(directory, name).st_blocks * 512 if name else 0

    def wait(self, node: Node) -> None:
        """Wait until nobody is filling in a metacopy's data: what changes now would be lost.

        The lock, which the caller holds, is let go meanwhile.
        """
        self._filled.wait_for(lambda: node not in self._filling)

    def _whole(self, node: Node) -> bool:
        """Whether even a change of metadata copies the data."""
        return not self._tree.options.metacopy or not node.is_regular

    # --- doing it ------------------------------------------------------------------------

    def copy_up(self, node: Node, data: bool = True, size: int | None = None) -> None:
        """Bring a node into upper, if it is not there.

        With the lock held by the caller all of it happens at once. Called without, only the
        beginning and the end hold it.

        Arguments:
            data: the file's data is needed; without, `metacopy=on` leaves it where it is.
            size: no more than so many bytes are needed: the file is about to be truncated.

        Raises:
            OSError: as the file system below says; the tree is as it was.
        """
        if not self.needed(node, data):
            return  # and never will be again
        tree = self._tree
        with self._lock:
            self.wait(node)
            if not self.needed(node, data):
                return
            if tree.upper is None:
                raise failure(errno.EROFS)
            if node.in_upper:  # a metacopy whose data is wanted
                if size == 0:
                    self._drop_data(node)
                    return
                source = self._open_data(node)
                self._filling.add(node)
            else:
                self._parents(node)
                if isinstance(node, Directory):
                    if node.deleted:
                        raise failure(errno.ENOENT)  # nothing is left that could be changed
                    self._copy_directory(node)
                    return
                status = self._tree.status(node)
                whole = data or self._whole(node)
                if not node.is_regular or size == 0 or not whole:
                    self._stage_and_publish(node, status, -1, 0, metacopy=not whole)
                    return
                source = self._open_data(node)
        try:
            if node in self._filling:
                self._complete(node, source, size)
            else:
                self._stage_and_publish(node, status, source, size)
        finally:
            os.close(source)

    def _parents(self, node: Node) -> None:
        """Bring the directories above a node into upper, from the top down (paths may be deep)."""
        missing: list[Directory] = []
        while node.names and not node.names[0][0].in_upper:
            node = node.names[0][0]
            assert isinstance(node, Directory)
            missing.append(node)
        for directory in reversed(missing):
            self._copy_directory(directory)

    def _open_data(self, node: Node) -> int:
        directory, name = self._tree.data_location(node)
        return view.open_entry(directory, name, os.O_RDONLY)

    # --- files ---------------------------------------------------------------------------

    def _stage_and_publish(
        self,
        node: Node,
        status: os.stat_result,
        source: int,
        size: int | None,
        metacopy: bool = False,
    ) -> None:
        upper = self._tree.upper
        assert upper is not None and node.lower is not None
        place = node.lower
        staged = upper.staging_name()
        try:
            if node.is_regular:
                length = status.st_size if metacopy else size
                origin = self._stage_regular(staged, node, status, source, length)
            else:
                self._stage_special(staged, status, place)
                origin = self._copy_metadata(staged, status, place, node.ino)
            with self._lock:
                if node.in_upper:
                    upper.discard(staged)
                    return
                if metacopy:
                    self._mark_metacopy(staged, node)
                links = status.st_nlink if not node.is_directory else 1
                self._publish(node, staged, origin if links > 1 else b"", links)
        except BaseException:
            upper.discard(staged)
            raise
        if metacopy is False:
            node.lower = None

    def _stage_regular(
        self,
        staged: bytes,
        node: Node,
        status: os.stat_result,
        source: int,
        size: int | None,
    ) -> bytes:
        """Make a whole copy of a file; returns its origin mark. Without a source it is a hole."""
        upper = self._tree.upper
        assert upper is not None and node.lower is not None
        target = syscalls.create(upper.work, staged, os.O_WRONLY, 0o600)
        try:
            if source >= 0:
                self._copy_data(source, target, size)
                upper.begin_to_settle(target)  # the rest is done while the device writes
            elif size:
                syscalls.ftruncate(target, size)
            origin = self._copy_metadata(staged, status, node.lower, node.ino)
            if source >= 0:
                upper.settle(target)
            return origin
        finally:
            os.close(target)

    def _stage_special(self, staged: bytes, status: os.stat_result, place: Place) -> None:
        upper = self._tree.upper
        assert upper is not None
        if stat.S_ISLNK(status.st_mode):
            directory = place.layer.directory(place.path)
            syscalls.symlink(os.readlink(place.name, dir_fd=directory), upper.work, staged)
        else:
            syscalls.mknod(upper.work, staged, status.st_mode, status.st_rdev)

    def _copy_metadata(
        self, staged: bytes, status: os.stat_result, place: Place, ino: int
    ) -> bytes:
        """Give a staged file all that its lower file has but data; returns its origin mark."""
        upper = self._tree.upper
        assert upper is not None
        directory = place.layer.directory(place.path)
        syscalls.chown(upper.work, staged, status.st_uid, status.st_gid)
        copy_attributes(directory, place.name, upper.work, staged)
        origin = self._tree.origins.of(place)
        self._mark_origin(staged, origin, ino)
        if not stat.S_ISLNK(status.st_mode):
            syscalls.chmod(upper.work, staged, stat.S_IMODE(status.st_mode))
        syscalls.utimens(upper.work, staged, (status.st_atime_ns, status.st_mtime_ns))
        return origin

    def _mark_origin(self, staged: bytes, origin: bytes, ino: int) -> None:
        """Note where a copy came from, so that it keeps its st_ino after a new mount.

        The handle of the lower file tells that to who may open it by handle; for others the
        number itself is kept. Both are a convenience: what refuses them goes without.
        """
        upper = self._tree.upper
        assert upper is not None
        try:
            if origin:
                upper.marker.set(upper.work, staged, b"origin", origin)
            if not origin or not upper.privileged:
                upper.marker.set(upper.work, staged, b"unionfuse.inode", b"%d" % ino)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise

    def _mark_metacopy(self, staged: bytes, node: Node) -> None:
        upper = self._tree.upper
        assert upper is not None and node.lower is not None
        upper.marker.set(upper.work, staged, b"metacopy", b"")
        if node.lower.inside() != self._tree.path(node):
            upper.marker.set(upper.work, staged, b"redirect", b"/" + node.lower.inside())

    # --- metacopies ----------------------------------------------------------------------

    def _complete(self, node: Node, source: int, size: int | None) -> None:
        """Fill in the data that a metacopy left below; nobody reads it before the mark is gone."""
        try:
            with self._lock:
                directory, name = self._tree.location(node)
                before = _status(directory, name)
                capability = _capability(directory, name)
                target = _open_to_write(directory, name)
            self._fill(target, source, size)
            with self._lock:
                self._end_metacopy(node, before, capability)
        finally:
            with self._lock:
                self._filling.discard(node)
                self._filled.notify_all()

    def _fill(self, target: int, source: int, size: int | None) -> None:
        upper = self._tree.upper
        assert upper is not None
        try:
            self._copy_data(source, target, size)
            upper.settle(target)
        finally:
            os.close(target)

    def _drop_data(self, node: Node) -> None:
        directory, name = self._tree.location(node)
        syscalls.truncate(directory, name, 0)
        self._end_metacopy(node, _status(directory, name), b"")

    def _end_metacopy(self, node: Node, before: os.stat_result, capability: bytes) -> None:
        """Take the mark off, with the times and the capability put back that a write took away.

        Arguments:
            before: whose times it gets.
            capability: the value of `security.capability`; empty for none.
        """
        upper = self._tree.upper
        assert upper is not None
        directory, name = self._tree.location(node)
        if capability:
            syscalls.setxattr(directory, name, b"security.capability", capability)
        upper.marker.remove(directory, name, b"metacopy")
        syscalls.utimens(directory, name, (before.st_atime_ns, before.st_mtime_ns))
        node.metacopy = False
        node.lower = None
        self._published(node)

    # --- directories ---------------------------------------------------------------------

    def _copy_directory(self, node: Directory) -> None:
        upper = self._tree.upper
        assert upper is not None
        staged = upper.staging_name()
        self._tree.load(node)
        place = node.lowers[0]
        status = os.stat(place.layer.directory(place.path))
        try:
            syscalls.mkdir(upper.work, staged, 0o700)
            self._copy_metadata(staged, status, place, node.ino)
            self._publish(node, staged, b"", 1)
        except BaseException:
            upper.discard(staged)
            raise

    # --- publishing ----------------------------------------------------------------------

    def _publish(self, node: Node, staged: bytes, origin: bytes, links: int) -> None:
        """Make a staged copy visible under the node's names. The lock is held."""
        tree, upper = self._tree, self._tree.upper
        assert upper is not None
        tree.leave_table(node)
        if node.deleted:
            node.unnamed = os.open(
                staged, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=upper.work
            )
            tree.journal.keep(node)
            syscalls.unlink(upper.work, staged)
        elif links > 1 and origin:
            self._publish_in_index(node, staged, origin, links)
        else:
            self._publish_name(node, staged, *node.names[0])
        node.in_upper = True
        node.metacopy = self._is_metacopy(node)
        if isinstance(node, Directory):
            assert node.view is not None
            tree.begin_changes(node, node.view, {})
            tree.tables.open(node.id, changed=True)
        self._published(node)
        if node.unnamed >= 0:
            tree.nameless(node)
        if node.index_name and not node.deleted:
            self.link_up(node, *node.names[0])

    def _is_metacopy(self, node: Node) -> bool:
        if not self._tree.options.metacopy or not node.is_regular:
            return False
        return whiteout.read_marks(*self._tree.location(node)).metacopy

    def _publish_name(self, node: Node, staged: bytes, parent: Directory, name: bytes) -> None:
        tree, upper = self._tree, self._tree.upper
        assert upper is not None
        if not parent.in_upper:
            self.copy_up(parent)
        directory = tree.upper_directory(parent)
        times = os.stat(directory)
        tree.load(parent)
        assert parent.changes is not None
        syscalls.rename(upper.work, staged, directory, name)
        tree.note(parent, name, node.kind)
        # What is visible stays: a time that the parent does not get back is no reason to fail.
        with contextlib.suppress(OSError):
            syscalls.utimens(directory, b"", (times.st_atime_ns, times.st_mtime_ns))

    def _publish_in_index(self, node: Node, staged: bytes, origin: bytes, links: int) -> None:
        """A file with several lower names: the index keeps it for those not copied up yet."""
        tree, upper = self._tree, self._tree.upper
        assert upper is not None
        index = upper.open_index()
        name = origin.hex().encode("ascii")
        node.link_offset = links - 1  # one real link: the one in the index
        node.index_name = name
        self._note_lower_count(node, upper.work, staged, links)
        syscalls.rename(upper.work, staged, index, name)
        upper.index_names.add(name)
        tree.links.remember_upper(node, view.entry_status(index, name))

    def link_up(self, node: Node, parent: Directory, name: bytes) -> None:
        """Give an indexed file that upper has under other names this lower name of it, too.

        While the real link is made, the note about the link count counts from the lower file, which
        stays as it is (as ovl_link_up does): a crash in between leaves the count right.
        """
        tree, upper = self._tree, self._tree.upper
        assert upper is not None
        if not parent.in_upper:
            self.copy_up(parent)
        if tree.is_physical(parent, name):
            return
        directory = tree.upper_directory(parent)
        times = os.stat(directory)
        source, old = tree.location(node)
        tree.load(parent)
        assert parent.changes is not None
        links = tree.status(node).st_nlink + node.link_offset
        self._note_lower_count(node, source, old, links)
        syscalls.link(source, old, directory, name)
        node.link_offset -= 1
        tree.note(parent, name, node.kind)
        upper.marker.set(directory, name, b"nlink", b"U%+d" % node.link_offset)
        syscalls.utimens(directory, b"", (times.st_atime_ns, times.st_mtime_ns))

    def _note_lower_count(self, node: Node, directory: int, name: bytes, links: int) -> None:
        """Write down the link count of an indexed file as a difference to the lower file's."""
        tree, upper = self._tree, self._tree.upper
        assert upper is not None
        lower = tree.origins.links(bytes.fromhex(node.index_name.decode("ascii")))
        note = b"L%+d" % (links - lower) if lower else b"U%+d" % node.link_offset
        upper.marker.set(directory, name, b"nlink", note)

    # --- data ----------------------------------------------------------------------------

    def _copy_data(self, source: int, target: int, size: int | None = None) -> None:
        """Copy a file's data: shared blocks where the file system can, holes kept.

        Arguments:
            size: copy no more than so many bytes.

        Raises:
            OSError: EIO, ENOSPC, EDQUOT and whatever else reading or writing gives.
        """
        status = os.fstat(source)
        end = status.st_size
        if size is not None and size < end:
            end = size
        elif self._share_blocks(source, target, status.st_dev):
            return
        upper = self._tree.upper
        assert upper is not None
        for start, stop in _pieces(source, status, end):
            while start < stop:
                count = _copy_range(source, target, start, min(stop, start + _CHUNK))
                if count == 0:
                    break  # the layer changed under us: what is missing reads as zeros
                start += count
                if start < end:
                    upper.begin_to_settle(target)
        if os.fstat(target).st_size != end:
            syscalls.ftruncate(target, end)

    def _share_blocks(self, source: int, target: int, device: int) -> bool:
        if device in self._unshared:
            return False
        try:
            syscalls.clone_file(target, source)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY):
                self._unshared.add(device)
            return False
        return True


def _pieces(source: int, status: os.stat_result, end: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what is not a hole in a file before `end`."""
    if status.st_blocks * 512 >= status.st_size:
        yield 0, end
        return
    offset = 0
    while offset < end:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
            offset = min(end, os.lseek(source, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole up to the end
        if start < end:
            yield start, offset


_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def _copy_range(source: int, target: int, start: int, stop: int) -> int:
    """Copy bytes to the same place in another file; returns how many, 0 at the source's end."""
    try:
        count = syscalls.copy_range(source, target, stop - start, start, start)
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
        count = 0
    if count:
        return count
    data = memoryview(os.pread(source, min(1 << 20, stop - start), start))
    written = 0
    while written < len(data):
        written += syscalls.pwrite(target, data[written:], start + written)
    return written


def _status(directory: int, name: bytes) -> os.stat_result:
    return view.entry_status(directory, name) if name else os.stat(directory)


def _open_to_write(directory: int, name: bytes) -> int:
    if name:
        return view.open_entry(directory, name, os.O_WRONLY)
    return os.open(syscalls.proc_path(directory), os.O_WRONLY | os.O_CLOEXEC)


def _capability(directory: int, name: bytes) -> bytes:
    try:
        return syscalls.getxattr(directory, name, b"security.capability")
    except OSError:
        return b""


def copy_attributes(source: int, name: bytes, target: int, new: bytes) -> None:
    """Copy xattrs, ACLs and capabilities among them, but not the overlay's own marks.

    Raises:
        OSError: one that matters (an ACL, a security attribute) cannot be set.
    """
    try:
        attributes = syscalls.listxattr(source, name)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for attribute in attributes:
        if whiteout.unescape_attribute(attribute) is None:
            continue
        try:
            value = syscalls.getxattr(source, name, attribute)
            syscalls.setxattr(target, new, attribute, value)
        except OSError as error:
            matters = attribute.startswith((b"system.posix_acl", b"security."))
            gone = error.errno == errno.ENODATA
            refused = error.errno in (errno.EOPNOTSUPP, errno.EPERM)
            if not gone and not (refused and not matters):
                raise
