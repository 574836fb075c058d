"""Renames in the writable layer: files, and directories that are merged or come from below.

The one rename(2) that makes it visible leaves a whiteout where the old name would show through.
A directory with lower parts takes a redirect along, so that it merges the same at its new place;
where redirects may not be trusted it is copied up whole. The steps are those of overlayfs
(fs/overlayfs/dir.c, ovl_rename). Callers hold the union's lock.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from unionfuse import syscalls
from unionfuse.changes.copyup import CopyUp
from unionfuse.changes.upper import Upper
from unionfuse.layers import whiteout
from unionfuse.layers.upperdir import remove_tree
from unionfuse.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from unionfuse.tree import view
from unionfuse.tree.forgetting import Forgetting
from unionfuse.tree.node import WHITEOUT, Directory, Node
from unionfuse.tree.tree import Tree, failure

_LONGEST_REDIRECT = 2048
"""Bytes; an xattr of ext4 holds less than 4096 in all."""


class Renaming:
    """Renames in one union."""

    def __init__(self, tree: Tree, copy: CopyUp, upper: Upper, forgetting: Forgetting) -> None:
        self._tree = tree
        self._copy = copy
        self._upper = upper
        self._forgetting = forgetting

    def rename(
        self, parent: Directory, name: bytes, new_parent: Directory, new_name: bytes, flags: int
    ) -> tuple[Node, Node | None]:
        """Rename; returns the moved node and the one that was replaced or exchanged, if any.

        Raises:
            OSError: EINVAL for flags but RENAME_NOREPLACE and RENAME_EXCHANGE.
        """
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise failure(errno.EINVAL)
        if len(new_name) > 255:
            raise failure(errno.ENAMETOOLONG)
        if new_name.startswith(whiteout.WHITEOUT_PREFIX):
            raise failure(errno.EINVAL)
        node = self._tree.find(parent, name)
        target = self._target(new_parent, new_name)
        if flags & RENAME_EXCHANGE:
            if target is None:
                raise failure(errno.ENOENT)
            self._exchange(node, parent, name, target, new_parent, new_name)
            return node, target
        if target is not None:
            if flags & RENAME_NOREPLACE:
                raise failure(errno.EEXIST)
            if target is node:
                return node, None
            self._check_replaceable(node, target)
        self._move(node, parent, name, target, new_parent, new_name)
        return node, target

    def _target(self, parent: Directory, name: bytes) -> Node | None:
        if parent.deleted and parent is not self._tree.root:
            raise failure(errno.ENOENT)
        return self._tree.find(parent, name) if self._tree.exists(parent, name) else None

    def _check_replaceable(self, node: Node, target: Node) -> None:
        if isinstance(target, Directory):
            if not node.is_directory:
                raise failure(errno.EISDIR)
            if not self._tree.is_empty(target):
                raise failure(errno.ENOTEMPTY)
        elif node.is_directory:
            raise failure(errno.ENOTDIR)

    def _move(
        self,
        node: Node,
        parent: Directory,
        name: bytes,
        target: Node | None,
        new_parent: Directory,
        new_name: bytes,
    ) -> None:
        self._copy.copy_up(parent)
        self._copy.copy_up(new_parent)
        with _in_use(node):
            self._prepare_to_move(node, parent, name, new_parent, new_name)
        if target is not None:
            self._prepare_to_replace(target, new_parent, new_name)
        source = self._tree.upper_directory(parent)
        goal = self._tree.upper_directory(new_parent)
        hidden = self._tree.below(parent, name) is not None
        self._tree.journal.moving(source, name)
        whiteout_stays = self._rename_on_disk(
            source,
            name,
            goal,
            new_name,
            hidden,
            node.is_directory,
            self._covers(new_parent, new_name),
        )
        if target is not None:
            self._upper.lose_name(target, new_parent, new_name)
        self._upper.erase(parent, name, whiteout_stays)
        self._upper.record(new_parent, new_name, node.kind)
        self._relabel(node, parent, name, new_parent, new_name)

    def finish(self, parent: Directory, name: bytes) -> None:
        """After a crash between the two steps of a rename: hide the old name, if it still shows."""
        self._tree.load(parent)
        if self._tree.exists(parent, name) and not self._tree.is_physical(parent, name):
            self._upper.place_whiteout(self._tree.upper_directory(parent), name)
            self._upper.erase(parent, name, hidden=True)

    def _covers(self, parent: Directory, name: bytes) -> bool:
        """Whether upper has a whiteout under a name."""
        assert parent.changes is not None
        return parent.changes.get(name) == WHITEOUT

    def _relabel(
        self, node: Node, parent: Directory, name: bytes, new_parent: Directory, new_name: bytes
    ) -> None:
        if parent.children.get(name) is node:
            del parent.children[name]
        new_parent.children[new_name] = node
        index = node.names.index((parent, name))
        node.names[index] = (new_parent, new_name)
        self._tree.journal.name(node)

    def _rename_on_disk(
        self,
        source: int,
        name: bytes,
        goal: int,
        new_name: bytes,
        hidden: bool,
        is_directory: bool,
        over_whiteout: bool,
    ) -> bool:
        """The one rename, leaving a whiteout where the old name would show through.

        Returns whether there is one.
        """
        if over_whiteout and is_directory:
            # A directory cannot replace a device: swap them, which puts the whiteout in place.
            if hidden:
                self._upper.store.marker.allow_whiteouts(source)
            syscalls.rename(source, name, goal, new_name, RENAME_EXCHANGE)
            if not hidden:
                try:
                    syscalls.unlink(source, name)
                except OSError:  # the rename has been made; a whiteout over nothing is harmless
                    return True
        elif not hidden:
            syscalls.rename(source, name, goal, new_name)
        else:
            self._rename_and_whiteout(source, name, goal, new_name)
        return hidden

    def _rename_and_whiteout(self, source: int, name: bytes, goal: int, new_name: bytes) -> None:
        if self._upper.store.marker.devices:
            try:
                syscalls.rename(source, name, goal, new_name, RENAME_WHITEOUT)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EPERM):
                    raise
        # Not in one step here: a crash in between shows the file under both names, never none.
        staged = self._upper.store.staging_name()
        try:
            self._upper.store.marker.make_whiteout(self._upper.store.work, staged)
            self._upper.store.marker.allow_whiteouts(source)
            syscalls.rename(source, name, goal, new_name)
            syscalls.rename(self._upper.store.work, staged, source, name)
        finally:
            self._upper.store.discard(staged)

    def _prepare_to_move(
        self, node: Node, parent: Directory, name: bytes, new_parent: Directory, new_name: bytes
    ) -> None:
        """Bring what moves into upper, so marked that it means the same at its new place."""
        if not isinstance(node, Directory):
            self._copy.copy_up(node, data=not self._tree.options.metacopy)
            if node.index_name and not self._tree.is_physical(parent, name):
                self._copy.link_up(node, parent, name)
            if node.metacopy:
                self._upper.keep_redirect(node)
            return
        self._copy.copy_up(node)
        self._tree.load(node)
        directory = self._tree.upper_directory(node)
        if node.lowers:
            if self._may_redirect(node):
                self._set_redirect(node, directory, parent is new_parent)
            else:
                self._detach(node)
        elif not node.opaque and self._hides_directory(new_parent, new_name):
            self._cut_off(node, directory)

    def _may_redirect(self, node: Directory) -> bool:
        short = len(node.lowers[0].path) < _LONGEST_REDIRECT
        return self._tree.options.redirect_dir == "on" and self._upper.store.privileged and short

    def _hides_directory(self, parent: Directory, name: bytes) -> bool:
        stub = self._tree.below(parent, name)
        return stub is not None and stub.kind == stat.S_IFDIR

    def _set_redirect(self, node: Directory, directory: int, same_parent: bool) -> None:
        """Say where the lower part of a directory is: a sibling's name, or the whole path."""
        if node.redirect is not None and (same_parent or node.redirect.startswith(b"/")):
            return
        path = node.lowers[0].path
        redirect = os.path.basename(path) if same_parent else b"/" + path
        self._upper.store.marker.set(directory, b"", b"redirect", redirect)
        node.redirect = redirect

    def _detach(self, node: Directory) -> None:
        """Copy up all that a directory shows and cut it off: the way without redirects."""
        found = [node]
        try:
            for directory in found:  # grows while it is walked; no recursion: trees may be deep
                self._detach_names(directory, found)
            for directory in reversed(found):
                if directory.lowers:
                    self._make_standalone(directory)
        finally:
            for directory in reversed(found[1:]):
                directory.opened -= 1
                self._forgetting.release_if_unused(directory)

    def _detach_names(self, directory: Directory, found: list[Directory]) -> None:
        """Copy up what a directory shows; add its directories to `found`, marked as in use."""
        for name, _ in list(self._tree.names_after(directory, 0)):
            child = self._tree.find(directory, name)
            self._copy.copy_up(child)
            self._tree.journal.name(child)  # its id is the index's, its place will not be
            if isinstance(child, Directory):
                self._tree.load(child)
                child.opened += 1
                found.append(child)
                continue
            if child.index_name and not self._tree.is_physical(directory, name):
                self._copy.link_up(child, directory, name)
            self._forgetting.release_if_unused(child)

    def _make_standalone(self, node: Directory) -> None:
        """Make a directory opaque that upper has all of by now; its whiteouts go."""
        directory = self._tree.upper_directory(node)
        self._cut_off(node, directory)
        self._tree.tables.ask_all(node.id)
        node.lowers, node.view, node.record = (), view.EMPTY_VIEW, 0
        changes = node.changes or {}
        for name in [name for name, kind in changes.items() if kind == WHITEOUT]:
            remove_tree(directory, name)
            del changes[name]
        self._tree.begin_changes(node, view.EMPTY_VIEW, changes)

    def _cut_off(self, node: Directory, directory: int) -> None:
        self._upper.store.marker.set_opaque(directory, b"")
        self._upper.store.marker.remove(directory, b"", b"redirect")
        node.opaque, node.redirect = True, None

    def _prepare_to_replace(self, target: Node, parent: Directory, name: bytes) -> None:
        if not isinstance(target, Directory):
            self._upper.before_losing_name(target, parent, name)
            return
        self._upper.before_losing_directory(target)
        if target.in_upper and target.changes:
            self._empty(target, parent, name)

    def _empty(self, target: Directory, parent: Directory, name: bytes) -> None:
        """Swap a directory that shows nothing but holds whiteouts for one that holds nothing."""
        staged = self._upper.store.staging_name()
        directory = self._tree.upper_directory(parent)
        status = self._tree.status(target)
        try:
            syscalls.mkdir(self._upper.store.work, staged, stat.S_IMODE(status.st_mode))
            syscalls.chown(self._upper.store.work, staged, status.st_uid, status.st_gid)
            self._upper.store.marker.set_opaque(self._upper.store.work, staged)
            syscalls.rename(self._upper.store.work, staged, directory, name, RENAME_EXCHANGE)
        finally:
            self._upper.store.discard(staged)
        self._tree.stack.cache.discard(("upper", target.id))
        target.changes = {}

    def _exchange(
        self,
        node: Node,
        parent: Directory,
        name: bytes,
        target: Node,
        new_parent: Directory,
        new_name: bytes,
    ) -> None:
        if target is node:
            return
        self._copy.copy_up(parent)
        self._copy.copy_up(new_parent)
        with _in_use(node, target):
            self._prepare_to_move(node, parent, name, new_parent, new_name)
            self._prepare_to_move(target, new_parent, new_name, parent, name)
        source = self._tree.upper_directory(parent)
        goal = self._tree.upper_directory(new_parent)
        self._tree.journal.moving(source, name)
        syscalls.rename(source, name, goal, new_name, RENAME_EXCHANGE)
        for directory in (parent, new_parent):
            self._tree.load(directory)
        self._upper.record(parent, name, target.kind)
        self._upper.record(new_parent, new_name, node.kind)
        parent.children[name] = target
        new_parent.children[new_name] = node
        here = node.names.index((parent, name))
        there = target.names.index((new_parent, new_name))
        node.names[here] = (new_parent, new_name)
        target.names[there] = (parent, name)
        self._tree.journal.name(node)
        self._tree.journal.name(target)


@contextmanager
def _in_use(*nodes: Node) -> Iterator[None]:
    """Keep nodes that nobody else may need: letting go of a child lets go of its parents, too."""
    for node in nodes:
        node.opened += 1
    try:
        yield
    finally:
        for node in nodes:
            node.opened -= 1
