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
import threading
from collections.abc import Callable
from typing import NamedTuple

from unionfuse.express.messages import Call, Method
from unionfuse.survival.memory import SLOT, SLOTS, SLOTS_AT, SharedMemory
from unionfuse.tree._notes import BEGUN, FINISHED
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire.protocol import RESEND_BIT, Opcode

_GENERATION = 16  # slots for each daemon, hence threads that change something

CREATING = (Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.CREATE, Opcode.LINK)
DELETING = (Opcode.UNLINK, Opcode.RMDIR)
RENAMING = (Opcode.RENAME, Opcode.RENAME2)
OPENING = (Opcode.OPEN, Opcode.TMPFILE)
MARKING = (Opcode.SETXATTR, Opcode.REMOVEXATTR)
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


Subject = tuple[int, int, int]
"""A node as it was before: its id (0 for none), inode number and type. What only has to be there
or not has 1 for its id, and no more."""

_NOBODY: Subject = (0, 0, 0)
_SOMEBODY: Subject = (1, 0, 0)

_Subjects = Callable[[Call], tuple[Subject, Subject]]


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
        self._notes = memory.notes
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
            self.drop(slot)
        for slot in self._used:
            if self._notes.state(_place(slot)) == FINISHED:
                unique, error, reply = self._notes.reply(_place(slot))
                self._answered[unique] = error, reply

    def guarded(self, opcode: int, method: Method) -> Method:
        """A method that does a request once, however often it comes."""
        begin, finish, drop = self._notes.begin, self._notes.finish, self._notes.drop
        local, subjects = self._local, self._subjects_of(opcode)

        def once(call: Call) -> bytes | None:
            unique = call.unique
            if unique & RESEND_BIT:
                unique &= ~RESEND_BIT
                if unique in self._answered:
                    return self._answer_again(unique)
            try:
                place: int = local.place
            except AttributeError:
                place = self.own_place()
            begin(place, unique, opcode, call.node, call.body, *subjects(call))
            try:
                reply_or_later = method(call)
            except OSError as error:
                finish(place, error.errno or errno.EIO, b"")
                raise
            except BaseException:
                drop(place)
                raise
            if reply_or_later is None:
                drop(place)  # nothing has happened: it comes here again, from another thread
            else:
                finish(place, 0, reply_or_later)
            return reply_or_later

        return once

    def _answer_again(self, unique: int) -> bytes:
        error, reply = self._answered.pop(unique)
        if error:
            raise OSError(error, os.strerror(error))
        return reply

    def own_place(self) -> int:
        """The offset of the running thread's slot, for who calls this first in a thread."""
        with self._lock:
            slot = self._first + self._given
            self._given += 1
        if slot >= self._first + _GENERATION:
            raise RuntimeError("more threads than slots")
        place = self._local.place = _place(slot)
        return place

    def _subjects_of(self, opcode: int) -> _Subjects:
        """What finds out about the nodes that a request changes."""
        if opcode in CREATING or opcode in DELETING:
            at, shows = _NAMES_AT.get(opcode, 0), self._union.shows

            def named(call: Call) -> tuple[Subject, Subject]:
                name = call.body[at:].partition(b"\0")[0]
                return (_SOMEBODY if shows(call.node, name) else _NOBODY), _NOBODY

            return named
        if opcode in RENAMING:
            return self._renamed
        if opcode in MARKING:
            return self._marked
        return lambda call: (_NOBODY, _NOBODY)

    def _renamed(self, call: Call) -> tuple[Subject, Subject]:
        (new_parent,) = protocol.RENAME_IN.unpack_from(call.body)
        name, new_name = names_in(call.opcode, call.body)[:2]
        subject = self._union.subject
        return subject(call.node, name) or _NOBODY, subject(new_parent, new_name) or _NOBODY

    def _marked(self, call: Call) -> tuple[Subject, Subject]:
        try:
            self._union.getxattr(call.node, names_in(call.opcode, call.body)[0])
        except OSError:
            return _NOBODY, _NOBODY
        return _SOMEBODY, _NOBODY

    # --- what the union tells in between -----------------------------------------------------

    def opened(self, handle: int) -> None:
        """This thread's request is going to be answered with a handle."""
        place: int | None = getattr(self._local, "place", None)
        if place is not None:
            self._notes.handle(place, handle)

    def moving(self, inode: int) -> None:
        """This thread's rename is about to move what has this number in upper."""
        place: int | None = getattr(self._local, "place", None)
        if place is not None:
            self._notes.moving(place, inode)

    # --- what a daemon has left --------------------------------------------------------------

    def finish(self, slot: int, error: int, reply: bytes) -> None:
        """What is answered; from here on it will not be done again."""
        self._notes.finish(_place(slot), error, reply)

    def drop(self, slot: int) -> None:
        """As if the request had never come."""
        self._notes.drop(_place(slot))

    def begun(self) -> list[Intent]:
        """What earlier daemons have begun and not finished."""
        return [
            self._intent(slot) for slot in self._used if self._notes.state(_place(slot)) == BEGUN
        ]

    def _intent(self, slot: int) -> Intent:
        opcode, node, body, one, other, moving, handle = self._notes.request(_place(slot))
        return Intent(slot, opcode, node, body, (one, other), moving, handle)


def _place(slot: int) -> int:
    """The offset of a slot in the shared memory."""
    return SLOTS_AT + slot * SLOT
