"""The notes, for who writes them without the GIL (unionfuse/express/_young.pyx)."""

from libc.stdint cimport uint64_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "_notes.h" nogil:
    void notes_store(uint64_t *place, uint64_t value)

# A record of the journal; its payload follows.
cdef struct Record:
    uint64_t header  # see journal.py
    uint64_t number, lookups, inode, parent

# A slot of the intent log; REPLY_AT bytes behind its beginning is the reply, then the request.
cdef struct Slot:
    uint64_t unique, state, opcode, node, length
    uint64_t nodes[2]
    uint64_t inodes[2]
    uint64_t kinds[2]
    uint64_t moving, handle
    uint64_t error, reply_length

cdef enum:
    IS_FREE = 0
    IS_BEGUN = 1
    IS_FINISHED = 2
    REPLY_AT = 128
    REPLY_MOST = 256
    BODY_AT = REPLY_AT + REPLY_MOST


cdef class Notes:
    cdef unsigned char[:] memory
    cdef char *base
    cdef size_t slot_size
    cdef uint64_t *end
    cdef uint64_t start, limit, garbage
    cdef readonly uint64_t live
    cdef pthread_mutex_t mutex  # of `end` and `live`

    cdef char *at(self, uint64_t offset) except NULL
    cpdef append(
        self, uint64_t kind, uint64_t kind_of_file, uint64_t number, uint64_t lookups,
        uint64_t inode, uint64_t parent, bytes payload, bint long_payload=*
    )
    cpdef become(self, uint64_t offset, uint64_t kind)
    cpdef kill(self, uint64_t offset)

    cdef uint64_t put(
        self, uint64_t kind, uint64_t kind_of_file, uint64_t number, uint64_t lookups,
        uint64_t inode, uint64_t parent, const char *payload, uint64_t length, bint long_payload
    ) noexcept nogil
    cdef void turn(self, uint64_t offset, uint64_t kind) noexcept nogil
    cdef void end_record(self, uint64_t offset) noexcept nogil
    cdef void open_slot(
        self, Slot *slot, uint64_t unique, uint64_t opcode, uint64_t node, const char *body,
        size_t length
    ) noexcept nogil
    cdef void close_slot(
        self, Slot *slot, uint64_t error, const char *reply, size_t length
    ) noexcept nogil
