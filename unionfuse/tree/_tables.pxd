cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from unionfuse.tree._block cimport Block, Name, Place
from unionfuse.tree._news cimport News
from unionfuse.tree._notes cimport Notes, pthread_mutex_t
from unionfuse.tree._shelf cimport Shelf


# How a question ended.
cdef enum Answer:
    ASK = 0  # only the union knows
    FOUND = 1
    ABSENT = 2
    BELOW = 3  # as the lookup index says

cdef enum:
    SPARSE_NAMES = 128  # names of a directory that may be listed without its files


@cython.final
cdef class Tables:
    cdef pthread_mutex_t mutex
    cdef int *layers
    cdef int layer_count
    cdef Shelf shelf
    cdef uint64_t hand  # the slot whose descriptors were closed last
    cdef bint stopped
    cdef Notes notes  # None where nothing is written down
    cdef News news_list
    cdef uint64_t next_id, last_id  # for names of directories that are merged here
    cdef bint is_short  # there were too few
    cdef int pauses  # somebody wants nothing to be merged here
    cdef int open_count, open_limit

    cdef int lookup(self, uint64_t parent, const char *name, size_t length, char *out) noexcept nogil
    cdef int getattr(self, uint64_t number, char *out) noexcept nogil
    cdef int forget(self, uint64_t number, uint64_t count, bint held) noexcept nogil
    cdef ssize_t readdir(
        self, uint64_t directory, uint64_t cookie, size_t room, uint64_t valid, bint *sparse,
        char *out
    ) noexcept nogil
    cdef ssize_t readlink(self, uint64_t number, char *out, size_t room) noexcept nogil
    cdef int getxattr(self, uint64_t number, const char *name) noexcept nogil
    cdef bint is_openable(self, uint64_t number, bint *cached) noexcept nogil
    cdef void note_cached(self, uint64_t number) noexcept nogil
    cdef void note_opened(self, uint64_t number) noexcept nogil
    cdef int open_file(self, uint64_t number) noexcept nogil

    cdef bint merge_here(self, uint64_t number) noexcept nogil
    cdef bint put_merged(self, Block *block, const char *payload, size_t length) noexcept nogil
    cdef bint may_merge(self, uint64_t number, Block **above) noexcept nogil
    cdef Block *draft(self, uint64_t number) noexcept nogil
    cdef void note_open(self, int count) noexcept nogil
    cdef Block *held(self, uint64_t directory) except NULL
    cdef Block *pinned(self, uint64_t number, uint32_t *position) noexcept nogil
    cdef bint is_still_so(self, Block *block, uint32_t position) noexcept nogil
    cdef Block *pinned_listing(self, uint64_t directory) noexcept nogil
    cdef ssize_t write_record(
        self, Block *block, uint64_t cookie, uint64_t valid, bint sparse, char *record
    ) noexcept nogil
    cdef bint stat_pinned(self, Block *block, uint32_t position, char *attributes) noexcept nogil
    cdef int open_place(self, Block *block, Place *place) noexcept nogil
    cdef void close_places(self, Block *block) noexcept nogil

    cdef Block *locked(self, uint64_t directory) noexcept nogil
    cdef Name *locked_name(self, uint64_t number, Block **block) noexcept nogil
    cdef void note(self, uint64_t number, uint8_t what) noexcept nogil
    cdef void unlock(self) noexcept nogil
    cdef bint answers(self, const Block *block) noexcept nogil
    cdef void unpin(self, Block *block) noexcept nogil
    cdef void free_if_unused(self, Block *block) noexcept nogil
