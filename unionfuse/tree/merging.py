"""What the lower layers have in a directory: from the index, from a table, or merged now into one.

Callers hold the union's lock.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from unionfuse.layers.layer import LayerStack
from unionfuse.tree._tables import Tables
from unionfuse.tree.inodes import InodeNumbers
from unionfuse.tree.journal import Journal
from unionfuse.tree.node import Directory
from unionfuse.tree.redirects import Redirects
from unionfuse.tree.view import EMPTY_VIEW, TabledView, View, merge

if TYPE_CHECKING:
    from unionfuse.index.lookup import LookupIndex

_IDS = 1 << 16  # that are given to the tables at a time


class Merging:
    """Makes the views of one mount.

    Arguments:
        index: None without one.
        tables: where what is merged goes.
    """

    def __init__(
        self,
        stack: LayerStack,
        index: LookupIndex | None,
        tables: Tables,
        journal: Journal,
        inodes: InodeNumbers,
        redirects: Redirects,
    ) -> None:
        self._layers = stack.layers
        self._devices = [os.stat(layer.descriptor).st_dev for layer in stack.layers]
        self._index = index
        self._tables = tables
        self._journal = journal
        self._inodes = inodes
        self._redirects = redirects

    def view(self, directory: Directory) -> View:
        """What the lower layers have in a directory."""
        if directory.record and self._index is not None:
            return self._index.view(directory.record, self._layers)
        with self._tables:  # or they would merge it as well, with other ids
            held = self._tables.hold(directory.id)
            if not directory.lowers:
                if held:  # the kernel knows what this directory merged before it was cut off
                    self._tables.ask_all(directory.id)
                else:
                    self._tables.add(directory.id, 0, (0, 0), (), ())
                return EMPTY_VIEW
            if not held:
                self._merge(directory)
        return TabledView(self._tables, directory.id, self._layers)

    def merge_below(self, number: int) -> bool:
        """Merge a directory that a table has the name of and nobody a node; False: it takes one."""
        return self._tables.merge(number, self._fresh_ids)

    def _fresh_ids(self, number: int, kinds: list[tuple[bytes, int]]) -> int:
        first, known = self._journal.table_ids(number, kinds)
        self._give_ids()
        return 0 if known else first

    def _give_ids(self) -> None:
        """Have directories merged without us, where that is right."""
        if self._tables.wants_ids() and not self._journal.has_forerunner:
            self._tables.give_ids(self._journal.fresh_ids(_IDS), _IDS)

    def _merge(self, directory: Directory) -> None:
        merged = merge(directory.lowers, self._redirects.resolve)
        stubs = merged.stubs()
        places = []
        for place in merged.places():
            device = self._devices[place.layer.number]
            places.append((place.layer.number, place.path, device, self._inodes.bits(device)))
        parent = directory.names[0][0] if directory.names else directory
        kinds = [(name, stub.kind) for name, stub in stubs.items()]
        first, known = self._journal.table_ids(directory.id, kinds)
        names = [(name, stub.kind, stub.positions) for name, stub in stubs.items()]
        inodes = directory.ino, parent.ino
        self._tables.add(directory.id, first, inodes, places, names, known)
        if known:  # but not what was taken out of the table by then
            for number in filter(self._journal.has, range(first, first + len(names))):
                self._tables.take(number)
        self._give_ids()
