from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass


# How a question ended.
cdef enum Answer:
    ASK = 0  # only the union knows
    FOUND = 1
    ABSENT = 2
    BELOW = 3  # as the lookup index says

cdef struct Name:
    uint32_t at  # of its text
    uint32_t lookups
    uint32_t group
    uint8_t length
    uint8_t kind  # DT_*, TAKEN and MADE

cdef struct Group:  # the places that have a name
    uint32_t first, count  # in Block.positions

cdef struct Place:
    const char *path
    uint64_t device, bits  # of the inode numbers
    int descriptor  # -1: not opened yet
    uint16_t layer

cdef struct Block:
    uint64_t directory
    uint64_t first  # the node id of the first name; 0: they have none
    uint64_t ino, parent_ino
    uint32_t count, mask, known, place_count, extra_count, extra_mask
    int pins, open_count
    bint ready, held, changed, closed, below, dead
    uint32_t *slots  # position + 1
    Name *names
    char *text
    Group *groups
    uint16_t *positions
    Place *places
    char *paths
    uint64_t *extra  # hashes of names that are the union's to tell


cdef class Tables:
    cdef pthread_mutex_t mutex
    cdef int *layers
    cdef int layer_count
    cdef Block **by_directory
    cdef uint64_t directories, directory_mask
    cdef Block **by_number  # sorted
    cdef uint64_t numbered, numbered_room
    cdef uint64_t hand
    cdef bint stopped
    cdef uint64_t *gone
    cdef uint64_t gone_count, gone_room
    cdef int open_count, open_limit
    cdef int lookup(self, uint64_t parent, const char *name, size_t length, char *out) noexcept nogil
    cdef int getattr(self, uint64_t number, char *out) noexcept nogil
    cdef int forget(self, uint64_t number, uint64_t count, bint held) noexcept nogil
    cdef ssize_t readdir(
        self, uint64_t directory, uint64_t cookie, size_t room, uint64_t valid, char *out
    ) noexcept nogil
    cdef ssize_t readlink(self, uint64_t number, char *out, size_t room) noexcept nogil
    cdef int getxattr(self, uint64_t number, const char *name) noexcept nogil

    cdef int fill_places(self, Block *block, places) except -1
    cdef Block *pinned_listing(self, uint64_t directory) noexcept nogil
    cdef ssize_t write_record(
        self, Block *block, uint64_t cookie, uint64_t valid, char *record
    ) noexcept nogil
    cdef bint answers(self, const Block *block) noexcept nogil
    cdef Block *find(self, uint64_t directory) noexcept nogil
    cdef void insert(self, Block *block) noexcept nogil
    cdef void put(self, Block *block) noexcept nogil
    cdef int grow(self) except -1
    cdef void take_out(self, Block *block) noexcept nogil
    cdef Block *block_of(self, uint64_t number) noexcept nogil
    cdef uint64_t index_of(self, uint64_t number) noexcept nogil
    cdef bint stat_pinned(self, Block *block, uint32_t position, char *attributes) noexcept nogil
    cdef int open_place(self, Block *block, Place *place) noexcept nogil
    cdef void close_places(self, Block *block) noexcept nogil
    cdef void unpin(self, Block *block) noexcept nogil
    cdef void free_if_unused(self, Block *block) noexcept nogil
    cdef void note_gone(self, uint64_t directory) noexcept nogil
    cdef uint32_t lookups_of(self, uint64_t number) noexcept nogil
    cdef Block *pinned(self, uint64_t number, uint32_t *position) noexcept nogil
