"""A new daemon's first act, before it serves: settle what the dead one had begun.

For each request that was begun and not finished the tree is looked at. What had become visible is
taken for done, and the reply is prepared; what a creation left half made is removed, since nobody
can have seen it (the kernel holds the directory's lock until the reply); the rest has not happened
and will simply be asked for again. Then the open files are opened again.
"""

from __future__ import annotations

import errno
import logging
import stat

from unionfuse.express.messages import entry_out
from unionfuse.survival.intents import (
    CREATING,
    DELETING,
    MARKING,
    OPENING,
    RENAMING,
    Intent,
    IntentLog,
)
from unionfuse.survival.journal import SharedJournal
from unionfuse.syscalls import RENAME_EXCHANGE
from unionfuse.tree import view
from unionfuse.tree.node import Directory
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire.protocol import Opcode

log = logging.getLogger(__name__)

_ALL = 1 << 40  # more lookups than a node can have
_XATTR_CREATE = 1


class Settling:
    """Settles one mount for its next daemon. Nothing else runs yet."""

    def __init__(self, union: Union, journal: SharedJournal, intents: IntentLog) -> None:
        self._union = union
        self._tree = union.tree
        self._journal = journal
        self._intents = intents

    def run(self, kept: dict[str, int]) -> None:
        """Settle everything. `kept`: the descriptors of deleted files; each is taken once."""
        self._union.revival.kept = kept
        with self._union.lock:
            for intent in self._intents.begun():
                try:
                    self._settle(intent)
                except OSError as error:
                    log.warning("a request of the last daemon could not be settled: %s", error)
                    self._intents.drop(intent.slot)
            self._settle_doubtful()
            self._reopen()
        self._intents.clear()

    def _settle(self, intent: Intent) -> None:
        opcode = intent.opcode
        if opcode in RENAMING:
            done = self._rename(intent)
        elif opcode in DELETING:
            done = self._delete(intent)
        elif opcode in CREATING:
            self._create(intent)
            return
        elif opcode in MARKING:
            done = self._mark(intent)
        else:
            assert opcode in OPENING
            self._abandon_handle(intent)
            done = False
        if done:
            self._intents.finish(intent.slot, 0, b"")
        else:
            self._intents.drop(intent.slot)

    def _exists(self, parent: int, name: bytes) -> bool:
        directory = self._tree.node(parent)
        return isinstance(directory, Directory) and self._tree.exists(directory, name)

    # --- names -------------------------------------------------------------------------------

    def _rename(self, intent: Intent) -> bool:
        """Whether it was done; the journal says so, too, afterwards."""
        (new_parent,) = protocol.RENAME_IN.unpack_from(intent.body)
        flags = 0
        if intent.opcode == Opcode.RENAME2:
            _, flags, _ = protocol.RENAME2_IN.unpack_from(intent.body)
        name, new_name = intent.names[:2]
        if not intent.moving or self._inode_in_upper(new_parent, new_name) != intent.moving:
            return False
        source, target = intent.subjects
        self._journal.moved(source, (intent.node, name), new_parent, new_name)
        if flags & RENAME_EXCHANGE:
            self._journal.moved(target, (new_parent, new_name), intent.node, name)
        else:
            self._union.finish_rename(intent.node, name)
        return True

    def _inode_in_upper(self, parent: int, name: bytes) -> int:
        """The st_ino that upper itself has under a name; 0 where there is nothing."""
        directory = self._tree.directory(parent)
        if not directory.in_upper:
            return 0
        try:
            return view.entry_status(self._tree.upper_directory(directory), name).st_ino
        except FileNotFoundError:
            return 0

    def _delete(self, intent: Intent) -> bool:
        was_there = bool(intent.subjects[0][0])
        return was_there and not self._exists(intent.node, intent.names[0])

    def _create(self, intent: Intent) -> None:
        name = intent.names[0]
        self._intents.drop(intent.slot)
        if intent.subjects[0][0] or not self._exists(intent.node, name):
            self._abandon_handle(intent)
            return
        entry = self._union.lookup(intent.node, name)
        if intent.opcode == Opcode.LINK:
            reply = entry_out(entry, self._union.options.timeout)
            self._intents.finish(intent.slot, 0, reply)
            return
        self._abandon_handle(intent)
        if stat.S_ISDIR(entry.attributes.mode):
            self._union.rmdir(intent.node, name)
        else:
            self._union.unlink(intent.node, name)
        self._union.forget(entry.node, _ALL)

    def _abandon_handle(self, intent: Intent) -> None:
        """Forget a handle that the kernel never heard of."""
        if not intent.handle:
            return
        node = self._journal.released(intent.handle)
        if intent.opcode == Opcode.TMPFILE and node:
            self._journal.drop(node)
            self._journal.let_go(node)

    def _mark(self, intent: Intent) -> bool:
        name = intent.names[0]
        was_there = bool(intent.subjects[0][0])
        try:
            self._union.getxattr(intent.node, name)
            is_there = True
        except OSError as error:
            if error.errno != errno.ENODATA:
                return False
            is_there = False
        if intent.opcode == Opcode.REMOVEXATTR:
            return was_there and not is_there
        _, flags, _, _ = protocol.SETXATTR_EXT_IN.unpack_from(intent.body)
        if flags & _XATTR_CREATE and is_there and not was_there:
            self._union.removexattr(intent.node, name)
        return False

    # --- nodes and handles -------------------------------------------------------------------

    def _settle_doubtful(self) -> None:
        """Nodes that were about to lose their last name: look whether they have."""
        for number, parent, name, _ in self._journal.doubtful():
            alive = False
            try:
                directory = self._tree.node(parent)
                if isinstance(directory, Directory) and self._tree.exists(directory, name):
                    node = self._tree.find(directory, name)
                    alive = node.id == number
                    if alive:
                        self._journal.name(node)
            except OSError:
                pass
            if not alive:
                self._journal.lost_name(number)

    def _reopen(self) -> None:
        for handle in self._journal.handles():
            try:
                self._union.reopen(handle.number, handle.node, handle.flags)
            except OSError as error:
                log.warning("an open file (node %d) is lost: %s", handle.node, error.strerror)
                self._journal.released(handle.number)
