"""Files with several links: each of their names is to find the one node."""

from __future__ import annotations

import os

from unionfuse.tree.node import Node


class Links:
    """The nodes of such files, by what each of their names knows them by.

    That is (st_dev, st_ino) in a lower layer, or (-1, record) in the index; in upper it is st_ino.
    """

    def __init__(self) -> None:
        self._lower: dict[tuple[int, int], Node] = {}
        self._upper: dict[int, Node] = {}

    def lower(self, key: tuple[int, int]) -> Node | None:
        """The node of a lower file."""
        return self._lower.get(key)

    def upper(self, status: os.stat_result) -> Node | None:
        """The node of a file in upper, also of one whose other names have gone."""
        node = self._upper.get(status.st_ino)
        if node is None or (node.deleted and node.unnamed < 0):
            return None  # nothing holds such a file: another may have its inode number by now
        return node

    def remember_lower(self, node: Node, key: tuple[int, int]) -> None:
        """Note that a lower file has several links."""
        node.lower_key = key
        self._lower[key] = node

    def remember_upper(self, node: Node, status: os.stat_result) -> None:
        """Note that a file in upper has several links."""
        node.upper_key = status.st_ino
        self._upper[status.st_ino] = node

    def forget(self, node: Node) -> None:
        """Nobody needs the node any more."""
        if node.lower_key is not None:
            self._lower.pop(node.lower_key, None)
        if node.upper_key and self._upper.get(node.upper_key) is node:
            del self._upper[node.upper_key]
