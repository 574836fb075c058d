"""Nodes made anew for ids that the kernel has, and this daemon has not made yet.

The kernel has these ids from a daemon that served this mount before. Where a node lies says the
journal; what is left of a deleted node the journal has whole. Callers hold the union's lock.
"""

from __future__ import annotations

import errno
import os
import struct
from operator import attrgetter
from typing import TYPE_CHECKING

from unionfuse.layer import Place
from unionfuse.node import Attributes, Directory, Node
from unionfuse.survival.journal import descriptor_name

if TYPE_CHECKING:
    from unionfuse.tree import Tree

# flags, kind, link_offset, layer; lengths of path, name, index_name
_FAREWELL = struct.Struct("=IIqi3H")
_ATTRIBUTES = struct.Struct("=4Q4q4Q")
_FIELDS = (
    *("ino", "size", "blocks", "rdev"),
    *("atime_ns", "mtime_ns", "ctime_ns", "blksize"),
    *("mode", "nlink", "uid", "gid"),
)
_values = attrgetter(*_FIELDS)
_IN_UPPER, _METACOPY, _HAS_LAST, _MAPPABLE = 1, 2, 4, 8


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


class Revival:
    """Makes the nodes of one tree anew.

    Attributes:
        kept: descriptors that an earlier daemon left with the keeper, by name; each is taken once.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.kept: dict[str, int] = {}

    def node(self, number: int) -> Node:
        """The node with an id that is not in the tree. Raises ESTALE where nothing is known."""
        tree, journal = self._tree, self._tree.journal
        missing: list[tuple[int, bytes]] = []
        above = number
        while above not in tree.nodes and not self._revive_deleted(above):
            place = journal.place(above)
            if place is None:
                tree.node(above)  # the index knows it; or nobody does
                break
            missing.append((above, place[1]))
            above = place[0]
            if above == number:
                raise _stale()
        node = tree.nodes[above]
        for expected, name in reversed(missing):
            found = None
            if isinstance(node, Directory) and tree.exists(node, name):
                found = tree.find(node, name)
            if found is None or found.id != expected:
                found = self._by_other_name(expected)
            node = found
        return node

    def _by_other_name(self, number: int) -> Node:
        """The node that has lost the first of several names."""
        for parent, name in self._tree.journal.names(number)[1:]:
            directory = self._tree.directory(parent)
            if self._tree.exists(directory, name):
                found = self._tree.find(directory, name)
                if found.id == number:
                    return found
        raise _stale()

    # --- deleted nodes -----------------------------------------------------------------------

    def farewell(self, node: Node) -> bytes:
        """All that a node is without its name."""
        place = None if isinstance(node, Directory) else node.lower
        layer = -1 if place is None else place.layer.key
        path, name = (b"", b"") if place is None else (place.path, place.name)
        texts = (path, name, node.index_name)
        flags = (node.in_upper * _IN_UPPER) | (node.metacopy * _METACOPY)
        flags |= (node.mappable * _MAPPABLE) | (_HAS_LAST if node.last is not None else 0)
        out = _FAREWELL.pack(flags, node.kind, node.link_offset, layer, *map(len, texts))
        if node.last is not None:
            out += _ATTRIBUTES.pack(*_values(node.last))
        return out + b"".join(texts)

    def _revive_deleted(self, number: int) -> bool:
        """Make a node that had no name left. False where the id is not one of these."""
        tree = self._tree
        farewell = tree.journal.farewell(number)
        if farewell is None:
            return False
        flags, kind, link_offset, layer, *lengths = _FAREWELL.unpack_from(farewell)
        at = _FAREWELL.size
        last = None
        if flags & _HAS_LAST:
            last = Attributes.__new__(Attributes)
            for field, value in zip(_FIELDS, _ATTRIBUTES.unpack_from(farewell, at), strict=True):
                setattr(last, field, value)
            at += _ATTRIBUTES.size
        texts = []
        for length in lengths:
            texts.append(farewell[at : at + length])
            at += length
        path, name, index_name = texts
        node = tree.without_name(kind, index_name)
        if node is None:
            raise _stale()
        node.id, node.last, node.mappable = number, last, bool(flags & _MAPPABLE)
        if not index_name:
            node.in_upper, node.metacopy = bool(flags & _IN_UPPER), bool(flags & _METACOPY)
            node.link_offset = link_offset
            if layer >= 0:
                found = [known for known in tree.stack.layers if known.key == layer]
                node.lower = Place(found[0], path, name) if found else None
            node.unnamed = self.kept.pop(descriptor_name(number), -1)
        tree.journal.found(number, node)
        tree.nodes[number] = node
        return True
