"""Extended attributes: under what name each is stored, and which are shown.

Callers hold the union's lock.
"""

from __future__ import annotations

import errno
import functools
import os

from unionfuse import syscalls
from unionfuse.capabilities import SYS_ADMIN, has_capability
from unionfuse.layers import whiteout
from unionfuse.tree.node import Directory, Node
from unionfuse.tree.tree import Tree, failure

LAYER = b"user.unionfuse.layer"
"""Names the layer directory that a file comes from; shown only to who asks for it by name."""

ACL_PREFIX = b"system.posix_acl_"

_LABEL = b"security.selinux"


def get(tree: Tree, node: Node, attribute: bytes) -> bytes:
    """The value of an extended attribute. Raises ENODATA, EOPNOTSUPP."""
    if attribute == LAYER:
        return _layer_of(node)
    try:
        return syscalls.getxattr(*tree.location(node), stored_name(tree, attribute))
    except OSError as error:
        if error.errno == errno.ENODATA and attribute == _LABEL:
            raise failure(unlabelled()) from None
        raise


@functools.cache
def unlabelled() -> int:
    """The errno for a file without a label of SELinux.

    `ls -l` asks for the label of each file, and no longer once it has heard that the file system
    has none (EOPNOTSUPP): so it is told, unless this machine has SELinux.
    """
    return errno.ENODATA if os.path.exists("/sys/fs/selinux") else errno.EOPNOTSUPP


def names(tree: Tree, node: Node) -> list[bytes]:
    """The names of a node's extended attributes; none of the union's own."""
    if tree.options.noxattrs:
        raise failure(errno.EOPNOTSUPP)
    found = map(whiteout.unescape_attribute, syscalls.listxattr(*tree.location(node)))
    return [name for name in found if name is not None and not _is_hidden(tree, name)]


def shown_to(pid: int, names: list[bytes]) -> list[bytes]:
    """Those of some names that a thread may see.

    Names of `trusted.` are for those with CAP_SYS_ADMIN, and not by a user namespace of theirs, as
    every file system has it: the kernel asks for it when a value is read, but not here. That we
    see such names at all means that our user namespace is the first one.
    """
    others = [name for name in names if not name.startswith(b"trusted.")]
    if len(others) == len(names) or has_capability(pid, SYS_ADMIN):
        return names
    return others


def stored_name(tree: Tree, attribute: bytes) -> bytes:
    """What an attribute is called on disk. Raises EOPNOTSUPP for one that the mount has not."""
    if tree.options.noxattrs or _is_hidden(tree, attribute):
        raise failure(errno.EOPNOTSUPP)
    return whiteout.escape_attribute(attribute)


def _is_hidden(tree: Tree, attribute: bytes) -> bool:
    without_acls = tree.options.noacl and attribute.startswith(ACL_PREFIX)
    return without_acls or attribute == tree.owners.override


def _layer_of(node: Node) -> bytes:
    if node.in_upper:
        return b"upper"
    place = node.lowers[0] if isinstance(node, Directory) else node.lower
    if place is None:
        raise failure(errno.ENODATA)
    return place.layer.path
