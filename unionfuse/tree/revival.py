"""Nodes made anew for ids that the kernel has and the tree has not.

The kernel has them from a daemon that served this mount before, or keeps them longer than the tree
does. Where a node lies say the journal, a table of merged directories or the lookup index; what is
left of a deleted node the journal has whole. Callers hold the union's lock.
"""

from __future__ import annotations

import errno
import stat

from unionfuse.layers.layer import Place
from unionfuse.tree.farewell import descriptor_name, read
from unionfuse.tree.journal import FIRST_FRESH_ID
from unionfuse.tree.node import Directory, Node
from unionfuse.tree.tree import Tree, failure


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
        nodes = self._tree.nodes
        if self._tree.young.adopt(number):
            return nodes[number]
        missing: list[tuple[int, bytes]] = []
        above = number
        while above not in nodes and not self._revive_deleted(above):
            parent, name = self._place(above)
            missing.append((above, name))
            above = parent
            if above == number:
                raise failure(errno.ESTALE)
        node = nodes[above]
        for expected, name in reversed(missing):
            found = self._below(node, expected, name)
            if found is None:
                return self._by_other_name(number)
            node = found
        return node

    def _place(self, number: int) -> tuple[int, bytes]:
        """(parent id, name) of where a node was last. Raises ESTALE."""
        tree = self._tree
        if self._is_record(number):
            assert tree.index is not None
            info = tree.index.info(number)
            return info.parent, info.name
        place = None
        if number >= FIRST_FRESH_ID and not tree.journal.has(number):
            place = tree.tables.place_of(number)
        place = place or tree.journal.place(number)
        if place is None:
            raise failure(errno.ESTALE)
        return place

    def _is_record(self, number: int) -> bool:
        """Whether an id means what the index says: the journal knows what has left its name."""
        return 0 < number <= self._tree.indexed_ids and not self._tree.journal.has(number)

    def _below(self, parent: Node, number: int, name: bytes) -> Node | None:
        """The node with an id under a name; None where the name means something else by now."""
        if not isinstance(parent, Directory):
            return None
        tree = self._tree
        if self._is_record(number):
            if parent.record != parent.id:
                return None
            if not parent.in_upper and not (tree.upper is not None and tree.upper.index_names):
                return self._from_record(parent, number, name)
        if not tree.exists(parent, name):
            return None
        found = tree.find(parent, name)
        return found if found.id == number else None

    def _from_record(self, parent: Directory, record: int, name: bytes) -> Node:
        """Make what the index has in a directory that upper has not: nothing needs to be read."""
        tree = self._tree
        assert tree.index is not None
        layers = tree.stack.layers
        status = tree.index.status(record)
        node: Node
        if stat.S_ISDIR(status.st_mode):
            node = Directory()
            node.lowers = tuple(Place(layers[n], path) for n, path in tree.index.places(record))
        else:
            node = Node(stat.S_IFMT(status.st_mode))
            layer = tree.index.info(record).layer
            path = next(p.path for p in parent.lowers if p.layer.number == layer)
            node.lower = Place(layers[layer], path, name)
            if status.st_nlink > 1:
                tree.links.remember_lower(node, (-1, record))
        node.record, node.ino = record, status.st_ino
        return tree.adopt(node, parent, name)

    def _by_other_name(self, number: int) -> Node:
        """The node of an id whose first name is gone: it may have others, as hard links do."""
        tree = self._tree
        if self._is_record(number):
            assert tree.index is not None
            names = tree.index.names(number)
        else:
            names = tree.journal.names(number)[1:]
        for parent, name in names:
            try:
                directory = tree.directory(parent)
            except OSError:
                continue  # it is gone, too
            if tree.exists(directory, name):
                found = tree.find(directory, name)
                if found.id == number:
                    return found
        raise failure(errno.ESTALE)

    def _revive_deleted(self, number: int) -> bool:
        """Make a node that had no name left. False where the id is not one of these."""
        tree = self._tree
        written = tree.journal.farewell(number)
        if written is None:
            return False
        left = read(written)
        node = tree.without_name(left.kind, left.index_name)
        node.id, node.last, node.mappable = number, left.last, left.mappable
        if not left.index_name:
            node.in_upper, node.metacopy = left.in_upper, left.metacopy
            node.link_offset = left.link_offset
            layer = next((known for known in tree.stack.layers if known.key == left.layer), None)
            node.lower = None if layer is None else Place(layer, left.path, left.name)
            node.unnamed = self.kept.pop(descriptor_name(number), -1)
        tree.journal.found(number, node)
        tree.nodes[number] = node
        return True
