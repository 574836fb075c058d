"""The intent log: what is being changed right now, so that no request is served twice or half.

Every request whose repetition would do harm passes `IntentLog.guarded`. Before anything is changed
its slot in the shared memory says what is about to happen; afterwards it holds the finished reply.
After a crash the kernel sends the request again, with a bit set in its number: then the reply is
there already, or the new daemon has settled what was half done (settling.py) and it starts anew.

A slot belongs to one thread, which reuses it for its next request: by then the reply has been
written. The slots of earlier daemons are kept for some generations, since a daemon may be killed
before the kernel has asked it for a reply that an earlier one left.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from typing import NamedTuple

from unionfuse.express import protocol
from unionfuse.express.messages import Call, Method
from unionfuse.express.protocol import RESEND_BIT, Opcode
from unionfuse.survival.memory import SLOT, SLOTS, SLOTS_AT, SharedMemory
from unionfuse.union import Union

_GENERATION = 16  # slots for each daemon, hence threads that change something
_FREE, _BEGUN, _FINISHED = range(3)

# Words of a slot; the reply and what is kept of the request follow.
_UNIQUE, _STATE, _OPCODE, _NODE, _LENGTH = range(5)
_NODES = 5  # the ids of the nodes that lose their name, or get another; 0 for none
_INODES = 7  # their inode numbers
_KINDS = 9  # and types
_MOVING = 11  # st_ino in upper of what a rename is about to move; 0 before it comes to that
_HANDLE = 12
_ERROR, _REPLY_LENGTH = 13, 14
_WORDS = struct.Struct("=13Q")  # those before
_REPLY_AT, _REPLY_MOST = 128, 256
_BODY_AT = _REPLY_AT + _REPLY_MOST

CREATING = (Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.CREATE, Opcode.LINK)
DELETING = (Opcode.UNLINK, Opcode.RMDIR)
RENAMING = (Opcode.RENAME, Opcode.RENAME2)
OPENING = (Opcode.OPEN, Opcode.TMPFILE)
MARKING = (Opcode.SETXATTR, Opcode.REMOVEXATTR)
_NAMING = frozenset(map(int, (*CREATING, *DELETING)))
GUARDED = (*CREATING, *DELETING, *RENAMING, *OPENING, *MARKING)

_NAMES_AT: dict[int, int] = {
    Opcode.MKNOD: protocol.MKNOD_IN.size,
    Opcode.MKDIR: protocol.MKDIR_IN.size,
    Opcode.CREATE: protocol.CREATE_IN.size,
    Opcode.LINK: protocol.LINK_IN.size,
    Opcode.RENAME: protocol.RENAME_IN.size,
    Opcode.RENAME2: protocol.RENAME2_IN.size,
    Opcode.SETXATTR: protocol.SETXATTR_EXT_IN.size,
}


class Subject(NamedTuple):
    """A node as it was before: its id (0 for none), inode number and type."""

    node: int = 0
    inode: int = 0
    kind: int = 0


_NOBODY = Subject()


class Intent(NamedTuple):
    """What a slot says of a request that was begun and not finished."""

    slot: int
    opcode: int
    node: int
    body: bytes
    subjects: tuple[Subject, Subject]
    moving: int
    handle: int

    @property
    def names(self) -> list[bytes]:
        """The names in the request's body."""
        return names_in(self.opcode, self.body)


def names_in(opcode: int, body: bytes) -> list[bytes]:
    return body[_NAMES_AT.get(opcode, 0) :].split(b"\0")


class IntentLog:
    """The slots of one mount, and those of the threads of this daemon among them."""

    def __init__(self, memory: SharedMemory, union: Union) -> None:
        self._words, self._bytes = memory.words, memory.bytes
        self._union = union
        rounds = SLOTS // _GENERATION
        self._first = memory.generation % rounds * _GENERATION
        # A page of shared memory takes room once it is looked at: the slots that had a daemon.
        self._used = range(min(memory.generation + 1, rounds) * _GENERATION)
        self._given = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._answered: dict[int, tuple[int, bytes]] = {}
        union.tree.journal.intents = self

    # --- serving -----------------------------------------------------------------------------

    def clear(self) -> None:
        """Free the slots of this generation; settle what earlier ones have begun before."""
        for slot in range(self._first, self._first + _GENERATION):
            self._words[self._word(slot) + _STATE] = _FREE
        for slot in self._used:
            word = self._word(slot)
            if self._words[word + _STATE] == _FINISHED:
                self._answered[self._words[word + _UNIQUE]] = self._reply(slot)

    def guarded(self, method: Method) -> Method:
        """A method that does a request once, however often it comes."""

        def once(call: Call) -> bytes | None:
            unique = call.unique & ~RESEND_BIT
            if call.unique & RESEND_BIT and unique in self._answered:
                error, reply = self._answered.pop(unique)
                if error:
                    raise OSError(error, os.strerror(error))
                return reply
            slot = self._begin(call, unique)
            try:
                reply_or_later = method(call)
            except OSError as error:
                self.finish(slot, error.errno or errno.EIO, b"")
                raise
            except BaseException:
                self.drop(slot)
                raise
            if reply_or_later is None:
                self.drop(slot)  # nothing has happened: it comes here again, from another thread
            else:
                self.finish(slot, 0, reply_or_later)
            return reply_or_later

        return once

    def _begin(self, call: Call, unique: int) -> int:
        slot = self._own_slot()
        word, words = self._word(slot), self._words
        words[word + _STATE] = _FREE
        one, other = self._subjects(call)
        body = call.body[: SLOT - _BODY_AT]
        _WORDS.pack_into(
            self._bytes,
            word * 8,
            *(unique, _FREE, call.opcode, call.node, len(body), one.node, other.node),
            *(one.inode, other.inode, one.kind, other.kind, 0, 0),
        )
        self._bytes[word * 8 + _BODY_AT : word * 8 + _BODY_AT + len(body)] = body
        words[word + _STATE] = _BEGUN
        return slot

    def _own_slot(self) -> int:
        slot: int | None = getattr(self._local, "slot", None)
        if slot is None:
            with self._lock:
                slot = self._first + self._given
                self._given += 1
            if slot >= self._first + _GENERATION:
                raise RuntimeError("more threads than slots")
            self._local.slot = slot
        return slot

    def _subjects(self, call: Call) -> tuple[Subject, Subject]:
        names = names_in(call.opcode, call.body)
        none = _NOBODY
        if call.opcode in _NAMING:
            return self._subject(call.node, names[0]), none
        if call.opcode in RENAMING:
            (new_parent,) = protocol.RENAME_IN.unpack_from(call.body)
            return self._subject(call.node, names[0]), self._subject(new_parent, names[1])
        if call.opcode in MARKING:
            return Subject(int(self._has_attribute(call.node, names[0]))), none
        return none, none

    def _subject(self, parent: int, name: bytes) -> Subject:
        found = self._union.subject(parent, name)
        return Subject(*found) if found is not None else _NOBODY

    def _has_attribute(self, node: int, name: bytes) -> bool:
        try:
            self._union.getxattr(node, name)
        except OSError:
            return False
        return True

    # --- what the union tells in between -----------------------------------------------------

    def opened(self, handle: int) -> None:
        """This thread's request is going to be answered with a handle."""
        self._note(_HANDLE, handle)

    def moving(self, inode: int) -> None:
        """This thread's rename is about to move what has this number in upper."""
        self._note(_MOVING, inode)

    def _note(self, word: int, value: int) -> None:
        slot: int | None = getattr(self._local, "slot", None)
        if slot is not None:
            self._words[self._word(slot) + word] = value

    # --- the end of a request ----------------------------------------------------------------

    def finish(self, slot: int, error: int, reply: bytes) -> None:
        """What is answered; from here on it will not be done again."""
        assert len(reply) <= _REPLY_MOST
        word = self._word(slot)
        self._words[word + _ERROR], self._words[word + _REPLY_LENGTH] = error, len(reply)
        self._bytes[word * 8 + _REPLY_AT : word * 8 + _REPLY_AT + len(reply)] = reply
        self._words[word + _STATE] = _FINISHED

    def drop(self, slot: int) -> None:
        """As if the request had never come."""
        self._words[self._word(slot) + _STATE] = _FREE

    def begun(self) -> list[Intent]:
        """What earlier daemons have begun and not finished."""
        return [
            self._intent(slot)
            for slot in self._used
            if self._words[self._word(slot) + _STATE] == _BEGUN
        ]

    def _intent(self, slot: int) -> Intent:
        word, words = self._word(slot), self._words
        at = word * 8 + _BODY_AT
        subjects = [
            Subject(words[word + _NODES + n], words[word + _INODES + n], words[word + _KINDS + n])
            for n in range(2)
        ]
        return Intent(
            slot,
            words[word + _OPCODE],
            words[word + _NODE],
            bytes(self._bytes[at : at + words[word + _LENGTH]]),
            (subjects[0], subjects[1]),
            words[word + _MOVING],
            words[word + _HANDLE],
        )

    def _reply(self, slot: int) -> tuple[int, bytes]:
        word = self._word(slot)
        at = word * 8 + _REPLY_AT
        reply = bytes(self._bytes[at : at + self._words[word + _REPLY_LENGTH]])
        return self._words[word + _ERROR], reply

    def _word(self, slot: int) -> int:
        return (SLOTS_AT + slot * SLOT) // 8
