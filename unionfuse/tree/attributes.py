"""Attributes: what stat(2) shows of a node, and how chmod, chown, truncate and utimes change it.

What is changed is in upper already. Callers hold the union's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from unionfuse import syscalls
from unionfuse.layers.owners import acl_group_bits
from unionfuse.tree import view
from unionfuse.tree.node import Changes, Directory, Node
from unionfuse.tree.tree import Tree, failure
from unionfuse.wire._attributes import Attributes


def shown(tree: Tree, node: Node, status: os.stat_result | None = None) -> Attributes:
    """What stat(2) shows of a node.

    Arguments:
        status: what is on disk, where the caller has just looked.
    """
    if status is None and node.unnamed < 0 and node.deleted and node is not tree.root:
        if node.last is None:
            raise failure(errno.ENOENT)
        return node.last
    if status is None:
        status = tree.status(node)
    attributes = Attributes(status, node.ino, _links(tree, node, status))
    if node.metacopy and node.lower is not None:
        directory, name = tree.redirects.data(node.lower)
        attributes.blocks = view.entry_status(directory, name).st_blocks
    if not tree.owners.plain:
        tree.owners.show(attributes, *tree.location(node))
    if tree.options.noacl and status.st_mode & stat.S_IRWXG:
        _fold_mask(tree, node, attributes)
    return attributes


def _fold_mask(tree: Tree, node: Node, attributes: Attributes) -> None:
    """Without ACLs the mask must not be taken for the group's rights: grant the lesser."""
    directory, name = tree.location(node)
    try:
        acl = syscalls.getxattr(directory, name, b"system.posix_acl_access")
    except OSError:
        return
    group = acl_group_bits(acl)
    attributes.mode &= ~stat.S_IRWXG | (group << 3)


def _links(tree: Tree, node: Node, status: os.stat_result) -> int:
    if not isinstance(node, Directory):
        # A file that no known name leads to may have names that nobody has looked up yet.
        return max(0, status.st_nlink + node.link_offset)
    if node.deleted and node is not tree.root:
        return 0
    if tree.options.static_nlink or _is_merged(tree, node):
        return 1  # overlayfs does so, and find(1) takes it for "not known"
    return status.st_nlink


def _is_merged(tree: Tree, directory: Directory) -> bool:
    """Whether a directory comes from several places; overlayfs shows one link for these."""
    if directory.view is None and directory.lowers and not directory.in_upper:
        if len(directory.lowers) == 1 or directory.record:
            return False
        with contextlib.suppress(OSError):  # then it is what merging it finds
            if view.merges(directory.lowers):
                return True
        tree.load(directory)
    if directory.record and not directory.in_upper:
        return False  # the index has the right count already
    return len(directory.lowers) + directory.in_upper > 1


def change(tree: Tree, node: Node, changes: Changes, opened: int) -> None:
    """Change the attributes of a node.

    Arguments:
        opened: a descriptor of the file that may be written through; -1 for none.
    """
    directory, name = tree.location(node)
    # A chown drops set-uid and capabilities by itself in the file system below.
    _set_owner_and_mode(tree, node, directory, name, changes)
    if changes.size is not None:
        if node.is_directory:
            raise failure(errno.EISDIR)
        if opened >= 0:
            syscalls.ftruncate(opened, changes.size)
        else:
            syscalls.truncate(directory, name, changes.size)
    if changes.kill_privileges and changes.uid is None and changes.gid is None:
        kill_privileges(tree, node)
    if changes.kill_capabilities:
        _kill_capabilities(tree, node)
    if changes.atime_ns is not None or changes.mtime_ns is not None:
        syscalls.utimens(*tree.location(node), (changes.atime_ns, changes.mtime_ns))


def change_remembered(last: Attributes, changes: Changes) -> None:
    """Change the attributes of a deleted directory, of which these are all that is left."""
    now = syscalls.now_ns()
    last.ctime_ns = now
    if changes.mode is not None:
        last.mode = stat.S_IFMT(last.mode) | stat.S_IMODE(changes.mode)
    if changes.uid is not None:
        last.uid = changes.uid
    if changes.gid is not None:
        last.gid = changes.gid
    if changes.atime_ns is not None:
        last.atime_ns = now if changes.atime_ns == syscalls.NOW else changes.atime_ns
    if changes.mtime_ns is not None:
        last.mtime_ns = now if changes.mtime_ns == syscalls.NOW else changes.mtime_ns


def _set_owner_and_mode(
    tree: Tree, node: Node, directory: int, name: bytes, changes: Changes
) -> None:
    owners = tree.owners
    if changes.uid is None and changes.gid is None and changes.mode is None:
        return
    if owners.override is not None:
        before = shown(tree, node)
        uid = before.uid if changes.uid is None else changes.uid
        gid = before.gid if changes.gid is None else changes.gid
        mode = before.mode if changes.mode is None else changes.mode
        if changes.mode is None and node.is_regular:
            mode = _without_privileges(mode)
        owners.write_override(directory, name, uid, gid, mode)
        return
    if changes.uid is not None or changes.gid is not None:
        uid = -1 if changes.uid is None else changes.uid
        gid = -1 if changes.gid is None else changes.gid
        syscalls.chown(directory, name, *owners.stored(uid, gid))
    if changes.mode is not None:
        syscalls.chmod(directory, name, stat.S_IMODE(changes.mode))


def kill_privileges(tree: Tree, node: Node) -> None:
    """Drop set-uid and set-gid, as a write by somebody else does."""
    if not node.is_regular:
        return
    mode = stat.S_IMODE(tree.status(node).st_mode)
    if mode != _without_privileges(mode):
        syscalls.chmod(*tree.location(node), _without_privileges(mode))


def _kill_capabilities(tree: Tree, node: Node) -> None:
    try:
        syscalls.removexattr(*tree.location(node), b"security.capability")
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            raise


def _without_privileges(mode: int) -> int:
    """A mode without set-uid and set-gid; the kernel asks only where the writer is a stranger."""
    return mode & ~(stat.S_ISUID | stat.S_ISGID)
