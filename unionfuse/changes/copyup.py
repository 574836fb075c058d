"""Copy-up: how a lower file gets into upper before its first change.

Staged in the work directory (staging.py), then one rename makes it visible. A crash leaves either
the lower file or the whole copy; what is left in work is thrown away by the next mount.

The union's lock is held to begin and to publish, but not while the data of a big file is
copied. Who finds that somebody else was faster throws his own copy away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from unionfuse import syscalls
from unionfuse.changes.ahead import Ahead
from unionfuse.changes.staging import Original, Staging
from unionfuse.layers import whiteout
from unionfuse.tree import view
from unionfuse.tree.node import Directory, Node
from unionfuse.tree.tree import Tree, failure


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
        self._staging = Staging(tree.upper) if tree.upper is not None else None
        self._ahead: Ahead | None = None
        if self._staging is not None and tree.upper is not None and tree.upper.sync:
            self._ahead = Ahead(tree, tree.upper, self._staging)
        self._filling: set[Node] = set()  # metacopies whose data is being copied without the lock
        self._filled = threading.Condition(self._lock)

    def close(self) -> None:
        """Throw away what is staged, and copy nothing any more."""
        if self._ahead is not None:
            self._ahead.close()

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

    def copy_up(self, node: Node, data: bool = True, size: int | None = None) -> bool:
        """Bring a node into upper, if it is not there.

        With the lock held by the caller all of it happens at once. Called without, only the
        beginning and the end hold it.

        Arguments:
            data: the file's data is needed; without, `metacopy=on` leaves it where it is.
            size: no more than so many bytes are needed: the file is about to be truncated.

        Returns:
            Whether there was anything to do.

        Raises:
            OSError: as the file system below says; the tree is as it was.
        """
        if not self.needed(node, data):
            return False  # and never will be again
        with self._lock:
            self.wait(node)
            if not self.needed(node, data):
                return False
            if self._staging is None:
                raise failure(errno.EROFS)
            if node.in_upper:  # a metacopy whose data is wanted
                if size == 0:
                    self._drop_data(node)
                    return True
                source = self._open_data(node)
                self._filling.add(node)
            else:
                self._parents(node)
                if isinstance(node, Directory):
                    if node.deleted:
                        raise failure(errno.ENOENT)  # nothing is left that could be changed
                    self._copy_directory(node)
                    return True
                whole = data or self._whole(node)
                if size is None and whole and self._publish_ahead(node):
                    return True
                with_data = node.is_regular and size != 0 and whole
                original = self._original(node, with_data)
                source = original.source
                if not with_data:
                    self._stage_and_publish(node, original, 0, metacopy=not whole)
                    return True
        try:
            if node in self._filling:
                self._complete(node, source, size)
            else:
                self._stage_and_publish(node, original, size)
        finally:
            os.close(source)
        return True

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

    def _original(self, node: Node, with_data: bool) -> Original:
        tree, place = self._tree, node.lower
        assert place is not None
        location = place.layer.directory(place.path), place.name
        origin = tree.origins.of(place)
        original = Original(tree.status(node), node.ino, origin, location)
        if not with_data:
            return original
        found = tree.data_location(node)
        source = view.open_entry(*found, os.O_RDONLY)
        if found != location:
            return original._replace(source=source)
        return original._replace(location=(source, b""), source=source, is_itself=True)

    # --- ahead ---------------------------------------------------------------------------

    def attributes_changed(self, node: Node) -> None:
        """A node was copied up because its attributes change: its neighbours may be next."""
        if self._ahead is None or not self._whole(node):
            return
        if isinstance(node, Directory):
            self._ahead.follow(node, is_file=False)
        elif node.names and node.is_regular:
            self._ahead.follow(node.names[0][0], is_file=True)

    def _publish_ahead(self, node: Node) -> bool:
        """Publish the copy of a file that was staged ahead, if there is one."""
        if self._ahead is None or not node.is_regular or node.deleted:
            return False
        staged = self._ahead.fetch(*node.names[0])
        if staged is None:
            return False
        try:
            self._publish(node, staged, b"", 1)
        except BaseException:
            self._ahead.discard(staged)
            raise
        node.lower = None
        return True

    # --- files ---------------------------------------------------------------------------

    def _stage_and_publish(
        self, node: Node, original: Original, size: int | None, metacopy: bool = False
    ) -> None:
        upper, staging, status = self._tree.upper, self._staging, original.status
        assert upper is not None and staging is not None
        staged = upper.staging_name()
        try:
            if node.is_regular:
                staging.regular(staged, original, status.st_size if metacopy else size)
            else:
                staging.special(staged, original)
            with self._lock:
                if node.in_upper:
                    upper.discard(staged)
                    return
                if metacopy:
                    self._mark_metacopy(staged, node)
                links = status.st_nlink if not node.is_directory else 1
                self._publish(node, staged, original.origin if links > 1 else b"", links)
        except BaseException:
            upper.discard(staged)
            raise
        if metacopy is False:
            node.lower = None

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
        upper, staging = self._tree.upper, self._staging
        assert upper is not None and staging is not None
        try:
            staging.copy_data(source, target, size)
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
        upper, staging = self._tree.upper, self._staging
        assert upper is not None and staging is not None
        staged = upper.staging_name()
        self._tree.load(node)
        place = node.lowers[0]
        location = place.layer.directory(place.path), b""
        origin = self._tree.origins.of(place)
        try:
            syscalls.mkdir(upper.work, staged, 0o700)
            staging.metadata(staged, Original(os.stat(location[0]), node.ino, origin, location))
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
