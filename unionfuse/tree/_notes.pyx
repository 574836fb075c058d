# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Writes notes into the shared memory: records of the journal, slots of the intent log.

Each change that is asked of a mount with a keeper is noted before it is made, and its reply after
it, so this is a part of what it costs. What is written counts by one store of 8 bytes, which comes
last. What the notes mean is in journal.py and intents.py.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset

FREE, BEGUN, FINISHED = range(3)

cdef uint64_t KIND = <uint64_t>0xFF << 32


cdef class Notes:
    """The notes in one shared memory.

    Records may be put in, and made to count no more, by several threads at a time.

    Arguments:
        memory: all of it; not to be unmapped before `close`.
        slot_size: bytes of a slot.
    """

    def __cinit__(self, unsigned char[:] memory, size_t slot_size):
        self.memory, self.slot_size = memory, slot_size
        self.base = <char *>&self.memory[0]
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    def close(self):
        """Let go of the memory; nothing may be noted afterwards."""
        self.base, self.end, self.memory = NULL, NULL, None

    cdef char *at(self, uint64_t offset) except NULL:
        if self.base == NULL or offset % 8 or offset + self.slot_size > <uint64_t>len(self.memory):
            raise ValueError("no place for a note")
        return self.base + offset

    # --- the journal --------------------------------------------------------------------------

    def use_half(
        self, int end_word, uint64_t start, uint64_t limit, uint64_t garbage, uint64_t live
    ):
        """Records go here from now on.

        Arguments:
            end_word: which word of the memory says where they end.
            start, limit: offsets between which they are.
            garbage: bytes of dead records, beside as many as are alive, that are put up with.
            live: bytes of records that count.
        """
        self.end = <uint64_t *>self.at(end_word * 8)
        self.start, self.limit, self.garbage, self.live = start, limit, garbage, live

    cpdef append(
        self, uint64_t kind, uint64_t kind_of_file, uint64_t number, uint64_t lookups,
        uint64_t inode, uint64_t parent, bytes payload, bint long_payload=False
    ):
        """Put a record behind the others; returns its offset, 0 where it has no room.

        Arguments:
            long_payload: the header does not say how long it is.
        """
        if self.end == NULL:
            raise ValueError("no half")
        return self.put(
            kind, kind_of_file, number, lookups, inode, parent, <const char *>payload, len(payload),
            long_payload,
        )

    cdef uint64_t put(
        self, uint64_t kind, uint64_t kind_of_file, uint64_t number, uint64_t lookups,
        uint64_t inode, uint64_t parent, const char *payload, uint64_t length, bint long_payload
    ) noexcept nogil:
        """`append`, for who has no GIL."""
        cdef uint64_t size = (sizeof(Record) + length + 7) & ~<uint64_t>7
        cdef uint64_t at
        cdef Record *record
        pthread_mutex_lock(&self.mutex)
        at = self.end[0]
        if at + size > self.limit or at - self.start > 2 * self.live + self.garbage:
            pthread_mutex_unlock(&self.mutex)
            return 0
        record = <Record *>(self.base + at)
        record.header = size | kind << 32 | kind_of_file << 56
        if not long_payload:
            record.header |= (length & 0xFFFF) << 40
        record.number, record.lookups, record.inode, record.parent = number, lookups, inode, parent
        memcpy(<char *>record + sizeof(Record), payload, length)
        notes_store(self.end, at + size)
        self.live += size
        pthread_mutex_unlock(&self.mutex)
        return at

    def replace(
        self, dict known, uint64_t kind, uint64_t kind_of_file, uint64_t number, uint64_t lookups,
        uint64_t inode, uint64_t parent, bytes payload
    ):
        """Put a record behind the others and have the one of this number before it count no more.

        Arguments:
            known: the offsets of records by number; the new one's goes in here.

        Returns:
            Whether it had room; otherwise nothing has changed.
        """
        at = self.append(kind, kind_of_file, number, lookups, inode, parent, payload)
        if not at:
            return False
        old = known.get(number)
        known[number] = at
        if old is not None:
            self.kill(old)
        return True

    cpdef become(self, uint64_t offset, uint64_t kind):
        """Make a record one of another kind."""
        self.at(offset)
        self.turn(offset, kind)

    cdef void turn(self, uint64_t offset, uint64_t kind) noexcept nogil:
        """`become`, for who has no GIL."""
        cdef uint64_t *header = <uint64_t *>(self.base + offset)
        notes_store(header, header[0] & ~KIND | kind << 32)

    cpdef kill(self, uint64_t offset):
        """Have a record count no more."""
        self.at(offset)
        self.end_record(offset)

    cdef void end_record(self, uint64_t offset) noexcept nogil:
        """`kill`, for who has no GIL."""
        self.turn(offset, 0)
        pthread_mutex_lock(&self.mutex)
        self.live -= (<Record *>(self.base + offset)).header & <uint64_t>0xFFFFFFFF
        pthread_mutex_unlock(&self.mutex)

    def set_lookups(self, uint64_t offset, uint64_t lookups):
        """Note a record's lookups."""
        notes_store(&(<Record *>self.at(offset)).lookups, lookups)

    # --- the intent log -----------------------------------------------------------------------

    def begin(
        self, uint64_t offset, uint64_t unique, uint64_t opcode, uint64_t node, bytes body,
        tuple one, tuple other
    ):
        """Note in a slot that a request is about to be served.

        Arguments:
            body: what follows its header; what a slot has no room for is left out.
            one, other: (id, inode number, type) of the nodes that it is about; zeros for none.
        """
        cdef Slot *slot = <Slot *>self.at(offset)
        self.open_slot(slot, unique, opcode, node, <const char *>body, len(body))
        slot.nodes[0], slot.inodes[0], slot.kinds[0] = one
        slot.nodes[1], slot.inodes[1], slot.kinds[1] = other
        notes_store(&slot.state, IS_BEGUN)

    cdef void open_slot(
        self, Slot *slot, uint64_t unique, uint64_t opcode, uint64_t node, const char *body,
        size_t length
    ) noexcept nogil:
        """Fill in what a slot says of a request, and of no node; it counts once it is IS_BEGUN."""
        length = min(length, self.slot_size - BODY_AT)
        notes_store(&slot.state, IS_FREE)
        slot.unique, slot.opcode, slot.node, slot.length = unique, opcode, node, length
        memset(slot.nodes, 0, sizeof(slot.nodes))
        memset(slot.inodes, 0, sizeof(slot.inodes))
        memset(slot.kinds, 0, sizeof(slot.kinds))
        slot.moving = slot.handle = 0
        memcpy(<char *>slot + BODY_AT, body, length)

    def handle(self, uint64_t offset, uint64_t handle):
        """Note with which handle the request of a slot is going to be answered."""
        notes_store(&(<Slot *>self.at(offset)).handle, handle)

    def moving(self, uint64_t offset, uint64_t inode):
        """Note what the rename of a slot is about to move."""
        notes_store(&(<Slot *>self.at(offset)).moving, inode)

    def finish(self, uint64_t offset, uint64_t error, bytes reply):
        """Note what the request of a slot is answered with."""
        if len(reply) > REPLY_MOST:
            raise ValueError("a reply of this length")
        self.close_slot(<Slot *>self.at(offset), error, <const char *>reply, len(reply))

    cdef void close_slot(
        self, Slot *slot, uint64_t error, const char *reply, size_t length
    ) noexcept nogil:
        """`finish`, for who has no GIL."""
        slot.error, slot.reply_length = error, length
        memcpy(<char *>slot + REPLY_AT, reply, length)
        notes_store(&slot.state, IS_FINISHED)

    def drop(self, uint64_t offset):
        """Free a slot."""
        notes_store(&(<Slot *>self.at(offset)).state, IS_FREE)

    def state(self, uint64_t offset):
        """FREE, BEGUN or FINISHED."""
        return (<Slot *>self.at(offset)).state

    def request(self, uint64_t offset):
        """What was noted of a request: (opcode, node, body, one, other, moving, handle)."""
        cdef Slot *slot = <Slot *>self.at(offset)
        length = min(slot.length, self.slot_size - BODY_AT)
        return (
            slot.opcode, slot.node, (<char *>slot + BODY_AT)[:length],
            (slot.nodes[0], slot.inodes[0], slot.kinds[0]),
            (slot.nodes[1], slot.inodes[1], slot.kinds[1]),
            slot.moving, slot.handle,
        )

    def reply(self, uint64_t offset):
        """What `finish` noted, and of which request: (unique, error, body)."""
        cdef Slot *slot = <Slot *>self.at(offset)
        length = min(slot.reply_length, <uint64_t>REPLY_MOST)
        return slot.unique, slot.error, (<char *>slot + REPLY_AT)[:length]
