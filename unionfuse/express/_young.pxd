"""Files that the loop has made (_young.pyx), for the loop."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from unionfuse.wire._wire cimport fuse_attr
from unionfuse.tree._notes cimport Notes, pthread_mutex_t


cdef extern from "_young.h" nogil:
    struct young:
        uint64_t node, parent, inode, lookups, name_note, handle_note
        uint32_t backing
        int descriptor, flags
        uint8_t noted, waits, gone, length
        fuse_attr last
        young *after
        young *next_node
        char *name
    struct young_parent:
        uint64_t node, count
    struct young_table:
        young **nodes
        young *first
        size_t room, count, open, waiting

# How a question to the young files ended; the first three are as in _lane.pyx.
cdef enum Ending:
    FOR_PYTHON = 0
    ANSWERED = 1
    SILENT = 2
    NOT_YOUNG = 3

cdef struct Asked:  # a request, and where the answer to it goes
    uint32_t opcode
    uint64_t unique, node
    uint32_t uid, gid
    const char *body
    size_t size
    uint64_t slot  # of the intent log; an offset in the notes
    char *out
    size_t length  # of what was written there
    int error
    uint64_t made  # by CREATE: its node id


cdef class YoungFiles:
    cdef young_table table
    cdef pthread_mutex_t changing  # held for as long as something here is made or changed
    cdef pthread_mutex_t mutex  # of the table, for the moment it takes to look; taken last
    cdef Notes notes  # None without a keeper
    cdef int fuse
    cdef bint passes
    cdef bint stopped
    cdef uint64_t valid, mix
    cdef uint64_t next_node, last_node
    cdef long most_open
    cdef long steps  # for tests: dies before so many more; 0: never

    cdef bint concern(self, uint64_t node) noexcept nogil
    cdef int answer(self, Asked *asked) noexcept nogil
    cdef int create(self, Asked *asked, int directory) noexcept nogil
    cdef int unlink(self, Asked *asked, int directory) noexcept nogil
    cdef int forget(self, uint64_t node, uint64_t count) noexcept nogil

    cdef bint is_young(self, uint64_t node) noexcept nogil
    cdef bint has_name(self, Asked *asked) noexcept nogil
    cdef young *prepared(self, Asked *asked, int directory) noexcept nogil
    cdef int make(self, Asked *asked, int directory, young *file, unsigned mode) noexcept nogil
    cdef void pass_through(self, young *file) noexcept nogil
    cdef void write_reply(self, Asked *asked, young *file) noexcept nogil
    cdef int delete(self, Asked *asked, int directory, young *file) noexcept nogil
    cdef int release(self, Asked *asked, young *file) noexcept nogil
    cdef int attributes(self, Asked *asked, young *file) noexcept nogil
    cdef void abandon(self, young *file) noexcept nogil
    cdef uint64_t move(self, uint64_t *at, uint64_t end)
    cdef void count(self, young *file) noexcept nogil
    cdef void step(self) noexcept nogil
    cdef void lock(self) noexcept nogil
    cdef void unlock(self) noexcept nogil
