"""What the union tells of its nodes and open files, for a daemon that may have to go on with them.

`Journal` remembers nothing; what a mount with a keeper has is in survival/journal.py. Callers hold
the union's lock.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from unionfuse.tree._notes import Notes
from unionfuse.tree.node import Node

FIRST_FRESH_ID = 1 << 62
"""Node ids from here on are made up; smaller ones are inode numbers or the index's records."""


class Intents(Protocol):
    """Who notes what the request of the running thread is about to do."""

    def opened(self, handle: int) -> None: ...

    def moving(self, inode: int) -> None: ...


class YoungRecords(Protocol):
    """Who has records of young files (young.py)."""

    def __enter__(self) -> None:
        """Nothing changes until `__exit__`."""

    def __exit__(self, *_: object) -> None: ...

    def move_notes(self, end: int) -> int:
        """Copy the records behind this offset; returns where they end."""


class TableRecords(Protocol):
    """Who gives ids to the names of merged directories without being asked (_tables.pyx)."""

    def __enter__(self) -> object:
        """No more records are written until `__exit__`."""

    def __exit__(self, *_: object) -> None: ...

    def news(self) -> list[tuple[int, int]]:
        """(directory, offset of its record) of those that came; 0 of those that are gone."""


class Handle(NamedTuple):
    """An open file: its number, its node and the flags that it was opened with.

    Attributes:
        backing: the kernel's id of the file that it passes reads and writes to; 0 for none.
        lent: the kernel does not know it: it stands behind opens that the compiled loop answered.
    """

    number: int
    node: int
    flags: int
    backing: int = 0
    lent: bool = False


class Journal:
    """Remembers nothing: what a mount without a keeper has."""

    intents: Intents | None = None
    notes: Notes | None = None
    young: YoungRecords | None = None
    tables: TableRecords | None = None
    has_forerunner = False
    """Whether the kernel may know names by ids that an earlier daemon gave them."""

    def __init__(self) -> None:
        self._fresh = FIRST_FRESH_ID
        self._handle = itertools.count(1)

    def fresh_id(self) -> int:
        """A node id that was never given before."""
        return self.fresh_ids(1)

    def fresh_ids(self, count: int) -> int:
        """The first of so many ids that were never given before."""
        first = self._fresh
        self._fresh += count
        return first

    def table_ids(self, directory: int, names: Sequence[tuple[bytes, int]]) -> tuple[int, bool]:
        """Ids for what the lower layers have in a directory: the first one.

        0: the names have no ids before somebody asks for them. And whether the kernel may have
        them from an earlier daemon.

        Arguments:
            names: each with the type bits of its mode.
        """
        return self.fresh_ids(len(names)), False

    def drop_table(self, directory: int) -> None:
        """Nobody knows any more what a directory has in lower layers."""

    def drop_all_tables(self) -> None:
        """The layers change: names are no longer what their tables say."""

    def fresh_handle(self) -> int:
        """A handle that was never given before: a RELEASE that comes twice hits no other file."""
        return next(self._handle)

    def name(self, node: Node) -> None:
        """A node has got its id, or its first name has changed."""

    def also(self, node: Node) -> None:
        """A node has got one more name."""

    def names(self, number: int) -> list[tuple[int, bytes]]:
        """Where a node was last: (parent id, name) of each of its names, the first one first."""
        return []

    def adopted(self, number: int, record: int) -> None:
        """A young file, which has a record already, has become a node of the tree."""

    def adopted_handle(self, handle: int, record: int) -> None:
        """The same of its open handle."""

    def count(self, node: Node) -> None:
        """The kernel's lookups of a node have changed."""

    def drop(self, number: int) -> None:
        """Nobody knows an id any more."""

    def going(self, node: Node, farewell: Callable[[Node], bytes]) -> None:
        """A node is about to lose its last name; if it does, its farewell is all that is left."""

    def gone(self, node: Node) -> None:
        """It has lost it."""

    def keep(self, node: Node) -> None:
        """A deleted node's descriptor must outlive this process."""

    def let_go(self, number: int) -> None:
        """It need not any more."""

    def opened(self, handle: int, node: int, flags: int) -> None:
        """A handle is about to be given to the kernel."""

    def lent(self, handle: int) -> None:
        """An open handle is for what the compiled loop has opened; the kernel gets none of it."""

    def passes(self, handle: int, backing: int) -> None:
        """The kernel has a backing file for a handle that it is about to get."""

    def gives_back(self, backing: int) -> None:
        """A backing id is about to be given back."""

    def handles(self) -> list[Handle]:
        """What was open when the daemon before this one ended."""
        return []

    def orphans(self) -> set[int]:
        """Backing ids that the daemon before this one has left without an open file."""
        return set()

    def orphans_closed(self) -> None:
        """They have been given back; the kernel may give the same numbers to others from now on."""

    def moving(self, directory: int, name: bytes) -> None:
        """A rename is about to move what lies under a name in a directory of upper."""

    def released(self, handle: int) -> int:
        """A handle has been closed; returns its node's id, 0 where it is not known."""
        return 0

    def claim(self, node: Node) -> int:
        """The id that an earlier daemon gave to this new node; 0 for none.

        The node's names (or, for a hard link, its links) say which. Its inode number and lookups
        become what they were.
        """
        return 0

    def has(self, number: int) -> bool:
        """Whether an id is taken, by a node that is alive or one that nobody has asked for yet."""
        return False

    def place(self, number: int) -> tuple[int, bytes] | None:
        """(parent id, name) where a node was last; None where the journal does not know it."""
        return None

    def found(self, number: int, node: Node) -> None:
        """A node has been made anew for an id: it is as well known as it was."""

    def farewell(self, number: int) -> bytes | None:
        """What was left of a deleted node."""
        return None

    def forgotten(self, number: int, lookups: int) -> None:
        """The kernel has dropped lookups of a node that nobody has asked this daemon for."""
