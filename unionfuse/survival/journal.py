"""What a daemon has told the kernel and the next one must know: node ids and open handles.

An append-only log in the shared memory. A record is written before the reply that makes it matter
goes out: it is put behind the end, then the end is moved by one store. A later record of the same
id replaces the earlier one. When most of the log is dead it is copied to the other half.

Nodes that the lookup index numbers are not in here until they leave their name: their ids mean
the same to every daemon. Callers hold the union's lock.
"""

from __future__ import annotations

import logging
import stat
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

from unionfuse.survival.memory import HALF, JOURNAL_AT, SharedMemory, TakeOverError, Word
from unionfuse.tree import view
from unionfuse.tree.farewell import descriptor_name
from unionfuse.tree.journal import Handle, Journal
from unionfuse.tree.node import Node

log = logging.getLogger(__name__)

_DEAD, _NAME, _GOING, _GONE, _OPEN, _ALIAS, _TABLE = range(7)
_RECORD = struct.Struct("=5Q")  # header, id, lookups, inode number, parent; then the payload
# of an open handle: header, handle, flags, backing id, node
# of a table: header, its first id, how many names, bytes of payload, directory; of each name its
# type and a NUL behind it
# header: size of the record in bytes (32 bits), one of the above (8), bytes of payload (16),
# type of the file as in a mode, shifted by 12 (4)
_SCRATCH = 1 << 20  # bytes at the end of a half: where records go once it is full
_LENT = 1 << 63  # among the flags that a handle was opened with
_GARBAGE = 4 << 20  # bytes; less is not worth a compaction


class Descriptors(Protocol):
    """Who holds descriptors for the next daemon."""

    def keep(self, name: str, descriptor: int) -> None: ...

    def let_go(self, name: str) -> None: ...


class SharedJournal(Journal):
    """The journal of a mount that has a keeper."""

    def __init__(self, memory: SharedMemory, descriptors: Descriptors) -> None:
        """Read what is there already. Raises TakeOverError where it makes no sense."""
        self._memory = memory
        self._bytes, self._words = memory.bytes, memory.words
        self.notes = self._notes = memory.notes
        self._descriptors = descriptors
        self._half = self._words[Word.HALF]
        self._at: dict[int, int] = {}  # id -> offset of its record
        self._handles: dict[int, int] = {}  # handle -> offset of its record
        self._aliases: dict[int, dict[tuple[int, bytes], int]] = {}  # further names -> offsets
        self._tables: dict[int, int] = {}  # directory -> offset of its record
        self._old_tables: list[tuple[int, int]] = []  # (first id, directory) of an earlier daemon's
        self._first_own = self._words[Word.FRESH_ID]  # ids before it are an earlier daemon's
        self._named_inside: set[int] = set()  # directories of lost nodes
        self._lost: set[int] = set()  # ids that nobody has asked this daemon for
        self._forgotten: set[int] = set()  # of the lost, those that the kernel has dropped, too
        self._by_name: dict[tuple[int, bytes], int] = {}  # of the lost
        self._by_inode: dict[int, int] = {}  # of the lost, files only
        self._replay()
        self._find_lost()
        self._backings = {handle.backing for handle in self.handles()} - {0}

    # --- reading -----------------------------------------------------------------------------

    def _replay(self) -> None:
        """Find the records that count. Raises TakeOverError where that makes no sense."""
        data, unpack, live = self._bytes, _RECORD.unpack_from, 0
        at, end = self._start, self._words[Word.END + self._half]
        if not at <= end <= at + HALF or end % 8:
            raise TakeOverError("its journal is damaged")
        while at < end:
            header, number, _, inode, parent = unpack(data, at)
            size, kind, length = header & 0xFFFFFFFF, header >> 32 & 0xFF, header >> 40 & 0xFFFF
            length = inode if kind == _TABLE else length
            if size < _RECORD.size + length or size % 8 or size > end - at:
                raise TakeOverError("its journal is damaged")
            if kind == _TABLE:
                self._tables[parent] = at
                live += size
            elif kind == _ALIAS:
                start = at + _RECORD.size
                alias = parent, bytes(data[start : start + length])
                self._aliases.setdefault(number, {})[alias] = at
                live += size
            elif kind:
                known = self._handles if kind == _OPEN else self._at
                if number in known:
                    self._become(known[number], _DEAD)
                    live -= self._words[known[number] // 8] & 0xFFFFFFFF
                known[number] = at
                live += size
            at += size
        self._write_here(live)

    def _find_lost(self) -> None:
        """Note what nobody has asked for yet, by what will lead to it."""
        data = self._bytes
        for number, at in self._at.items():
            header, _, _, inode, parent = _RECORD.unpack_from(data, at)
            kind, length = header >> 32 & 0xFF, header >> 40 & 0xFFFF
            self._lost.add(number)
            if kind == _GONE:
                continue
            start = at + _RECORD.size
            name = bytes(data[start : start + (length if kind == _NAME else data[start] + 1)])
            self._by_name[parent, name if kind == _NAME else name[1:]] = number
            if header >> 56 & 0xF != stat.S_IFDIR >> 12:
                self._by_inode[inode] = number
        for number, aliases in self._aliases.items():
            for alias in aliases:
                self._by_name.setdefault(alias, number)
        self._named_inside = {parent for parent, _ in self._by_name}
        firsts = [(self._words[at // 8 + 1], directory) for directory, at in self._tables.items()]
        self._old_tables = sorted(firsts)
        self.has_forerunner = bool(self._old_tables or self._named_inside)

    def ids(self) -> list[tuple[int, bool]]:
        """(id, whether it is a directory) of every node that has a name."""
        named = [number for number, at in self._at.items() if self._kind(at) != _GONE]
        return [(number, self._type(number) == stat.S_IFDIR >> 12) for number in named]

    def handles(self) -> list[Handle]:
        found = []
        for number, at in self._handles.items():
            _, _, flags, backing, node = _RECORD.unpack_from(self._bytes, at)
            if backing == self._words[Word.CLOSING]:
                backing = 0  # the kernel had let go of it
            found.append(Handle(number, node, flags & ~_LENT, backing, bool(flags & _LENT)))
        return found

    def orphans(self) -> set[int]:
        # One may have been given that nobody could note: they are given one at a time.
        given_back = {self._words[Word.CLOSING], self._words[Word.CLOSING_YOUNG]}
        unknown = {self._words[Word.BACKING] + 1} | given_back - {0}
        return (self._backings | unknown) - {handle.backing for handle in self.handles()}

    def orphans_closed(self) -> None:
        # One that was closed to be on the safe side may be the next that the kernel gives.
        closed = self._words[Word.CLOSING]
        for at in self._handles.values():
            if self._words[at // 8 + 3] == closed:
                self._words[at // 8 + 3] = 0
        self._words[Word.CLOSING] = self._words[Word.CLOSING_YOUNG] = 0

    def doubtful(self) -> Iterator[tuple[int, int, bytes, int]]:
        """(id, parent, name, inode number) of nodes that may or may not have lost their name."""
        for number, at in list(self._at.items()):
            if self._kind(at) == _GOING:
                place = self.place(number)
                assert place is not None
                yield number, *place, self._words[at // 8 + 3]

    def claim(self, node: Node) -> int:
        if not self._lost:
            return 0
        number = 0
        if node.names:
            parent, name = node.names[0]
            number = self._by_name.get((parent.id, name), 0)
            if number not in self._lost:
                number = 0
        if number and not node.is_directory and self._inode(number) != node.ino:
            number = 0  # another file has taken the name
        if not number and (node.lower_key is not None or node.upper_key or node.index_name):
            number = self._by_inode.get(node.ino, 0)
        if not number or number not in self._lost or self._type(number) != node.kind >> 12:
            return 0
        self.found(number, node)
        return number

    def found(self, number: int, node: Node) -> None:
        at = self._at[number]
        self._lost.discard(number)
        place = self.place(number)
        if place is not None and self._by_name.get(place) == number:
            del self._by_name[place]
        node.ino = self._words[at // 8 + 3]
        node.lookups = self._words[at // 8 + 2]
        if self._by_inode.get(node.ino) == number:
            del self._by_inode[node.ino]

    def has(self, number: int) -> bool:
        return number in self._at

    def place(self, number: int) -> tuple[int, bytes] | None:
        at = self._at.get(number)
        if at is None:
            return self._place_in_table(number)
        if self._kind(at) == _GONE:
            return None
        payload = self._payload(at)
        if self._kind(at) == _GOING:
            payload = payload[1 : 1 + payload[0]]
        return self._words[at // 8 + 4], payload

    def names(self, number: int) -> list[tuple[int, bytes]]:
        place = self.place(number)
        return ([] if place is None else [place]) + list(self._aliases.get(number, ()))

    # --- tables of merged directories --------------------------------------------------------

    def table_ids(self, directory: int, names: Sequence[tuple[bytes, int]]) -> tuple[int, bool]:
        self._hear_of_tables()
        if not names:
            return 0, False
        payload = b"".join(bytes((kind >> 12,)) + name + b"\0" for name, kind in names)
        at = self._tables.get(directory)
        if at is not None:
            first = self._words[at // 8 + 1]
            return (first, first < self._first_own) if self._table(at) == payload else (0, False)
        if directory in self._named_inside:
            return 0, False  # the kernel has other ids for these names
        first = self.fresh_ids(len(names))
        at = self._append(_TABLE, 0, first, len(names), len(payload), directory, payload)
        self._tables[directory] = at
        return first, False

    def _hear_of_tables(self) -> None:
        """Take note of what came and went without us."""
        for directory, at in self.tables.news() if self.tables is not None else ():
            if at:
                self._tables[directory] = at
            else:
                self.drop_table(directory)

    def drop_table(self, directory: int) -> None:
        at = self._tables.pop(directory, None)
        if at is not None:
            self._kill(at)

    def drop_all_tables(self) -> None:
        self._hear_of_tables()
        for directory in list(self._tables):
            self.drop_table(directory)

    def _table(self, at: int) -> bytes:
        start = at + _RECORD.size
        return bytes(self._bytes[start : start + self._words[at // 8 + 3]])

    def _place_in_table(self, number: int) -> tuple[int, bytes] | None:
        """Where an earlier daemon had an id of one of its tables."""
        position = bisect_right(self._old_tables, (number, 1 << 64)) - 1
        if position < 0:
            return None
        first, directory = self._old_tables[position]
        at = self._tables.get(directory)
        if at is None or number - first >= self._words[at // 8 + 2]:
            return None
        return directory, self._table(at).split(b"\0", number - first + 1)[number - first][1:]

    def farewell(self, number: int) -> bytes | None:
        at = self._at.get(number)
        if at is None or self._kind(at) != _GONE:
            return None
        payload = self._payload(at)
        return payload[1 + payload[0] :]

    def _kind(self, at: int) -> int:
        return self._words[at // 8] >> 32 & 0xFF

    def _type(self, number: int) -> int:
        return self._words[self._at[number] // 8] >> 56 & 0xF

    def _inode(self, number: int) -> int:
        return self._words[self._at[number] // 8 + 3]

    def _payload(self, at: int) -> bytes:
        length = self._words[at // 8] >> 40 & 0xFFFF
        return bytes(self._bytes[at + _RECORD.size : at + _RECORD.size + length])

    # --- writing -----------------------------------------------------------------------------

    @property
    def _start(self) -> int:
        return JOURNAL_AT + self._half * HALF

    def fresh_ids(self, count: int) -> int:
        first = self._words[Word.FRESH_ID]
        self._words[Word.FRESH_ID] = first + count
        return first

    def fresh_handle(self) -> int:
        number = self._words[Word.HANDLE]
        self._words[Word.HANDLE] = number + 1
        return number

    def name(self, node: Node) -> None:
        parent, name = node.names[0]
        self._write(node, _NAME, parent.id, name)
        if len(node.names) > 1 or node.id in self._aliases:
            self.also(node)
            wanted = {(parent.id, name) for parent, name in node.names[1:]}
            for alias in self._aliases[node.id].keys() - wanted:
                self._kill(self._aliases[node.id].pop(alias))

    def also(self, node: Node) -> None:
        aliases = self._aliases.setdefault(node.id, {})
        for parent, name in node.names[1:]:
            if (parent.id, name) not in aliases:
                at = self._append(_ALIAS, 0, node.id, 0, 0, parent.id, name)
                aliases[parent.id, name] = at

    def going(self, node: Node, farewell: Callable[[Node], bytes]) -> None:
        parent, name = node.names[0] if node.names else (None, b"")
        payload = bytes((len(name),)) + name + farewell(node)
        self._write(node, _GOING, parent.id if parent is not None else 0, payload)

    def gone(self, node: Node) -> None:
        at = self._at.get(node.id)
        if at is not None and self._words[at // 8] >> 32 & 0xFF == _GOING:
            self._notes.become(at, _GONE)

    def keep(self, node: Node) -> None:
        self._descriptors.keep(descriptor_name(node.id), node.unnamed)

    def let_go(self, number: int) -> None:
        self._descriptors.let_go(descriptor_name(number))

    def adopted(self, number: int, record: int) -> None:
        self._at[number] = record

    def adopted_handle(self, handle: int, record: int) -> None:
        self._handles[handle] = record

    def count(self, node: Node) -> None:
        at = self._at.get(node.id)
        if at is not None:
            self._notes.set_lookups(at, node.lookups if node.lookups > 0 else 0)

    def forgotten(self, number: int, lookups: int) -> None:
        at = self._at.get(number)
        if at is None or not self._words[at // 8 + 2]:
            return
        self._words[at // 8 + 2] = max(0, self._words[at // 8 + 2] - lookups)
        if not self._words[at // 8 + 2]:
            self._forgotten.add(number)

    def drop(self, number: int) -> None:
        at = self._at.pop(number, None)
        if at is not None:
            self._notes.kill(at)
        if number in self._aliases:
            for at in self._aliases.pop(number).values():
                self._kill(at)

    def opened(self, handle: int, node: int, flags: int) -> None:
        if self.intents is not None:
            self.intents.opened(handle)
        if not self._notes.replace(self._handles, _OPEN, 0, handle, flags, 0, node, b""):
            self._handles[handle] = self._append_anew(_OPEN, 0, handle, flags, 0, node, b"")

    def lent(self, handle: int) -> None:
        self._words[self._handles[handle] // 8 + 2] |= _LENT

    def passes(self, handle: int, backing: int) -> None:
        at = self._handles.get(handle)
        if at is not None:
            self._words[at // 8 + 3] = backing
        if backing > self._words[Word.BACKING]:
            self._words[Word.BACKING] = backing

    def gives_back(self, backing: int) -> None:
        self._words[Word.CLOSING] = backing

    def moving(self, directory: int, name: bytes) -> None:
        if self.intents is not None:
            self.intents.moving(view.entry_status(directory, name).st_ino)

    def released(self, handle: int) -> int:
        at = self._handles.pop(handle, None)
        if at is None:
            return 0
        self._notes.kill(at)
        return self._words[at // 8 + 4]

    def moved(
        self, subject: tuple[int, int, int], before: tuple[int, bytes], parent: int, name: bytes
    ) -> None:
        """Note what an earlier daemon could not: a rename of a node that nobody has asked for."""
        number, inode, kind = subject
        alias = self._aliases.get(number, {}).pop(before, None)
        if alias is not None:
            new = self._append(_ALIAS, 0, number, 0, 0, parent, name)
            self._aliases[number][parent, name] = new
            self._kill(alias)
            self._by_name.pop(before, None)
            self._by_name[parent, name] = number
            return
        at = self._at.get(number)
        lookups = 0 if at is None else self._words[at // 8 + 2]
        old = None if at is None else self.place(number)
        if old is not None and self._by_name.get(old) == number:
            del self._by_name[old]
        self._at[number] = self._append(_NAME, kind >> 12, number, lookups, inode, parent, name)
        if at is not None:
            self._kill(at)
        self._lost.add(number)
        self._by_name[parent, name] = number

    def lost_name(self, number: int) -> None:
        """Note that a node that nobody has asked for has lost its last name."""
        at = self._at[number]
        place = self.place(number)
        if place is not None and self._by_name.get(place) == number:
            del self._by_name[place]
        self._become(at, _GONE)

    def _write(self, node: Node, kind: int, parent: int, payload: bytes) -> None:
        number, known, lookups = node.id, self._at, node.lookups
        fields = kind, node.kind >> 12, number, lookups if lookups > 0 else 0, node.ino, parent
        if not self._notes.replace(known, *fields, payload):
            at = self._append_anew(*fields, payload)
            old = known.get(number)
            known[number] = at
            if old is not None:
                self._kill(old)

    def _kill(self, at: int) -> None:
        self._notes.kill(at)

    def _become(self, at: int, kind: int) -> None:
        self._notes.become(at, kind)

    def _append(
        self, kind: int, type_: int, number: int, lookups: int, inode: int, parent: int, data: bytes
    ) -> int:
        at = self._notes.append(kind, type_, number, lookups, inode, parent, data, kind == _TABLE)
        return at or self._append_anew(kind, type_, number, lookups, inode, parent, data)

    def _append_anew(
        self, kind: int, type_: int, number: int, lookups: int, inode: int, parent: int, data: bytes
    ) -> int:
        """Append what there was no room for."""
        if not self._words[Word.FULL]:
            self._compact()
            append, long = self._notes.append, kind == _TABLE
            if at := append(kind, type_, number, lookups, inode, parent, data, long):
                return at
        return self._overflow()

    def _write_here(self, live: int) -> None:
        """Write to the half that counts, of which so many bytes do."""
        limit = self._start + HALF - _SCRATCH
        self._notes.use_half(Word.END + self._half, self._start, limit, _GARBAGE, live)

    def _overflow(self) -> int:
        """Where records go that nobody will read: no daemon can take over any more."""
        if not self._words[Word.FULL]:
            self._words[Word.FULL] = 1
            log.error("the journal is full: a crash would end this mount")
        return self._start + HALF - _SCRATCH

    def _unreachable(self) -> list[int]:
        """Ids that the kernel has forgotten before anybody asked this daemon for them."""
        if not self._forgotten:
            return []
        needed = {self._words[at // 8 + 4] for at in self._at.values()}
        needed |= {self._words[at // 8 + 4] for at in self._handles.values()}
        needed |= self._tables.keys()
        needed |= {parent for aliases in self._aliases.values() for parent, _ in aliases}
        return [number for number in self._forgotten & self._lost if number not in needed]

    def _compact(self) -> None:
        """Copy what counts to the other half, then make that the one that counts."""
        with self.tables or nullcontext():
            self._hear_of_tables()
            for number in self._unreachable():
                self._lost.discard(number)
                self.drop(number)
            with self.young or nullcontext():
                self._move()

    def _move(self) -> None:
        old, old_end = self._start, self._words[Word.END + self._half]
        self._half ^= 1
        end = self._start
        tables: list[dict[Any, int]] = [
            self._handles,
            self._at,
            self._tables,
            *self._aliases.values(),
        ]
        for known in tables:
            for key, at in known.items():
                size = self._words[at // 8] & 0xFFFFFFFF
                self._bytes[end : end + size] = self._bytes[at : at + size]
                known[key] = end
                end += size
        if self.young is not None:
            end = self.young.move_notes(end)
        self._words[Word.END + self._half] = end
        self._words[Word.HALF] = self._half
        self._write_here(end - self._start)
        self._memory.give_back(old, (old_end - old + 4095) & ~4095)
